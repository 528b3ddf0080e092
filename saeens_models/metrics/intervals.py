"""Confidence intervals over few runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit


class MeanInterval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    """Mean of the values."""
    low: float | None
    """Lower end of the interval; None for a single value."""
    high: float | None
    """Upper end of the interval; None for a single value."""


def mean_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval:
    r"""Return Student's interval for the mean of n independent values, :math:`\bar x \pm t_{n-1} \cdot s / \sqrt n`.

    :math:`t_{n-1}` is the quantile of Student's t distribution at (1 + ``level``) / 2 and s the sample standard deviation (n - 1 in the
    denominator). With two values t is 12.7 at 95 %: show the values themselves as well. Raises ``ValueError`` without values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return MeanInterval(mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half_width = float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n)
    return MeanInterval(mean, mean - half_width, mean + half_width)


def jackknife_interval(value: float, left_out: Sequence[float], level: float = 0.95) -> MeanInterval:
    r"""Return the jackknife interval of a statistic that compares runs, such as a mean over pairs of runs.

    R runs are R independent draws, but the values of their pairs are not: runs are left out, one after another. left_out: the statistic
    without each run, :math:`T_{-r}`. The standard error is :math:`\sqrt{(R - 1) / R \cdot \sum_r (T_{-r} - \bar T)^2}`, and the
    interval :math:`T \pm t_{R-1} \cdot` that. Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 11. Raises
    ``ValueError`` for fewer than three runs: with two, nothing is left to compare.
    """
    n = len(left_out)
    if n < 3:
        raise ValueError(f"a jackknife over runs needs at least three; got {n}")
    mean = math.fsum(left_out) / n
    error = math.sqrt((n - 1) / n * math.fsum((each - mean) ** 2 for each in left_out))
    half_width = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return MeanInterval(value, value - half_width, value + half_width)
