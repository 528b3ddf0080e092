"""Values that are not finite or at the limit of their dtype, and constant dimensions, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeens_models.metrics.soundness import constant_dimensions, count_values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite_or_at_the_limit_are_counted(dtype: torch.dtype):
    x = torch.linspace(-50, 50, 60).view(20, 3).to(dtype)
    assert count_values(x) == (60, 0, 0)
    x[3, 0], x[4, 1], x[5, 2] = float("nan"), float("inf"), -float("inf")
    x[6, 0], x[7, 1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    assert count_values(x) == (60, 3, 2)


def test_counts_of_an_empty_tensor_are_zero():
    assert count_values(torch.empty(0, 4)) == (0, 0, 0)


def test_large_values_inside_the_dtype_are_not_at_its_limit():
    assert count_values(torch.tensor([[60_000.0, -65_000.0]], dtype=torch.float16)).at_limit == 0


def test_dimensions_are_constant_when_all_rows_agree_in_them():
    x = np.random.default_rng(0).normal(size=(100, 4))
    x[:, 1], x[:, 3] = 0.0, 1234.5
    assert constant_dimensions(x.mean(0), x.var(0)) == 2
    assert constant_dimensions(np.full(3, 1234.5), np.full(3, 1e-20)) == 3  # rounding errors
