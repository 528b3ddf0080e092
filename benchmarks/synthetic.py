"""Synthetic activations: sparse sums of features with long-tailed frequencies, a common model of language-model activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FEATURES_PER_DIMENSION = 4
_ACTIVE_PER_TOKEN = 40.0
_MOST_FREQUENT = 0.5
_NOISE = 0.15


class SyntheticActivations:
    """``x = s * (sum_i a_i f_i + noise)``, `[n, d_in]` float32.

    ``4 * d_in`` unit directions f_i; feature i is active with probability proportional to 1 / i (at most 1/2, about 40 active per token) at
    a strength a_i from an exponential distribution; Gaussian noise of norm 0.15 sqrt(d_in / 40) before s, which brings the mean norm
    to sqrt(d_in). Batch ``index`` is always the same.
    """

    description = "synthetic activations: sparse sums of 4 d_in features with frequencies falling as 1/i, about 40 per token, plus noise"

    def __init__(self, d_in: int, seed: int = 0) -> None:
        self.d_in, self._seed = d_in, seed
        generator = torch.Generator().manual_seed(seed)
        self._features = F.normalize(torch.randn(_FEATURES_PER_DIMENSION * d_in, d_in, generator=generator), dim=1)
        weights = 1 / torch.arange(1, len(self._features) + 1)
        self._probabilities = (weights * (_ACTIVE_PER_TOKEN / weights.sum())).clamp(max=_MOST_FREQUENT)
        self._scale = 1.0
        self._scale = d_in**0.5 / float(self.batch(-1, 1024).norm(dim=1).mean())

    def batch(self, index: int, n_tokens: int) -> Tensor:
        """Return batch ``index``, `[n_tokens, d_in]`."""
        generator = torch.Generator().manual_seed(((self._seed + 1) << 32) + index)
        shape = (n_tokens, len(self._features))
        active = torch.rand(shape, generator=generator) < self._probabilities
        strengths = torch.empty(shape).exponential_(generator=generator).mul_(active)
        noise = torch.randn(n_tokens, self.d_in, generator=generator) * (_NOISE / _ACTIVE_PER_TOKEN**0.5)
        return torch.addmm(noise, strengths, self._features).mul_(self._scale)
