"""Marginal gain of ensemble members, and the number of members after which no further one is worthwhile."""

from collections.abc import Sequence
from typing import NamedTuple

WORTHWHILE_SHARE = 0.05
"""Share of the remaining gain: a member that achieves less in every measure is not worth its cost."""


class Gain(NamedTuple):
    """Gain of a measure with one further member, and its interval."""

    remaining: float
    """Distance of the measure from its best value before the member was added."""
    low: float | None
    """Lower end of the interval of the gain; None without one."""
    high: float | None
    """Upper end of the interval of the gain; None without one."""
    cost: float = 1.0
    """Training FLOPs of the member, in units of the first member's."""

    def is_worthwhile(self, share: float = WORTHWHILE_SHARE) -> bool | None:
        """Return whether the gain exceeds ``share * remaining * cost``: True or False if the whole interval does or does not, else None.

        In words: whether the member closes more than that share of the remaining distance for each cost of a first member.
        """
        least = share * max(0.0, self.remaining) * self.cost
        if self.low is None or self.high is None:
            return None
        return True if self.low > least else False if self.high <= least else None


def is_worthwhile(measures: Sequence[Sequence[Gain]], share: float = WORTHWHILE_SHARE) -> bool | None:
    """Return whether a further member is worthwhile; None if the intervals do not decide.

    measures: one or several, such as explained variance and next-token loss; each has the gain in every seed. A measure decides if all its
    seeds agree. The member is worthwhile if one measure says so, and not worthwhile if all say so.
    """
    decided = [{gain.is_worthwhile(share) for gain in of_seeds} for of_seeds in measures]
    if {True} in decided:
        return True
    return False if decided and all(each == {False} for each in decided) else None


def suggested_size(worthwhile: Sequence[bool | None]) -> int | None:
    """Return the smallest number of members after which no further member is worthwhile; None if that cannot be told.

    worthwhile: of member 2, 3, .. J, as ``is_worthwhile`` returns it. The last worthwhile member decides, even after one that is not. If
    the intervals do not decide about a member after it, there is no answer.
    """
    last = max((n for n, each in enumerate(worthwhile, start=2) if each), default=1)
    return None if None in worthwhile[last - 1 :] else last
