"""Are activations fit to train on? Values that are not finite, that sit at the end of their dtype, or that do not vary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NEAR_LIMIT = 0.999  # of the largest number: a clamp may stop one step short of it
_CONSTANT = 1e-12  # of the mean square: below, a variance is rounding


class ValueCounts(NamedTuple):
    """What `count_values` found among ``values`` numbers."""

    values: int
    non_finite: int
    """NaN, or infinite."""
    at_limit: int
    """Finite, and within a thousandth of the largest number of the dtype: cut off there, most likely."""


def count_values(x: Tensor) -> ValueCounts:
    """Look at every number of a floating-point tensor of any shape, in its own dtype."""
    limit = _NEAR_LIMIT * torch.finfo(x.dtype).max
    if not x.numel() or bool(torch.stack(x.aminmax()).abs().lt(limit).all()):  # NaN spreads to both, and compares as false
        return ValueCounts(x.numel(), 0, 0)
    finite = torch.isfinite(x)
    return ValueCounts(x.numel(), int((~finite).sum()), int((finite & (x.abs() >= limit)).sum()))


def constant_dimensions(mean: np.ndarray, variance: np.ndarray) -> int:
    """How many of d_in dimensions do not vary, given ``mean`` and ``variance`` `[d_in]`: variance <= 1e-12 * mean^2."""
    return int((variance <= _CONSTANT * np.square(mean)).sum())
