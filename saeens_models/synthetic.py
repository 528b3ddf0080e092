"""Synthetic activations with known features: sparse non-negative codes times a known dictionary, plus noise.

They answer what no language model can: how many of the true features a dictionary has (``saeens_models.metrics.recovery``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

MAX_RATE = 0.5
"""Largest share of rows in which a feature fires: one that fires in all rows is a bias."""
_MEAN, _VARIANCE = 1.0, 1 / 12  # of the activation of a feature that fires: uniform in [0.5, 1.5]


@dataclass(frozen=True)
class SyntheticActivations:
    """Rows ``x = z @ features + noise`` with sparse ``z >= 0``. All random numbers follow from ``seed`` and the number of the block.

    Feature i, from 0, fires in a share of rows proportional to ``(i + 1) ** -frequency_exponent``, at most ``MAX_RATE``, so that
    ``features_per_row`` fire on average; its activation is uniform in [0.5, 1.5]. Raises ValueError for settings that no codes can have.
    """

    n_features: int
    d_in: int
    features_per_row: float
    frequency_exponent: float = 1.0
    group_size: int = 1
    """Features of a group, which fire together; features are dealt into groups at random. Children are in no group."""
    correlation: float = 0.0
    """Correlation of the normal variables of a group whose thresholds decide which features fire. It changes no firing rate."""
    children_per_parent: int = 0
    """A child fires only in rows in which its parent fires. Parents are the most frequent features."""
    noise: float = 0.0
    """Root mean squared norm of the normal noise, in units of the mean activation of a feature."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_features, self.d_in, self.group_size) < 1 or self.children_per_parent < 0:
            raise ValueError("n_features, d_in and group_size are at least 1, children_per_parent at least 0")
        if not 0 < self.features_per_row <= MAX_RATE * self.n_features:
            most = MAX_RATE * self.n_features
            raise ValueError(f"features_per_row: {self.features_per_row:g} has to be above 0 and at most {most:g}, half of the features")
        if not 0 <= self.correlation < 1 or min(self.noise, self.frequency_exponent) < 0:
            raise ValueError("correlation is at least 0 and below 1, noise and frequency_exponent are at least 0")
        if self.correlation and self.group_size == 1:
            raise ValueError(f"correlation: {self.correlation:g} needs groups: set group_size to 2 or more")
        if self.children_per_parent and (self.firing_rate[self.parent] <= self.firing_rate)[self.parent >= 0].any():
            raise ValueError("children_per_parent: a child as frequent as its parent always fires with it: raise frequency_exponent")

    @cached_property
    def features(self) -> Tensor:
        """The true dictionary: unit rows in random directions, float32 `[n_features, d_in]`."""
        rows = np.random.default_rng([self.seed, 0]).standard_normal((self.n_features, self.d_in))
        return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))

    @cached_property
    def firing_rate(self) -> np.ndarray:
        """Share of rows in which each feature fires: float64 `[n_features]`, falling."""
        shape = np.arange(1, self.n_features + 1, dtype=np.float64) ** -self.frequency_exponent
        n_capped = 0
        while True:  # features above the limit are set to it, and the others share what is left
            rest = shape[n_capped:]
            rate = rest * (self.features_per_row - MAX_RATE * n_capped) / rest.sum()
            if rate[0] <= MAX_RATE * (1 + 1e-9):
                return np.concatenate([np.full(n_capped, MAX_RATE), rate.clip(max=MAX_RATE)])
            n_capped += 1

    @property
    def n_parents(self) -> int:
        """Number of features that are not children."""
        return -(-self.n_features // (1 + self.children_per_parent))

    @cached_property
    def parent(self) -> np.ndarray:
        """Parent of each feature: int64 `[n_features]`, -1 for features without one."""
        children = np.arange(self.n_parents, self.n_features)
        return np.concatenate([np.full(self.n_parents, -1), (children - self.n_parents) % self.n_parents])

    @cached_property
    def group(self) -> np.ndarray:
        """Group of each feature: int64 `[n_features]`, -1 for children."""
        order = np.random.default_rng([self.seed, 1]).permutation(self.n_parents)
        return np.concatenate([order // self.group_size, np.full(self.n_features - self.n_parents, -1)])

    @cached_property
    def _threshold(self) -> np.ndarray:
        """Threshold of the normal variable of each feature: of a child, given that its parent fires."""
        rate = self.firing_rate.copy()
        is_child = self.parent >= 0
        rate[is_child] /= self.firing_rate[self.parent[is_child]]
        return torch.special.ndtri(torch.from_numpy(rate)).numpy().astype(np.float32)

    def codes(self, n: int, *block: int) -> Tensor:
        """Return the true codes of the rows of a block: float32 `[n, n_features]`. The same numbers give the same codes."""
        return self._codes(n, np.random.default_rng([self.seed, 2, *block]))

    def rows(self, n: int, *block: int, dense: bool = False) -> Tensor:
        """Return the rows of a block: float32 `[n, d_in]`, with the codes that ``codes`` returns.

        ``dense`` is the control without sparse features: each feature is active in every row, normally distributed with its own mean and
        variance.
        """
        generator = np.random.default_rng([self.seed, 2, *block])
        codes = self._dense_codes(n, generator) if dense else self._codes(n, generator)
        noise = generator.standard_normal((n, self.d_in), np.float32) * np.float32(self.noise * _MEAN / self.d_in**0.5)
        return codes @ self.features + torch.from_numpy(noise)

    def _codes(self, n: int, generator: np.random.Generator) -> Tensor:
        variables = generator.standard_normal((n, self.n_features), np.float32)
        if self.correlation:
            shared = generator.standard_normal((n, int(self.group.max()) + 1), np.float32)[:, self.group[: self.n_parents]]
            own = variables[:, : self.n_parents]
            own *= np.float32((1 - self.correlation) ** 0.5)
            own += np.float32(self.correlation**0.5) * shared
        fires = variables < self._threshold
        fires[:, self.n_parents :] &= fires[:, self.parent[self.n_parents :]]
        codes = np.zeros((n, self.n_features), np.float32)
        codes[fires] = 0.5 + generator.random(int(fires.sum()), np.float32)
        return torch.from_numpy(codes)

    def _dense_codes(self, n: int, generator: np.random.Generator) -> Tensor:
        mean = self.firing_rate * _MEAN
        deviation = np.sqrt(self.firing_rate * (_MEAN**2 + _VARIANCE) - mean**2)
        normal = generator.standard_normal((n, self.n_features), np.float32)
        return torch.from_numpy(mean.astype(np.float32) + deviation.astype(np.float32) * normal)
