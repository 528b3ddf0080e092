"""Sparsity of codes: L0, dead features, and the density of each feature."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.sparse_code import SparseCode, sparse_codes


class Sparsity(NamedTuple):
    """Sparsity of a code over a set of tokens."""

    l0: float
    """Mean number of non-zero entries per token."""
    relative_sparsity: float
    """L0 divided by the number of features."""
    dead_features: float
    """Share of features that never fire on these tokens."""
    density: Tensor
    """float64 [n_features]: share of the tokens on which each feature fires."""
    tokens: int
    """Number of tokens."""


class SparsityMetric:
    """Streaming metric for ``sparsity``: ``update(z)`` for each batch of codes, then ``compute()``. Keeps one count per feature."""

    def __init__(self, n_features: int) -> None:
        if n_features < 1:
            raise ValueError(f"n_features must be at least 1; got {n_features}")
        self._tokens = 0
        self._counts = np.zeros(n_features, dtype=np.int64)

    def update(self, z: Tensor | SparseCode) -> None:
        """Add a batch of codes z `[n, n_features]`, dense or sparse; the scale of the codes does not matter."""
        n_features = len(self._counts)
        check_code(z, n_features)
        for code in sparse_codes(z):
            self._counts += torch.bincount(code.feature, minlength=n_features).cpu().numpy()
            self._tokens += code.n_tokens

    def compute(self, features: range | None = None) -> Sparsity:
        """Return the sparsity over all batches, of all features or of a range, such as those of one member of an ensemble.

        Raises ValueError before the first token, and for features out of range.
        """
        if self._tokens == 0:
            raise ValueError("no tokens were seen: sparsity needs at least one")
        features = range(len(self._counts)) if features is None else features
        if not 0 <= features.start < features.stop <= len(self._counts):
            raise ValueError(f"there are features 0 to {len(self._counts) - 1}; got {features}")
        counts = self._counts[features.start : features.stop]
        l0 = counts.sum().item() / self._tokens
        density = torch.from_numpy(counts / self._tokens)
        return Sparsity(l0, l0 / len(counts), np.mean(counts == 0).item(), density, self._tokens)


def check_code(z: Tensor | SparseCode, n_features: int) -> None:
    """Raise ValueError unless z is a code `[n, n_features]` of finite values: NaN is neither active nor inactive."""
    if len(z.shape) != 2 or z.shape[1] != n_features:
        raise ValueError(f"feature activations must be [n, {n_features}]; got {list(z.shape)}")
    values = z.value if isinstance(z, SparseCode) else z
    if values.is_floating_point() and values.numel() and not all(extreme.isfinite() for extreme in values.detach().aminmax()):
        raise ValueError("feature activations hold values that are not finite: check the SAE's weights and the activations")


def sparsity(z: Tensor | SparseCode | Iterable[Tensor | SparseCode]) -> Sparsity:
    """Return L0, relative sparsity, dead features and densities of codes z `[n, n_features]`, or of an iterable of such batches.

    See ``Sparsity`` for the definitions. Raises ValueError for no tokens and for batches of different widths.
    """
    metric: SparsityMetric | None = None
    for batch in [z] if isinstance(z, Tensor | SparseCode) else z:
        metric = metric or SparsityMetric(batch.shape[-1])
        metric.update(batch)
    if metric is None:
        raise ValueError("no batches were given: sparsity needs at least one token")
    return metric.compute()
