"""When to stop adding members: what each further one adds, and the size after which none adds much."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

WORTHWHILE_SHARE = 0.05
"""Of what was left to gain: a member that takes less than this off it, in every measure, is not worth its cost."""


def gains(values: Sequence[float]) -> list[float]:
    """What each member adds to a measure: ``values[n - 1]`` is that of the first n members. The first adds its own value."""
    return [after - before for before, after in pairwise([0.0, *values])]


def suggested_size(measures: Sequence[Sequence[float]], share: float = WORTHWHILE_SHARE) -> int:
    """The smallest number of members after which no further one is worthwhile.

    measures: one or several, each the values of the ensembles of the first n members, n = 1 .. J, of something that is 1 at best, as
    explained variance and stability are. Member n is worthwhile if it takes at least ``share`` off what the members before it leave
    to gain in one of them: ``(v_n - v_{n-1}) / (1 - v_{n-1}) >= share``. So explained variance from 0.95 to 0.96 counts as much as from
    0.75 to 0.80, a measure that falls speaks for nobody, and adding members behind the suggested size does not change it, unless one
    of them is worthwhile. Raises ValueError without a measure and for measures of different lengths.
    """
    lengths = {len(values) for values in measures}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"every measure has one value for each number of members, at least one; got lengths {sorted(lengths)}")
    worthwhile = [
        n
        for values in measures
        for n, (before, after) in enumerate(pairwise(values), start=2)
        if after > before and after - before >= share * (1 - before)
    ]
    return max(worthwhile, default=1)
