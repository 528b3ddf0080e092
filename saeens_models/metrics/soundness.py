"""Checks of activations: values that are not finite, values at the limit of their dtype, constant dimensions."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NEAR_LIMIT = 0.999  # relative to the largest number: a clamp may stop one step below it
_CONSTANT = 1e-12  # relative to the squared mean: a smaller variance is rounding


class ValueCounts(NamedTuple):
    """Counts of values in a tensor."""

    values: int
    """Number of values."""
    non_finite: int
    """Values that are NaN or infinite."""
    at_limit: int
    """Finite values within a thousandth of the largest number of the dtype, where they were probably clamped."""


def count_values(x: Tensor) -> ValueCounts:
    """Count the values of a floating-point tensor of any shape, in its own dtype."""
    limit = _NEAR_LIMIT * torch.finfo(x.dtype).max
    if not x.numel() or bool(torch.stack(x.aminmax()).abs().lt(limit).all()):  # NaN propagates to both, and compares as false
        return ValueCounts(x.numel(), 0, 0)
    finite = torch.isfinite(x)
    return ValueCounts(x.numel(), int((~finite).sum()), int((finite & (x.abs() >= limit)).sum()))


def constant_dimensions(mean: np.ndarray, variance: np.ndarray) -> int:
    """Count the constant dimensions, ``variance <= 1e-12 * mean^2``, given ``mean`` and ``variance`` `[d_in]`."""
    return int((variance <= _CONSTANT * np.square(mean)).sum())
