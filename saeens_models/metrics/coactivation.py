"""Connectivity: the share of feature pairs that never fire on the same token, exact, in bounded memory.

The m x m co-occurrence matrix is kept as bits. The row of feature i is the OR of the bit masks (m bits) of the tokens on which i fires,
so a token costs l0 * m / 64 word operations instead of the m^2 operations of a dense product. The matrix is symmetric: only its upper
triangle is computed. Features are ordered from rare to frequent: a frequent feature, with many masks to OR, then has a short row.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode, sparse_codes

_WORD = 64
"""Bits per word, and features per group: the rows of a group start at the word of its own diagonal."""
_TILE_WORDS = 32
_TILE_BYTES = 2**20
"""Tokens are processed in blocks, and their masks in tiles of words that fit the cache of one core. Measured."""
_BYTES_PER_NONZERO = 24
DEFAULT_MEMORY_BUDGET = 4 * 2**30
"""Bytes; enough for the co-occurrence bits of 220 000 features."""


class MemoryBudgetError(MemoryError):
    """A memory budget is too small."""


def streaming_memory(n_features: int) -> int:
    """Return the smallest ``memory_budget``, in bytes, for connectivity of any number of tokens: about ``m^2 / 12``."""
    groups = -(-n_features // _WORD)
    return -(-4 * (_WORD * 8) * (groups * (groups + 1) // 2) // 3)


class _Codes(NamedTuple):
    """Active features of tokens, in compressed sparse rows."""

    feature: np.ndarray
    """int32 [nnz], token by token."""
    start: np.ndarray
    """int64 [n_tokens + 1]: position of each token's first feature."""


