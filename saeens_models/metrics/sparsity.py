"""How many features fire, and how often each of them does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ELEMENTS_PER_STEP = 2**22


class Firing(NamedTuple):
    """The non-zero entries of some rows of a code matrix, in row order."""

    n_tokens: int
    """rows looked at"""
    token: np.ndarray
    """int64 [nnz]: row of each non-zero entry, from 0"""
    feature: np.ndarray
    """int64 [nnz]: column of each non-zero entry"""


def firing(z: Tensor) -> Iterator[Firing]:
    """The non-zero entries of z `[n, n_features]` (any device), some rows at a time so that memory stays bounded."""
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"feature activations must be [n, n_features] with n_features > 0; got {list(z.shape)}")
    n_features = z.shape[1]
    for rows in z.detach().split(max(1, _ELEMENTS_PER_STEP // n_features)):
        nonzero = (rows != 0).flatten()
        # numpy finds the set entries of a sparse mask about four times faster than torch does on a CPU
        flat = np.flatnonzero(nonzero.numpy()) if nonzero.device.type == "cpu" else nonzero.nonzero().flatten().cpu().numpy()
        yield Firing(len(rows), *np.divmod(flat, n_features))


class Sparsity(NamedTuple):
    """Sparsity of a code over a set of tokens."""

    l0: float
    """mean number of non-zero entries per token"""
    relative_sparsity: float
    """l0 / number of features"""
    dead_features: float
    """share of features that never fired on these tokens"""
    density: Tensor
    """float64 [n_features]: share of the tokens on which each feature fires"""
    tokens: int
    """rows that were seen"""


class SparsityMetric:
    """``sparsity`` over a stream of batches of codes: ``update(z)`` for each, then ``compute()``. Keeps one count per feature."""

    def __init__(self, n_features: int) -> None:
        if n_features < 1:
            raise ValueError(f"n_features must be at least 1; got {n_features}")
        self._tokens = 0
        self._counts = np.zeros(n_features, dtype=np.int64)

    def update(self, z: Tensor) -> None:
        """Add a batch of codes z `[n, n_features]`; the scale of the codes does not matter."""
        n_features = len(self._counts)
        if z.ndim != 2 or z.shape[1] != n_features:
            raise ValueError(f"feature activations must be [n, {n_features}]; got {list(z.shape)}")
        for part in firing(z):
            self._counts += np.bincount(part.feature, minlength=n_features)
            self._tokens += part.n_tokens

    def compute(self) -> Sparsity:
        """Sparsity over all batches so far. Raises ValueError before the first token."""
        return self.compute_prefixes([len(self._counts)])[0]

    def compute_prefixes(self, sizes: Sequence[int]) -> list[Sparsity]:
        """Sparsity of the code made of the first ``size`` features, for each size: the first members of an ensemble."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: sparsity needs at least one")
        check_prefix_sizes(sizes, len(self._counts))
        return [self._of_counts(self._counts[:size]) for size in sizes]

    def _of_counts(self, counts: np.ndarray) -> Sparsity:
        l0 = counts.sum().item() / self._tokens
        density = torch.from_numpy(counts / self._tokens)
        return Sparsity(l0, l0 / len(counts), np.mean(counts == 0).item(), density, self._tokens)


def check_prefix_sizes(sizes: Sequence[int], n_features: int) -> None:
    """Raise ValueError unless every size is between 1 and n_features."""
    for size in sizes:
        if not 1 <= size <= n_features:
            raise ValueError(f"a prefix must have between 1 and {n_features} features; got {size}")


def sparsity(z: Tensor | Iterable[Tensor]) -> Sparsity:
    """L0, relative sparsity, dead features and densities of codes z `[n, n_features]`, or of an iterable of such batches.

    ``Sparsity`` has the definitions. Raises ValueError for no tokens or for batches of different widths.
    """
    metric: SparsityMetric | None = None
    for batch in [z] if isinstance(z, Tensor) else z:
        metric = metric or SparsityMetric(batch.shape[-1])
        metric.update(batch)
    if metric is None:
        raise ValueError("no batches were given: sparsity needs at least one token")
    return metric.compute()
