"""Reconstruction quality: mean squared error, explained variance, fraction of variance unexplained."""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from saeens_models.metrics.paired_bootstrap import SumsByDocument

_ELEMENTS_PER_STEP = 2**20


@dataclasses.dataclass(frozen=True)
class Reconstruction(Mapping[str, float]):
    """Reconstruction quality over a set of tokens: attributes, and a mapping (``dict(result)``)."""

    mse: float
    """Mean over tokens of ``sum_d (x_hat - x)_d^2``, in squared units of the activations."""
    explained_variance: float
    """Mean over the dimensions that vary of ``1 - sum_n (x_hat - x)_d^2 / sum_n (x - mean_n x)_d^2``; nan if none varies."""
    fvu: float
    """Fraction of variance unexplained: total squared error / total variance, all dimensions pooled; nan if none varies."""
    constant_dimensions: int
    """Number of dimensions without variance, left out of ``explained_variance``."""
    tokens: int
    """Number of tokens."""

    def __getitem__(self, key: str) -> float:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)


class Moments:
    """Mean and squared deviation of activations x over a stream of batches, for ``ReconstructionMetric``.

    Keeps three float64 vectors of length d_in for any number of tokens. Batches are merged by the pairwise update of Chan, Golub &
    LeVeque (1979) on activations shifted by the first token: a mean far larger than the standard deviation costs no precision, and a
    constant dimension has a variance of exactly zero.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Number of tokens."""
        self.squared_deviation = torch.empty(0)
        """float64 [d_in]: ``sum_n (x - mean_n x)_d^2``."""
        self._shift = torch.empty(0)
        self._mean = torch.empty(0)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a batch of activations x `[n, d_in]` of any floating dtype.

        Raises ValueError for another shape or d_in than before, and for values that are not finite.
        """
        if x.ndim != 2:
            raise ValueError(f"x must be [n, d_in]; got {list(x.shape)}")
        if len(x) == 0:
            return
        if self.tokens == 0:
            self._shift = x[0].double()
            self._mean, self.squared_deviation = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
        if x.shape[1] != len(self._shift):
            raise ValueError(f"this batch has d_in = {x.shape[1]}, earlier batches had {len(self._shift)}")
        for rows in x.split(_rows_per_step(x)):
            shifted = rows.double() - self._shift
            mean = shifted.mean(0)
            squared_deviation = shifted.sub_(mean).square_().sum(0)
            _require_finite("x", squared_deviation, self.tokens, len(rows))
            tokens = self.tokens + len(rows)
            difference = mean - self._mean
            self._mean += difference * (len(rows) / tokens)
            self.squared_deviation += squared_deviation + difference.square() * (self.tokens * len(rows) / tokens)
            self.tokens = tokens


class ReconstructionMetric:
    """Streaming metric for ``reconstruction``: ``update(x, x_hat)`` for each batch, then ``compute()``.

    Keeps one float64 vector of length d_in and the ``Moments`` of x, for any number of tokens. Metrics of several reconstructions of
    the same x can share ``moments``: the caller then updates the moments with each batch of x, once and before the metrics.
    ``by_document`` receives the squared errors of every dimension, too.
    """

    def __init__(self, moments: Moments | None = None, by_document: SumsByDocument | None = None) -> None:
        self._moments = moments or Moments()
        self._by_document = by_document
        self._owns_moments = moments is None
        self._tokens = 0
        self._squared_error = torch.empty(0)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, document: Tensor | None = None) -> None:
        """Add a batch: activations x and their reconstruction x_hat, both `[n, d_in]` on one device, of any floating dtype.

        ``document``, int64 `[n]`: the document of each token, for ``by_document``.

        Raises ValueError for shapes that differ between the two or from earlier batches, and for values that are not finite.
        """
        if x.ndim != 2 or x.shape != x_hat.shape:
            raise ValueError(f"x and x_hat must both be [n, d_in]; got {list(x.shape)} and {list(x_hat.shape)}")
        if len(x) == 0:
            return
        exact = torch.promote_types(torch.promote_types(x.dtype, x_hat.dtype), torch.float32)
        squared_error = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        step = _rows_per_step(x)
        for first in range(0, len(x), step):
            # float32 is precise enough for a difference, not for squares (overflow) and sums (lost digits)
            error = (x_hat[first : first + step].to(exact) - x[first : first + step].to(exact)).double().square_()
            squared_error += error.sum(0)
            if self._by_document and document is not None:
                self._by_document.update(error, document[first : first + step])
        _require_finite("x or x_hat", squared_error, self._tokens, len(x))
        if self._owns_moments:
            self._moments.update(x)
        self._squared_error = self._squared_error + squared_error if self._tokens else squared_error
        self._tokens += len(x)

    def compute(self) -> Reconstruction:
        """Return the metrics over all batches. Raises ValueError before the first token."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: reconstruction metrics need at least one")
        if self._tokens != self._moments.tokens:
            raise ValueError(f"{self._tokens} tokens were reconstructed, but the shared moments have seen {self._moments.tokens}")
        squared_deviation = self._moments.squared_deviation
        varies = squared_deviation > 0
        unexplained = self._squared_error[varies] / squared_deviation[varies]
        total_error, total_deviation = self._squared_error.sum(), squared_deviation.sum()
        return Reconstruction(
            mse=total_error.item() / self._tokens,
            explained_variance=1.0 - unexplained.mean().item(),
            fvu=(total_error / total_deviation).item() if varies.any() else float("nan"),
            constant_dimensions=int((~varies).sum()),
            tokens=self._tokens,
        )


def reconstruction(x: Tensor, x_hat: Tensor) -> Reconstruction:
    """Return mean squared error, explained variance and FVU of x_hat `[n, d_in]` as a reconstruction of x `[n, d_in]`.

    See ``Reconstruction`` for the definitions. Sums are float64. Raises ValueError for different shapes, no tokens, and values that
    are not finite.
    """
    metric = ReconstructionMetric()
    metric.update(x, x_hat)
    return metric.compute()


def _rows_per_step(x: Tensor) -> int:
    return max(1, _ELEMENTS_PER_STEP // x.shape[1])


def _require_finite(name: str, sums: Tensor, first: int, n: int) -> None:
    if not torch.isfinite(sums).all():
        raise ValueError(f"{name} has values that are not finite among tokens {first} to {first + n - 1}")
