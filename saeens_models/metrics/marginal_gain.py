"""Marginal gain of ensemble members, and the number of members after which no further one is worthwhile."""

from collections.abc import Sequence
from itertools import pairwise

WORTHWHILE_SHARE = 0.05
"""Share of the remaining gain: a member that achieves less in every measure is not worth its cost."""


def gains(values: Sequence[float]) -> list[float]:
    """Return the gain of a measure with each member. ``values[n - 1]`` is the measure of the first n members; the first gains its value."""
    return [after - before for before, after in pairwise([0.0, *values])]


def suggested_size(measures: Sequence[Sequence[float]], share: float = WORTHWHILE_SHARE) -> int:
    """Return the smallest number of members after which no further member is worthwhile.

    measures: one or several; each has the values for the first n members, n = 1 .. J, of a measure that is 1 at best, such as explained
    variance or stability. Member n is worthwhile if, in one of them, it gains at least ``share`` of the gain that remains after the earlier
    members: ``(v_n - v_{n-1}) / (1 - v_{n-1}) >= share``. Explained variance from 0.95 to 0.96 counts as much as from 0.75 to 0.80. A
    measure that falls makes no member worthwhile. Members after the suggested size change it only if one of them is worthwhile.

    Raises ValueError without a measure and for measures of different lengths.
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
