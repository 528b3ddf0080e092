"""Two ways of doing the same thing, timed in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from benchmarks.disturbance import is_disturbed, work_so_far
from benchmarks.memory import measure_peak

Item = TypeVar("Item")

EV_TOLERANCE = 0.005
"""Explained variances that differ by less count as equal."""
_MIN_ROUNDS = 3
_MOST_ROUNDS = 4  # times those of the effort


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    name: str
    settings: str
    """In full: what was chosen, and what was left at its default."""
    run: Callable[[], float]
    """Does the work once, from the start, and returns the seconds that count: preparation and warm-up do not."""


class Side(NamedTuple):
    """What one side of a comparison took."""

    seconds: float
    """Median over the rounds."""
    peak_bytes: int | None
    """Median over the rounds of the peak resident memory beyond what was there before: data not included, weights included."""


class Agreement(NamedTuple):
    """Whether both sides learnt the same: explained variance on held-out data after the same tokens."""

    ours: float
    theirs: float
    difference_in_mathematics: str | None
    """None: both compute the same, and the two numbers have to agree within ``EV_TOLERANCE``."""

    @property
    def holds(self) -> bool | None:
        """Whether they agree; None where they need not."""
        return None if self.difference_in_mathematics is not None else abs(self.ours - self.theirs) <= EV_TOLERANCE


@dataclass(frozen=True)
class Row:
    """One line of a table. Without a peer, ``theirs`` and the ratio are None."""

    case: str
    against: str
    settings: str
    ours: Side
    theirs: Side | None
    ratio: float | None
    """Median over the rounds of theirs / ours; above 1 this project is faster."""
    ratio_range: tuple[float, float] | None
    rounds: int
    disturbed_rounds: int = 0
    """Those of them in which other processes had a part of the processors."""
    tokens: int | None = None
    """Tokens per run, where a rate makes sense."""
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    budget_seconds: float
    """No new round of a comparison after this, once there are three."""
    settle_seconds: float = 0.0
    """Short comparisons go on for this long, for at most four times the rounds."""


class Stopwatch:
    """Adds up the seconds that count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def timed_after(warm_up: int, items: Iterable[Item], stopwatch: Stopwatch) -> Iterator[Item]:
    """Hand on ``items``; the stopwatch runs from when the consumer has finished the first ``warm_up`` until it has finished the last."""
    iterator = iter(items)
    for _ in range(warm_up):
        yield next(iterator)
    with stopwatch:
        yield from iterator


def compare(
    case: str, ours: Contender, theirs: Contender, effort: Effort, *, tokens: int | None = None, agreement: Agreement | None = None
) -> Row:
    """Run both in turns, ours first, and take the median of the ratios of neighbours: what changes the processor's speed changes both.

    Other processes slow sides differently: rounds with them are repeated, as often as the effort has rounds, and count if too few are
    left without.
    """
    rounds: list[_Round] = []
    started = time.perf_counter()
    while not _is_enough(rounds, time.perf_counter() - started, effort):
        rounds.append(_round(ours, theirs))
    undisturbed = [each for each in rounds if not each.disturbed]
    counted = undisturbed if len(undisturbed) >= _fewest(effort) else rounds
    ratios = [each.theirs.seconds / each.ours.seconds for each in counted]
    row = Row(
        case=case,
        against=theirs.name,
        settings=theirs.settings,
        ours=_median([each.ours for each in counted]),
        theirs=_median([each.theirs for each in counted]),
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        rounds=len(counted),
        disturbed_rounds=sum(each.disturbed for each in counted),
        tokens=tokens,
        agreement=agreement,
    )
    disturbed = f"; others worked beside {row.disturbed_rounds} of {row.rounds} rounds" if row.disturbed_rounds else ""
    seconds = f"{row.ours.seconds:.3f} s against {row.theirs.seconds if row.theirs else 0:.3f} s"
    print(f"  {case} | {theirs.name}: {row.ratio:.2f}x ({seconds}){disturbed}", file=sys.stderr)
    return row


class _Round(NamedTuple):
    ours: Side
    theirs: Side
    disturbed: bool
    """By other processes."""


def _round(ours: Contender, theirs: Contender) -> _Round:
    before, started = work_so_far(), time.perf_counter()
    sides = _run(ours), _run(theirs)
    return _Round(*sides, is_disturbed(before, time.perf_counter() - started))


def _is_enough(rounds: Sequence[_Round], elapsed: float, effort: Effort) -> bool:
    n_disturbed = sum(each.disturbed for each in rounds)
    n = len(rounds) - n_disturbed
    if n_disturbed >= max(effort.rounds, 2) or (n >= _fewest(effort) and elapsed > effort.budget_seconds):
        return True
    return n >= effort.rounds and (elapsed > effort.settle_seconds or n >= _MOST_ROUNDS * effort.rounds)


def _fewest(effort: Effort) -> int:
    return min(effort.rounds, _MIN_ROUNDS)


def _run(contender: Contender) -> Side:
    used = measure_peak(contender.run)
    return Side(used.result, used.peak_bytes)


def _median(sides: list[Side]) -> Side:
    peaks = [side.peak_bytes for side in sides if side.peak_bytes is not None]
    return Side(statistics.median(side.seconds for side in sides), int(statistics.median(peaks)) if peaks else None)
