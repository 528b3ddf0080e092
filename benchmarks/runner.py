"""Two ways of doing the same thing, timed in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from benchmarks.memory import measure_peak

Item = TypeVar("Item")

EV_TOLERANCE = 0.005
"""Explained variances that differ by less count as equal."""
_MIN_ROUNDS = 2
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
    tokens: int | None = None
    """Tokens per run, where a rate makes sense."""
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    budget_seconds: float
    """No new round of a comparison after this, once there are two."""
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
    """Run both in turns, ours first, and take the median of the ratios of neighbours: what slows the machine down slows both."""
    sides: list[tuple[Side, Side]] = []
    started = time.perf_counter()
    while True:
        sides.append((_run(ours), _run(theirs)))
        elapsed = time.perf_counter() - started
        if len(sides) >= _MIN_ROUNDS and elapsed > effort.budget_seconds:
            break
        if len(sides) >= effort.rounds and (elapsed > effort.settle_seconds or len(sides) >= _MOST_ROUNDS * effort.rounds):
            break
    ratios = [b.seconds / a.seconds for a, b in sides]
    row = Row(
        case=case,
        against=theirs.name,
        settings=theirs.settings,
        ours=_median([a for a, _ in sides]),
        theirs=_median([b for _, b in sides]),
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        rounds=len(sides),
        tokens=tokens,
        agreement=agreement,
    )
    print(
        f"  {case} | {theirs.name}: {row.ratio:.2f}x ({row.ours.seconds:.3f} s against {row.theirs.seconds if row.theirs else 0:.3f} s)",
        file=sys.stderr,
    )
    return row


def _run(contender: Contender) -> Side:
    used = measure_peak(contender.run)
    return Side(used.result, used.peak_bytes)


def _median(sides: list[Side]) -> Side:
    peaks = [side.peak_bytes for side in sides if side.peak_bytes is not None]
    return Side(statistics.median(side.seconds for side in sides), int(statistics.median(peaks)) if peaks else None)
