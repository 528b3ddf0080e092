"""Which features fire on the same tokens: connectivity, exact, in bounded memory.

The m x m co-occurrence matrix is kept as bits. The row of feature i is the OR, over the tokens on which i fires, of those
tokens' own bit masks of m bits, so that a token costs l0 * m / 64 word operations instead of the m^2 of a dense product.
Being symmetric, only its upper triangle is worked out. Features are ordered from rare to frequent: a frequent feature, whose
row has many masks to OR, then has a short row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from saeens_models.metrics.sparsity import Firing, check_prefix_sizes, firing

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_WORD = 64
"""Bits per word, and features per group: the rows of one group start at the same word, that of its own diagonal."""
_BLOCK_BYTES = 2**28
_BYTES_PER_NONZERO = 24
DEFAULT_MEMORY_BUDGET = 4 * 2**30
"""Bytes; holds the co-occurrence bits of up to 180 000 features."""


class _Codes(NamedTuple):
    """Where some tokens' codes are non-zero, in compressed sparse rows."""

    feature: np.ndarray
    """int32 [nnz], token by token"""
    start: np.ndarray
    """int64 [n_tokens + 1]: where each token's features start"""

    @property
    def nbytes(self) -> int:
        return self.feature.nbytes + self.start.nbytes


class ConnectivityMetric:
    """``connectivity`` over a stream of batches of codes: ``update(z)`` for each, then ``compute()``.

    Memory stays below ``memory_budget`` bytes, beside the batches themselves and some tens of megabytes to work in:

    * The co-occurrence bits take ``m^2 / 16`` bytes (1.1 GB at m = 131072). If that is at most half of the budget, any number of
      tokens can be streamed.
    * Otherwise the codes are held, 4 bytes per non-zero entry and 8 per token, in at most half of the budget, and ``compute``
      passes over them once for each strip of the matrix that fits in a quarter of it. Codes that do not fit raise MemoryError.
    """

    def __init__(self, n_features: int, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> None:
        if n_features < 1:
            raise ValueError(f"n_features must be at least 1; got {n_features}")
        self.n_features = n_features
        self.memory_budget = memory_budget
        self._words = -(-n_features // _WORD)
        self._block_bytes = min(memory_budget // 4, _BLOCK_BYTES)
        group_bytes = _WORD * 8 * np.arange(self._words, 0, -1)
        if memory_budget // 4 < group_bytes[0]:
            raise ValueError(f"memory_budget must be at least {4 * group_bytes[0]} bytes for {n_features} features; got {memory_budget}")
        self._streams = bool(group_bytes.sum() <= memory_budget // 2)
        strip_of_group = np.cumsum(group_bytes) // max(1, memory_budget // 4 - group_bytes[0])
        self._strips = [range(self._words)] if self._streams else _runs(strip_of_group)
        self._rows = self._empty_rows(self._strips[0]) if self._streams else {}
        self._order = np.empty(0, dtype=np.int64)
        self._pending: list[Firing] = []
        self._pending_bytes = 0
        self._held: list[_Codes] = []
        self._tokens = 0

    def update(self, z: Tensor) -> None:
        """Add a batch of codes z `[n, n_features]`; only whether an entry is zero matters."""
        if z.ndim != 2 or z.shape[1] != self.n_features:
            raise ValueError(f"feature activations must be [n, {self.n_features}]; got {list(z.shape)}")
        for part in firing(z):
            size = part.n_tokens * self._words * 8 + len(part.feature) * _BYTES_PER_NONZERO
            if self._pending and self._pending_bytes + size > self._block_bytes:
                self._flush()
            self._pending.append(part._replace(token=part.token.astype(np.int32), feature=part.feature.astype(np.int32)))
            self._pending_bytes += size
            self._tokens += part.n_tokens

    def compute(self) -> float:
        """Connectivity over all batches so far. Raises ValueError before the first token."""
        return self.compute_prefixes([self.n_features])[0]

    def compute_prefixes(self, sizes: Sequence[int]) -> list[float]:
        """Connectivity of the code made of the first ``size`` features, for each size: the first members of an ensemble."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: connectivity needs at least one")
        check_prefix_sizes(sizes, self.n_features)
        self._flush()
        n_pairs = [0] * len(sizes)
        for strip in self._strips:
            rows = self._rows if self._streams else self._rows_of_held_codes(strip)
            for i, size in enumerate(sizes):
                n_pairs[i] += sum(_n_cooccurring(rows[group], self._order < size, group) for group in strip)
        return [1.0 - pairs / size**2 for pairs, size in zip(n_pairs, sizes, strict=True)]

    def _flush(self) -> None:
        if not self._pending:
            return
        tokens_per_part = [np.bincount(part.token, minlength=part.n_tokens) for part in self._pending]
        codes = _Codes(
            feature=np.concatenate([part.feature for part in self._pending]),
            start=np.concatenate([[0], np.cumsum(np.concatenate(tokens_per_part))]),
        )
        self._pending, self._pending_bytes = [], 0
        if not len(self._order):
            self._order = np.argsort(np.bincount(codes.feature, minlength=self._words * _WORD), kind="stable")
        if self._streams:
            self._or_into(self._rows, codes)
            return
        self._held.append(codes)
        held_bytes = sum(codes.nbytes for codes in self._held)
        if held_bytes > self.memory_budget // 2:
            raise MemoryError(
                f"the codes of {self._tokens} tokens take {held_bytes} bytes, more than half of memory_budget = {self.memory_budget}; "
                f"with {2 * 256 * self._words * (self._words + 1)} bytes any number of tokens can be streamed, otherwise give fewer tokens"
            )

    def _rows_of_held_codes(self, strip: range) -> dict[int, np.ndarray]:
        rows = self._empty_rows(strip)
        for codes in self._held:
            self._or_into(rows, codes)
        return rows

    def _empty_rows(self, strip: range) -> dict[int, np.ndarray]:
        """uint64 [64, words - group] for each group of 64 features: their co-occurrence bits from their own group onwards."""
        return {group: np.zeros((_WORD, self._words - group), dtype=np.uint64) for group in strip}

    def _or_into(self, rows: dict[int, np.ndarray], codes: _Codes) -> None:
        from scipy import sparse

        rank = np.empty(len(self._order), dtype=np.int32)
        rank[self._order] = np.arange(len(self._order), dtype=np.int32)
        by_token = sparse.csr_array(
            (np.ones(len(codes.feature), dtype=np.bool_), rank[codes.feature], codes.start), shape=(len(codes.start) - 1, len(rank))
        )
        by_feature = by_token.tocsc()
        masks = _bit_masks(by_token)
        for group, group_rows in rows.items():
            masks_from_group = masks[:, group:]
            starts = by_feature.indptr[group * _WORD : (group + 1) * _WORD + 1]
            for row, (first, last) in enumerate(pairwise(starts)):
                if first < last:
                    group_rows[row] |= np.bitwise_or.reduce(masks_from_group[by_feature.indices[first:last]], axis=0)


def _bit_masks(by_token: csr_array) -> np.ndarray:
    """uint64 [n_tokens, n_features / 64]: the features of each token (row) of a code matrix, as bits."""
    n_tokens, n_features = by_token.shape  # pyright: ignore[reportGeneralTypeIssues]  # scipy ships no types
    masks = np.empty((n_tokens, n_features // 8), dtype=np.uint8)
    step = max(1, 2**24 // n_features)
    for first in range(0, n_tokens, step):
        masks[first : first + step] = np.packbits(by_token[first : first + step].toarray(), axis=1)
    return masks.view(np.uint64)


def _n_cooccurring(rows: np.ndarray, included: np.ndarray, group: int) -> int:
    """Ordered pairs of included features that co-occur, with the first of them (or both) in ``group``.

    The first word of the rows is the group with itself, where both orders are present; any other pair is there once.
    """
    included_words = np.packbits(included).view(np.uint64)[group:]
    bits = rows[included[group * _WORD : (group + 1) * _WORD]] & included_words
    return int(np.bitwise_count(bits[:, 0]).sum()) + 2 * int(np.bitwise_count(bits[:, 1:]).sum())


def _runs(labels: np.ndarray) -> list[range]:
    """Positions of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [range(first, last) for first, last in pairwise(edges)]


def connectivity(z: Tensor | Iterable[Tensor], memory_budget: int = DEFAULT_MEMORY_BUDGET) -> float:
    """Share of the feature pairs that never fire together: ``1 - nnz(C^T C) / m^2``, diagonal included.

    z is the code matrix C `[n, m]``, or a one-pass iterable of batches of it. Exact; ``ConnectivityMetric`` says what
    ``memory_budget`` (bytes) bounds. A pair of features fires together if both are non-zero on at least one token; a feature that
    fires at all forms a pair with itself.

    Raises ValueError for no tokens or batches of different widths, MemoryError if the codes exceed the budget.
    """
    metric: ConnectivityMetric | None = None
    for batch in [z] if isinstance(z, Tensor) else z:
        metric = metric or ConnectivityMetric(batch.shape[-1], memory_budget)
        metric.update(batch)
    if metric is None:
        raise ValueError("no batches were given: connectivity needs at least one token")
    return metric.compute()
