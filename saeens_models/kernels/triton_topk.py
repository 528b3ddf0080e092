"""The three Triton kernels of a TopK training step, each behind a function of torch tensors: select, sum rows, multiply rows.

Everything after the encoder gathers rows and sums: decoding sums the decoder rows of a token's features, the gradient of a feature's
weights sums the rows of its tokens, the gradient of a code's entry is a product of two rows. No kernel uses atomics, and every sum has
a fixed order, so the same input gives the same bits. Sums are in float32.
"""

# Triton is not available on every platform, and type checkers do not understand functions decorated by it.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeens_models.kernels.reference import TopK

MOST_CANDIDATES = 16384
"""Largest number of candidates that one program holds in registers, 16 per thread; longer rows are cut into parts."""
_TILE_ROWS, _TILE_COLUMNS = 16, 128
_WARP_ENTRIES = 512


@triton.jit
def _order_preserving(bits):
    """Map the bits of a float32 to an int32 of the same order, and back: the map is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["k", "n_rows"])
def select_topk_kernel(pre, bias, columns, values, places, row_stride, n_rows, n_columns, n_candidates, k, width, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_column = row // n_rows * n_columns
    offsets = tl.arange(0, BLOCK)
    place = part * width + offsets
    inside = (offsets < width) & (place < n_candidates)
    column = place if columns is None else tl.load(columns + place, mask=inside, other=0)
    value = tl.load(pre + row * row_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + first_column + column, mask=inside, other=0.0)
    key = _order_preserving(value.to(tl.int32, bitcast=True))
    key = tl.where(value == value, key, 0x7FFFFFFF)  # noqa: PLR0124 - NaN is selected, so that the loss shows it

    # The largest key that at least k keys reach, bit by bit from the sign; any key that exactly k reach will do.
    kth = tl.full([], -0x80000000, tl.int32)
    bit = tl.full([], -0x80000000, tl.int32)
    n_reaching = tl.full([], 0, tl.int32)
    while (bit != 0) & (n_reaching != k):
        raised = kth ^ bit
        n_reaching = tl.sum((key >= raised).to(tl.int32))
        kth = tl.where(n_reaching >= k, raised, kth)
        bit = (bit >> 1) & 0x7FFFFFFF

    # Larger keys are selected, and the first of equal ones. One scan counts both from the left, with 16 bits each.
    larger, equal = key > kth, key == kth
    n_equal = k - tl.sum(larger.to(tl.int32))
    counts = tl.cumsum(larger.to(tl.int32) + (equal.to(tl.int32) << 16))
    selected = larger | (equal & ((counts >> 16) <= n_equal))
    first = (row * tl.num_programs(1) + part) * k
    to = (counts & 0xFFFF) + tl.minimum(counts >> 16, n_equal) - 1
    tl.store(values + first + to, _order_preserving(key).to(tl.float32, bitcast=True), mask=selected)
    tl.store(places + first + to, first_column + place, mask=selected)


@triton.jit
def sum_rows_kernel(sums, totals, rows, which, weights, starts, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    weight_sums = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, ROWS):
        entry = start + tl.arange(0, ROWS)
        inside = entry < last
        row = tl.load(which + entry, mask=inside, other=0)
        weight = tl.load(weights + entry, mask=inside, other=0.0)
        tile = tl.load(rows + row[:, None] * d + column[None, :], mask=inside[:, None] & (column < d)[None, :], other=0.0)
        products += weight[:, None] * tile
        weight_sums += weight
    to = sums + segment * d + column
    tl.store(to, tl.load(to, mask=column < d) + tl.sum(products, axis=0), mask=column < d)
    if totals is not None:  # noqa: SIM102 - decided at compile time
        if tl.program_id(1) == 0:
            tl.store(totals + segment, tl.sum(weight_sums))


@triton.jit(do_not_specialize=["k"])
def multiply_rows_kernel(products, left, right, which, k, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = entry < k
    row = tl.load(which + token * k + entry, mask=inside, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        tile = tl.load(right + row[:, None] * d + column[None, :], mask=inside[:, None] & (column < d)[None, :], other=0.0)
        total += tile * tl.load(left + token * d + column, mask=column < d, other=0.0)[None, :]
    tl.store(products + token * k + entry, tl.sum(total, axis=1), mask=inside)


def select_topk(pre: Tensor, k: int, bias: Tensor | None = None, columns: Tensor | None = None) -> TopK:
    """Return exactly the k largest entries of each row of ``pre + bias``, by position; of equal ones the first (-0.0 is below 0.0).

    ``pre`` is `[n, m]`, float32 or bfloat16, ``bias`` `[m]` float32. With ``columns`` `[c]` only those of the m are candidates,
    and indices are positions in ``columns``. ``2 k`` may not exceed ``MOST_CANDIDATES``.

    ``pre`` may also be J matrices, `[J, n, m]`, contiguous, with ``bias`` `[J, m]` and without ``columns``. The result is then
    `[J, n, k]`, and indices count the columns of all matrices: column i of matrix j is ``j m + i``.
    """
    *matrices, n_rows, n_columns = pre.shape
    n, n_candidates = pre.numel() // n_columns, n_columns if columns is None else len(columns)
    n_parts = triton.cdiv(n_candidates, MOST_CANDIDATES)
    width = triton.cdiv(n_candidates, n_parts)
    values = torch.empty(*matrices, n_rows, n_parts * k, dtype=torch.float32, device=pre.device)
    places = torch.empty(*matrices, n_rows, n_parts * k, dtype=torch.int64, device=pre.device)
    block = triton.next_power_of_2(max(width, k))
    n_warps = min(max(block // _WARP_ENTRIES, 4), 32)
    sizes = pre.stride(-2), n_rows, n_columns, n_candidates, k, width
    select_topk_kernel[n, n_parts](pre, bias, columns, values, places, *sizes, BLOCK=block, num_warps=n_warps)
    if n_parts == 1:
        return TopK(values, places)
    chosen = select_topk(values.view(n, -1), k)
    return TopK(chosen.values.view(*matrices, n_rows, k), places.view(n, -1).gather(1, chosen.indices).view(*matrices, n_rows, k))


def sum_rows(sums: Tensor, rows: Tensor, which: Tensor, weights: Tensor, starts: Tensor, *, totals: Tensor | None = None) -> Tensor:
    """Add ``sum(weights[e] * rows[which[e]])`` to ``sums[s]``, over the entries e from ``starts[s]`` up to ``starts[s + 1]``.

    ``sums`` is `[s, d]`, changed and returned; ``rows`` `[m, d]`; ``which`` (int64) and ``weights`` have one number per entry; ``starts``
    `[s + 1]` int64. ``totals`` `[s]` gets the sums of the weights. All are contiguous; s and m may each stand for several dimensions.
    """
    d = rows.shape[-1]
    grid = (len(starts) - 1, triton.cdiv(d, _TILE_COLUMNS))
    sum_rows_kernel[grid](sums, totals, rows, which, weights, starts, d, ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS)
    return sums


def multiply_rows(left: Tensor, right: Tensor, which: Tensor) -> Tensor:
    """Return ``left[n] . right[which[n, i]]`` for each entry of ``which`` `[n, k]` (int64); ``left`` is `[n, d]`, ``right`` `[m, d]`.

    All are contiguous; n and m may each stand for several dimensions.
    """
    k, d = which.shape[-1], left.shape[-1]
    products = torch.empty(which.shape, dtype=torch.float32, device=left.device)
    grid = (which.numel() // k, triton.cdiv(k, _TILE_ROWS))
    multiply_rows_kernel[grid](products, left, right, which, k, d, ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS)
    return products
