"""Comparison of two implementations of the same work, timed in turns."""

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
"""Largest difference at which explained variances count as equal."""
_MIN_ROUNDS = 3
_MOST_ROUNDS = 4  # factor of the effort's rounds


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    name: str
    settings: str
    """All settings as text, with those left at their defaults."""
    run: Callable[[], float]
    """Do the work once, from the start, and return the seconds without preparation and warm-up."""


class Side(NamedTuple):
    """Time and memory of one side of a comparison."""

    seconds: float
    """Median over the rounds."""
    peak_bytes: int | None
    """Median over the rounds of the peak resident memory minus that before, with weights, without data."""
    disk_bytes: int | None = None
    """Bytes of the files that it leaves, if that is measured."""


class Agreement(NamedTuple):
    """Explained variance of both sides on held-out data after the same tokens."""

    ours: float
    theirs: float
    difference_in_mathematics: str | None
    """Difference in the mathematics. None: the two numbers have to agree within ``tolerance``."""
    tolerance: float = EV_TOLERANCE

    @property
    def holds(self) -> bool | None:
        """Return True if the numbers agree; None if they need not agree."""
        return None if self.difference_in_mathematics is not None else abs(self.ours - self.theirs) <= self.tolerance


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
    """Number of rounds in which other processes used the processors."""
    tokens: int | None = None
    """Tokens per run, if a rate makes sense."""
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Effort:
    """The number of rounds and the time of a measurement."""

    rounds: int
    budget_seconds: float
    """Time after which no round starts, if there are three."""
    settle_seconds: float = 0.0
    """Shortest time of a comparison, with at most four times the rounds."""


class Stopwatch:
    """A stopwatch that adds up the seconds within its contexts."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def timed_after(warm_up: int, items: Iterable[Item], stopwatch: Stopwatch) -> Iterator[Item]:
    """Give ``items``. The stopwatch starts when the consumer has finished the first ``warm_up`` items, and stops after the last."""
    iterator = iter(items)
    for _ in range(warm_up):
        yield next(iterator)
    with stopwatch:
        yield from iterator


def compare(
    case: str, ours: Contender, theirs: Contender, effort: Effort, *, tokens: int | None = None, agreement: Agreement | None = None
) -> Row:
    """Run both in turns, ours first, and take the median ratio of neighbouring runs, whose processor speed is alike.

    Other processes slow the sides differently. Rounds with such load are repeated, up to the number of rounds of the effort, and count only
    if too few others are left.
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
    disturbed = f"; other processes ran in {row.disturbed_rounds} of {row.rounds} rounds" if row.disturbed_rounds else ""
    seconds = f"{row.ours.seconds:.3f} s against {row.theirs.seconds if row.theirs else 0:.3f} s"
    print(f"  {case} | {theirs.name}: {row.ratio:.2f}x ({seconds}){disturbed}", file=sys.stderr)
    return row


class _Round(NamedTuple):
    ours: Side
    theirs: Side
    disturbed: bool
    """True: other processes used the processors."""


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
