"""Sparse codes: the non-zero entries of a code, passed from SAEs to metrics without the dense code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_ELEMENTS_PER_STEP = 2**22


class SparseCode(NamedTuple):
    """The non-zero entries of a code `[n, n_features]`, in compressed sparse rows. All three tensors lie on one device."""

    n_features: int
    """Width of the dense code."""
    start: Tensor
    """int64 [n + 1]: token i has the entries ``start[i]`` to ``start[i + 1] - 1``."""
    feature: Tensor
    """int64 [nnz]: feature of each entry, in no particular order within a token."""
    value: Tensor
    """[nnz]: value of each entry, not zero."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens n."""
        return len(self.start) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense code: (n, n_features)."""
        return self.n_tokens, self.n_features

    @classmethod
    def from_dense(cls, z: Tensor) -> SparseCode:
        """Return the sparse form of a dense code z `[n, n_features]`. Memory in addition to the result: one byte per element of z."""
        _check_dense(z)
        nonzero = z.detach() != 0
        # numpy finds the set entries of a sparse mask about four times faster than torch does on a CPU
        flat = torch.from_numpy(np.flatnonzero(nonzero.numpy())) if z.is_cpu else nonzero.flatten().nonzero().flatten()
        start = torch.searchsorted(flat, torch.arange(len(z) + 1, device=z.device) * z.shape[1])
        return cls(z.shape[1], start, flat % z.shape[1], z.flatten()[flat])

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, n_features: int) -> SparseCode:
        """Return the code of a TopK SAE: the positive ones of the k largest pre-activations ``values`` at ``indices``, both `[n, k]`."""
        values = values.relu()
        active = values != 0
        if active.all():
            start = torch.arange(0, values.numel() + 1, values.shape[1], device=values.device)
            return cls(n_features, start, indices.flatten(), values.flatten())
        return cls(n_features, _starts(active.sum(1)), indices[active], values[active])

    @classmethod
    def from_choices(cls, values: Tensor, indices: Tensor, n_features: int) -> SparseCode:
        """Return the code that sums values (>= 0) at indices, both `[n, t]`; a feature may occur twice in a row, and 0 is no entry."""
        n = len(values)
        active = values > 0
        places = (indices + torch.arange(n, device=indices.device)[:, None] * n_features)[active]
        places, entry = places.unique(return_inverse=True)
        summed = values.new_zeros(len(places)).index_add_(0, entry, values[active])
        start = torch.searchsorted(places, torch.arange(n + 1, device=places.device) * n_features)
        return cls(n_features, start, places % n_features, summed)

    @classmethod
    def concatenate(cls, codes: Sequence[SparseCode]) -> SparseCode:
        """Return the codes of the same tokens side by side, as ``torch.cat`` along the features does with dense codes."""
        counts = torch.stack([code.start.diff() for code in codes])
        start = _starts(counts.sum(0))
        value = torch.cat([code.value for code in codes])
        offsets = accumulate((code.n_features for code in codes[:-1]), initial=0)
        before = start[:-1] + counts.cumsum(0) - counts  # [n_codes, n]: position of the first entry of each code and token
        place = torch.cat(
            [
                torch.arange(len(code.feature), device=start.device) + (first - code.start[:-1]).repeat_interleave(count)
                for code, first, count in zip(codes, before, counts, strict=True)
            ]
        )
        shifted = torch.cat([code.feature + offset for code, offset in zip(codes, offsets, strict=True)])
        return cls(
            n_features=sum(code.n_features for code in codes),
            start=start,
            feature=torch.empty_like(shifted).index_put_((place,), shifted),
            value=torch.empty_like(value).index_put_((place,), value),
        )

    def split(self, n_tokens: int) -> Iterator[SparseCode]:
        """Yield the codes of ``n_tokens`` tokens at a time, the last of fewer, as views."""
        for first in range(0, self.n_tokens, n_tokens):
            yield self.part(first, first + n_tokens)

    def part(self, first: int, end: int) -> SparseCode:
        """Return the code of the tokens ``first`` to ``end - 1``, as a view; an ``end`` beyond the last token is clipped."""
        start = self.start[first : end + 1]
        entries = slice(int(start[0]), int(start[-1]))
        return SparseCode(self.n_features, start - start[0], self.feature[entries], self.value[entries])

    def decode(self, W_dec: Tensor) -> Tensor:
        """Return ``z @ W_dec`` `[n, d_in]` for a dictionary `[n_features, d_in]`, as sums over the rows of active features."""
        if len(self.feature) == 0:
            return W_dec.new_zeros(self.n_tokens, W_dec.shape[1])
        return F.embedding_bag(self.feature, W_dec, self.start, mode="sum", per_sample_weights=self.value, include_last_offset=True)


def sparse_codes(z: Tensor | SparseCode) -> Iterator[SparseCode]:
    """Yield a code as SparseCodes, in token order; a dense one `[n, n_features]` some rows at a time, so that memory stays bounded.

    Raises ValueError for a tensor of another shape.
    """
    if isinstance(z, SparseCode):
        yield z
        return
    _check_dense(z)
    for rows in z.detach().split(max(1, _ELEMENTS_PER_STEP // z.shape[1])):
        yield SparseCode.from_dense(rows)


def _check_dense(z: Tensor) -> None:
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"feature activations must be [n, n_features] with n_features > 0; got {list(z.shape)}")


def _starts(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))
