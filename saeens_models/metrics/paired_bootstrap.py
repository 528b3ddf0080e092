"""Paired bootstrap over held-out documents: intervals of the difference of two dictionaries in a metric."""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_BLOCKS = 1000
"""Blocks of documents that are resampled: it bounds the memory of sums by document."""
N_DRAWS = 2000
_SEED = 20
_BYTES_PER_STEP = 2**26


class Resampled(NamedTuple):
    """A metric on all documents, and on each draw of documents."""

    value: float
    """Metric on all documents."""
    draws: Tensor
    """float64 `[n_draws]`: metric on each draw; the draws of two metrics of equal ``documents`` are paired."""
    tokens: int
    """Number of tokens."""
    documents: int
    """Number of documents, or of blocks of neighbouring documents, that are resampled."""


class Difference(NamedTuple):
    """A difference of two dictionaries in a metric, and its interval."""

    difference: float
    """Metric of the one minus metric of the other."""
    low: float | None
    """Lower end of the interval; None with one document."""
    high: float | None
    """Upper end of the interval; None with one document."""


def blocks_of(document: Tensor, n_documents: int, most: int = MOST_BLOCKS) -> Tensor:
    """Return the block of each document, int64 of the shape of ``document``: indices 0 to ``n_documents`` - 1 in, 0 to ``most`` - 1 out.

    Up to ``most`` documents are blocks of their own. Of more, neighbouring documents are joined into ``most`` blocks of about equal size.
    """
    return document.long() * min(n_documents, most) // n_documents


class SumsByDocument:
    """Sums of values over the tokens of each document. Keeps float64 `[n_documents, k]`: 8 bytes for each document and value."""

    def __init__(self, n_documents: int) -> None:
        self._n_documents = n_documents
        self._sums: Tensor | None = None

    def update(self, values: Tensor, document: Tensor) -> None:
        """Add values `[n, k]` of tokens of the documents ``document``, int64 `[n]`."""
        if self._sums is None:
            self._sums = torch.zeros(self._n_documents, values.shape[1], dtype=torch.float64, device=values.device)
        self._sums.scatter_add_(0, document[:, None].expand_as(values), values.double())

    def compute(self) -> Tensor:
        """Return the sums, float64 `[n_documents, k]`. Raises ValueError before the first token."""
        if self._sums is None:
            raise ValueError("no tokens were seen: sums by document need at least one")
        return self._sums


class PairedBootstrap:
    r"""Draws of documents, the same for every metric and dictionary: metrics on them are compared draw by draw.

    A draw takes as many documents as there are, with replacement. A metric is a mean over dimensions d of a ratio of sums over tokens,
    :math:`\frac1{|D|} \sum_d \sum_g w_g a_{gd} / \sum_g w_g b_{gd}`, with :math:`w_g` the number of times that document g was drawn and
    :math:`w_g = 1` for the value on all documents. The interval is the percentile interval. Source: Efron & Tibshirani, An Introduction
    to the Bootstrap (1993), chapters 8 and 13.
    """

    def __init__(self, tokens: Tensor, n_draws: int = N_DRAWS, seed: int = _SEED) -> None:
        """``tokens`` `[n_documents]`: the number of tokens of each document; documents without one are left out."""
        self.tokens_of_documents = tokens
        self._present = tokens > 0
        self.tokens, self.documents = int(tokens.sum()), int(self._present.sum())
        if not self.documents:
            raise ValueError("no tokens were seen: a bootstrap needs at least one document")
        drawn = torch.randint(self.documents, (n_draws, self.documents), generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(n_draws, self.documents, dtype=torch.float64)
        self._counts = counts.scatter_add_(1, drawn, torch.ones_like(counts)).to(tokens.device)

    def mean_ratio(self, numerator: Tensor, denominator: Tensor) -> Resampled:
        """Return the mean over dimensions of the ratio of sums, of sums by document ``numerator`` and ``denominator`` `[n_documents, k]`.

        Dimensions without a denominator, such as those without variance, are left out. Memory: 64 MiB.
        """
        used = denominator.sum(0) > 0
        above, below = (sums[self._present][:, used].double() for sums in (numerator, denominator))
        value = (above.sum(0) / below.sum(0)).mean().item()
        step = max(1, _BYTES_PER_STEP // (16 * max(1, above.shape[1])))
        draws = torch.cat([((counts @ above) / (counts @ below)).nanmean(1) for counts in self._counts.split(step)])
        return Resampled(value, draws, self.tokens, self.documents)


def paired_difference(one: Resampled, other: Resampled, level: float = 0.95) -> Difference:
    """Return the difference ``one`` - ``other`` of a metric, with the percentile interval over draws of the same documents.

    Raises ValueError for metrics on different numbers of documents or draws.
    """
    if one.documents != other.documents or one.draws.shape != other.draws.shape:
        raise ValueError(f"a paired difference needs the same draws: of {one.documents} and of {other.documents} documents")
    difference = one.value - other.value
    if one.documents < 2:
        return Difference(difference, None, None)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=one.draws.device)
    low, high = torch.nanquantile(one.draws - other.draws, ends).tolist()
    return Difference(difference, low, high)