class ConnectivityMetric:
    """Streaming metric for ``connectivity``: ``update(z)`` for each batch of codes, then ``compute()``.

    Memory stays below ``memory_budget`` bytes, not counting the batches and some tens of megabytes of scratch memory:

    * The co-occurrence bits take ``m^2 / 16`` bytes (1.1 GB at m = 131072). If that is at most three quarters of the budget
      (``streaming_memory``), any number of tokens can be streamed; the rest is for a block of tokens, 64 MiB at m = 131072.
    * Otherwise the codes are kept, 4 bytes per non-zero entry and 8 per token, in at most half of the budget, and ``compute``
      reads them once for each strip of the matrix that fits into a quarter of it. Codes that do not fit raise MemoryBudgetError.

    Uses as many threads as torch does, and numba if it is available; the result is the same.
    """

    def __init__(self, n_features: int, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> None:
        if n_features < 1:
            raise ValueError(f"n_features must be at least 1; got {n_features}")
        self.n_features = n_features
        self.memory_budget = memory_budget
        self._words = -(-n_features // _WORD)
        self._tiles = max(4, self._words // _TILE_WORDS)
        self._block_bytes = min(memory_budget // 4, self._tiles * _TILE_BYTES)
        group_bytes = _WORD * 8 * np.arange(self._words, 0, -1)
        self._streams = memory_budget >= streaming_memory(n_features)
        if not self._streams and memory_budget < 4 * group_bytes[0]:
            least = min(4 * int(group_bytes[0]), streaming_memory(n_features))
            raise MemoryBudgetError(f"memory_budget must be at least {least} bytes for {n_features} features; got {memory_budget}")
        strip_of_group = np.cumsum(group_bytes) // max(1, memory_budget // 4 - group_bytes[0])
        self._strips = [range(self._words)] if self._streams else _runs(strip_of_group)
        self._bits = self._no_bits(self._strips[0]) if self._streams else None
        self._order = np.empty(0, dtype=np.int64)
        self._pending: list[_Codes] = []
        self._pending_bytes = 0
        self._held: list[_Codes] = []
        self._tokens = 0

    def update(self, z: Tensor | SparseCode) -> None:
        """Add a batch of codes z `[n, n_features]`, dense or sparse; values other than zero do not matter."""
        check_code(z, self.n_features)
        mask_bytes = self._words * 8
        parts = (part for code in sparse_codes(z) for part in code.split(max(1, self._block_bytes // mask_bytes)))
        for code in parts:
            size = code.n_tokens * mask_bytes + len(code.feature) * _BYTES_PER_NONZERO
            if self._pending and self._pending_bytes + size > self._block_bytes:
                self._flush()
            self._pending.append(_Codes(code.feature.int().cpu().numpy(), code.start.cpu().numpy()))
            self._pending_bytes += size
            self._tokens += code.n_tokens

    def compute(self) -> float:
        """Return the connectivity over all batches. Raises ValueError before the first token."""
        return self.compute_prefixes([self.n_features])[0]

    def compute_prefixes(self, sizes: Sequence[int]) -> list[float]:
        """Return the connectivity of the first ``size`` features, for each size, such as those of an ensemble's first members."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: connectivity needs at least one")
        if not all(1 <= size <= self.n_features for size in sizes):
            raise ValueError(f"a prefix must have between 1 and {self.n_features} features; got {list(sizes)}")
        self._flush()
        included = [self._order < size for size in sizes]
        n_pairs = [0] * len(sizes)
        for strip in self._strips:
            bits = self._no_bits(strip) if self._bits is None else self._bits
            for codes in self._held:  # none if the bits were streamed
                self._or_into(bits, strip, codes)
            for group, rows in zip(strip, _rows_of_groups(bits, strip, self._words), strict=True):
                for i, prefix in enumerate(included):
                    n_pairs[i] += _n_cooccurring(rows, prefix, group)
        return [1.0 - pairs / size**2 for pairs, size in zip(n_pairs, sizes, strict=True)]

    def _flush(self) -> None:
        if not self._pending:
            return
        ends = np.cumsum([0, *(len(codes.feature) for codes in self._pending)])
        codes = _Codes(
            feature=np.concatenate([codes.feature for codes in self._pending]),
            start=np.concatenate([[0], *(codes.start[1:] + end for codes, end in zip(self._pending, ends[:-1], strict=True))]),
        )
        self._pending, self._pending_bytes = [], 0
        if not len(self._order):
            self._order = np.argsort(np.bincount(codes.feature, minlength=self._words * _WORD), kind="stable")
        if self._bits is not None:
            self._or_into(self._bits, self._strips[0], codes)
            return
        self._held.append(codes)
        held_bytes = sum(part.nbytes for codes in self._held for part in codes)
        if held_bytes > self.memory_budget // 2:
            raise MemoryBudgetError(
                f"the codes of {self._tokens} tokens take {held_bytes} bytes, more than half of memory_budget = {self.memory_budget}; "
                f"with {streaming_memory(self.n_features)} bytes any number of tokens can be streamed, otherwise give fewer tokens"
            )

    def _no_bits(self, strip: range) -> np.ndarray:
        """Return co-occurrence bits of a strip of the matrix, all 0, as uint64.

        Each group of 64 features has 64 rows, from its own group to the last: the matrix is symmetric.
        """
        return np.zeros(sum(_WORD * (self._words - group) for group in strip), dtype=np.uint64)

    def _or_into(self, bits: np.ndarray, strip: range, codes: _Codes) -> None:
        rank = np.empty(len(self._order), dtype=np.int32)
        rank[self._order] = np.arange(len(self._order), dtype=np.int32)
        by_token = csr_array(
            (np.ones(len(codes.feature), dtype=np.bool_), rank[codes.feature], codes.start), shape=(len(codes.start) - 1, len(rank))
        )
        by_feature = by_token.tocsc()
        masks = _token_masks(by_token.indices, by_token.indptr, len(rank))
        _or_masks(bits, masks, by_feature, strip, self._tiles)


@cache
def compiled_loops() -> ModuleType | None:
    """Return the module of compiled loops; None without numba, or without a numba for this Python or numpy."""
    try:
        from saeens_models.metrics import coactivation_compiled
    except ImportError:
        return None
    return coactivation_compiled


def _token_masks(feature: np.ndarray, start: np.ndarray, n_features: int) -> np.ndarray:
    """Return the features of each token as bits, uint64 [n_tokens, n_features / 64]."""
    masks = np.zeros((len(start) - 1, n_features // 8), dtype=np.uint8)
    compiled = compiled_loops()
    if compiled is not None:
        compiled.set_bits(masks, feature, start)
        return masks.view(np.uint64)
    step = max(1, 2**24 // n_features)
    for first in range(0, len(masks), step):
        starts = start[first : first + step + 1]
        dense = np.zeros((len(starts) - 1, n_features), dtype=np.bool_)
        dense[np.repeat(np.arange(len(dense)), np.diff(starts)), feature[starts[0] : starts[-1]]] = True
        masks[first : first + step] = np.packbits(dense, axis=1)
    return masks.view(np.uint64)


def _or_masks(bits: np.ndarray, masks: np.ndarray, by_feature: csc_array, strip: range, n_tiles: int) -> None:
    compiled = compiled_loops()
    if compiled is not None:
        edges = np.linspace(strip.start, masks.shape[1], n_tiles + 1).astype(np.int64).tolist()

        def work(tile: tuple[int, int]) -> None:
            compiled.or_masks(bits, masks, by_feature.indices, by_feature.indptr, strip.start, strip.stop, *tile)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # largest tasks first: the last columns have the most rows
            list(pool.map(work, reversed(list(pairwise(edges)))))
        return
    for group, rows in zip(strip, _rows_of_groups(bits, strip, masks.shape[1]), strict=True):
        masks_from_group = masks[:, group:]
        starts = by_feature.indptr[group * _WORD : (group + 1) * _WORD + 1]
        for i, (first, last) in enumerate(pairwise(starts)):
            if first < last:
                rows[i] |= np.bitwise_or.reduce(masks_from_group[by_feature.indices[first:last]], axis=0)


def _rows_of_groups(bits: np.ndarray, strip: range, n_words: int) -> list[np.ndarray]:
    """Return the rows of each group of the strip, `[64, n_words - group]`, as views."""
    ends = np.cumsum([_WORD * (n_words - group) for group in strip])
    return [rows.reshape(_WORD, -1) for rows in np.split(bits, ends[:-1])]


def _n_cooccurring(rows: np.ndarray, included: np.ndarray, group: int) -> int:
    """Count ordered pairs of included features that co-occur, with the first feature (or both) in ``group``.

    The first word of the rows holds pairs within the group, in both orders; any other pair is present once.
    """
    included_words = np.packbits(included).view(np.uint64)[group:]
    bits = rows[included[group * _WORD : (group + 1) * _WORD]] & included_words
    return int(np.bitwise_count(bits[:, 0]).sum()) + 2 * int(np.bitwise_count(bits[:, 1:]).sum())


def _runs(labels: np.ndarray) -> list[range]:
    """Return the positions of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [range(first, last) for first, last in pairwise(edges)]


def connectivity(z: Tensor | SparseCode | Iterable[Tensor | SparseCode], memory_budget: int = DEFAULT_MEMORY_BUDGET) -> float:
    """Return the share of feature pairs that never fire together: ``1 - nnz(C^T C) / m^2``, diagonal included.

    z is the code matrix C `[n, m]`, dense or sparse, or a one-pass iterable of its batches. The result is exact; see
    ``ConnectivityMetric`` for ``memory_budget`` (bytes). A pair of features fires together if both are non-zero on at least one token; a
    feature that fires at all forms a pair with itself.

    Raises ValueError for no tokens, batches of different widths and values that are not finite, MemoryBudgetError for a budget that is
    too small.
    """
    metric: ConnectivityMetric | None = None
    for batch in [z] if isinstance(z, Tensor | SparseCode) else z:
        metric = metric or ConnectivityMetric(batch.shape[-1], memory_budget)
        metric.update(batch)
    if metric is None:
        raise ValueError("no batches were given: connectivity needs at least one token")
    return metric.compute()
