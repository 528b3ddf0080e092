"""Principal axes of dictionaries: the directions in which their features differ most, for plots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy.linalg import eigh
from torch import Tensor

from saeens_models.metrics.dictionaries import unit_rows

_BLOCK_ROWS = 4096
"""Rows whose products are summed in float32; sums of blocks are accumulated in float64."""


class PrincipalAxes(NamedTuple):
    """The principal axes of a set of unit decoder rows."""

    mean: Tensor
    """float64 [d_in]: mean of the rows."""
    axes: Tensor
    """float64 [n_axes, d_in]: orthogonal unit vectors, the direction of the largest variance first. The entry of the largest size of each
    is positive, so that plots are not mirrored between computers."""
    explained_variance_ratio: Tensor
    """float64 [n_axes]: share of the rows' variance, summed over dimensions, along each axis."""

    def coordinates(self, W_dec: Tensor) -> Tensor:
        """Return the coordinates of the rows of W_dec `[n_features, d_in]`, scaled to unit norm: float32 [n_features, n_axes]."""
        rows = unit_rows(W_dec).to(self.axes.device)
        return rows @ self.axes.float().T - (self.axes @ self.mean).float()


def principal_axes(W_decs: Iterable[Tensor], n_axes: int = 2) -> PrincipalAxes:
    """Return the ``n_axes`` leading principal components (Pearson 1901) of the rows of all dictionaries, each row scaled to unit norm.

    W_decs: dictionaries `[n_features, d_in]`, read once, one after another. Memory: d_in squared float64 numbers and one dictionary.
    Raises ValueError without a dictionary, for rows that are zero or not finite, and for more axes than dimensions.
    """
    n, d_in, total, products = 0, 0, torch.zeros(()), torch.zeros(())
    for W_dec in W_decs:
        rows = unit_rows(W_dec)
        if d_in not in (0, rows.shape[1]):
            raise ValueError(f"dictionaries of different d_in have no axes in common; got {d_in} and {rows.shape[1]}")
        n, d_in = n + len(rows), rows.shape[1]
        total = total + rows.double().sum(0).cpu()
        for part in rows.split(_BLOCK_ROWS):
            products = products + (part.T @ part).double().cpu()
    if not n:
        raise ValueError("there is no dictionary: principal axes need at least one")
    if not 1 <= n_axes <= d_in:
        raise ValueError(f"n_axes must be 1 to {d_in}, the number of dimensions; got {n_axes}")
    mean = total / n
    scatter = (products - n * torch.outer(mean, mean)).numpy()
    values, vectors = eigh(scatter, subset_by_index=[d_in - n_axes, d_in - 1])
    axes = torch.from_numpy(vectors.T[::-1].copy())
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    ratio = torch.from_numpy(values[::-1].copy()).clamp(min=0) / max(scatter.trace(), torch.finfo(torch.float64).tiny)
    return PrincipalAxes(mean, axes * largest.sign(), ratio)
