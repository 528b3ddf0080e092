"""Intervals of means over few runs, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from saeens_models.metrics import jackknife_interval, mean_interval

VALUES = [0.731, 0.742, 0.729, 0.7355, 0.74]


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_that_of_students_t(n: int, level: float):
    values = np.array(VALUES[:n])
    low, high = scipy.stats.t.interval(level, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert mean_interval(VALUES[:n], level) == pytest.approx((values.mean(), low, high), rel=1e-12)


def test_equal_values_have_an_interval_of_zero_width():
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_one_value_has_no_interval():
    assert mean_interval([0.5]) == (0.5, None, None)


def test_an_interval_of_no_values_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_jackknife_of_a_mean_is_students_interval() -> None:
    values = np.array(VALUES[:5])
    left_out = [np.delete(values, i).mean() for i in range(5)]
    assert jackknife_interval(values.mean(), left_out) == pytest.approx(mean_interval(values.tolist()), rel=1e-9)


def test_jackknife_needs_three_runs() -> None:
    with pytest.raises(ValueError, match="at least three; got 2"):
        jackknife_interval(0.5, [0.4, 0.6])
