"""The TopK training step on the CPU: compiled loops over blocks of tokens and ranges of features, each on one thread of a team.

A thread encodes a block of tokens, selects its features and decodes them while the block's pre-activations are in the cache;
pre-activations of a whole batch are never allocated. One thread sums a feature's gradients over the tokens on which it is active.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels.cpu_topk_encoder import Encoder, bfloat16_pays, select_topk
from saeens_models.kernels.reference import TopKSettings
from saeens_models.kernels.team import Team, blocks_of_tokens
from saeens_models.kernels.weights import BatchLoss, Weights, gradients_of

COMPILED_STEP_MAX_DENSITY = 0.35
"""Share k / d_sae up to which the compiled step is faster than autograd's dense step. Measured with d_sae 768 and 4096."""
_RANGE_PRODUCTS, _MOST_RANGES = 2**19, 64
"""Multiplications per range of features, so that a thread for it pays; and the largest number of ranges."""
_OPERATIONS_PER_SORTED = 32
"""Cost of sorting one entry, in arithmetic operations on cached numbers."""


class TopKCode(NamedTuple):
    """Code and reconstruction of a batch."""

    values: Tensor
    """Entries of the code `[n, k]`; 0 if not active."""
    indices: Tensor
    """Features of the entries, int32 `[n, k]`; -1 if not active."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""


class _Entries(NamedTuple):
    """Memory for the entries of a sparse code `[n, k]` and their gradients, token by token and feature by feature."""

    indices: np.ndarray  # int32
    values: np.ndarray
    error: np.ndarray  # [n, d_in]: the gradient of the decoded code, without its scale
    gradients: np.ndarray  # of the values
    counts: np.ndarray  # int32 [n_blocks, d_sae]: active tokens
    starts: np.ndarray  # int64 [d_sae + 1]: position of each feature's first entry in the arrays below
    ends: np.ndarray  # int64 [n_blocks, d_sae]: position of the next entry of a block and feature, while sorting
    tokens: np.ndarray  # int32 [n * k]: tokens of the entries, sorted by feature, then by token
    by_feature: np.ndarray  # values, in the same order
    gradients_by_feature: np.ndarray  # gradients, in the same order


def topk_gradients(
    team: Team, x: Tensor, weights: Weights, *, dead: Tensor | None = None, aux_coefficient: float = 0.0, **settings: Unpack[TopKSettings]
) -> BatchLoss:
    """Compute the loss of a TopK SAE on ``x`` `[n, d_in]` (float32, contiguous) and its gradients.

    The loss is ``mean ||x_hat - x||^2 + aux_coefficient * mean ||e_hat - (x - x_hat)||^2``, where ``e_hat`` is decoded from the
    ``k_aux`` largest pre-activations among the features ``dead`` (indices, at least one, or None), as in
    :class:`~saeens_models.architectures.topk.TopKSAE`.

    Memory in addition to the result: per thread a block of pre-activations and at most as much for selection; three tensors of the size
    of ``x`` and eight of the size of the code `[n, k]`, and as many more, with `[n, k_aux]`, for dead features; W_enc in bfloat16 if the
    encoder uses it.
    """
    (n, d_in), d_sae, k, compiled = x.shape, len(weights.b_enc), settings["k"], team.compiled
    apply_b_dec_to_input = settings.get("apply_b_dec_to_input", True)
    blocks = blocks_of_tokens(n)
    main = team.kept("entries", _entries, n, d_in, k, d_sae)
    scale = np.float32(2 / n)
    x_hat = torch.empty_like(x)
    x_rows, x_hat_rows, W_dec, b_enc, b_dec = (each.numpy() for each in (x, x_hat, weights.W_dec, weights.b_enc, weights.b_dec))
    centred = team.scratch("centred", n, d_in) if apply_b_dec_to_input else x
    error_sums = team.scratch("sums of errors", len(blocks), d_in).numpy()
    centred_rows = centred.numpy()
    revived = None
    if dead is not None:
        k_aux = min(settings.get("k_aux", 1), len(dead))
        entries_of_dead = team.kept("entries of dead features", _entries, n, d_in, k_aux, d_sae)
        features = dead.to(torch.int32).numpy()
        revived = entries_of_dead, np.float32(aux_coefficient * 2 / n), features, weights.W_enc[dead], b_enc[features]
    encoder = Encoder(team, weights, rough=bfloat16_pays(n, weights))

    def forward(i: int) -> tuple[float, float]:
        rows = blocks[i]
        if apply_b_dec_to_input:
            compiled.subtract(x_rows[rows], b_dec, centred_rows[rows])
        indices, values, error, gradients = (each[rows] for each in main[:4])
        encoder.encode(centred[rows], indices, values)
        found = x_hat_rows[rows], error, gradients, main.counts[i], error_sums[i]
        squares: float = compiled.reconstruct(indices, values, W_dec, b_dec, x_rows[rows], scale, *found)
        if revived is None:
            return squares, 0.0
        entries, scale_of_dead, features, W_enc_of_dead, b_enc_of_dead = revived
        code = (*(each[rows] for each in entries[:4]), entries.counts[i])
        select_topk(team, torch.mm(centred[rows], W_enc_of_dead.t()), b_enc_of_dead, code[0], code[1])
        return squares, compiled.reconstruct_error(features, W_dec, error, scale_of_dead, *code)

    sums = team.run(forward, len(blocks))
    mse, auxiliary = (sum(parts) / n for parts in zip(*sums, strict=True))
    codes = [(main, scale)] if revived is None else [(main, scale), revived[:2]]
    gradients = _gradients(team, codes, blocks, centred_rows, weights, centres=apply_b_dec_to_input)
    gradients.b_dec.add_(torch.from_numpy(error_sums.sum(axis=0)), alpha=float(scale))
    terms = torch.tensor(mse, dtype=torch.float32), torch.tensor(aux_coefficient * auxiliary, dtype=torch.float32)
    return BatchLoss(*terms, x_hat, torch.from_numpy(main.counts.sum(axis=0)), gradients)


def topk_reconstruct(team: Team, x: Tensor, weights: Weights, *, k: int, apply_b_dec_to_input: bool) -> TopKCode:
    """Encode and decode ``x`` `[n, d_in]` (float32, contiguous) with a TopK SAE.

    Memory in addition to the result: a block of pre-activations per thread.
    """
    blocks = blocks_of_tokens(len(x))
    indices, values, x_hat = np.empty((len(x), k), np.int32), np.empty((len(x), k), np.float32), torch.empty_like(x)
    W_dec = weights.W_dec.numpy()
    encoder = Encoder(team, weights, rough=bfloat16_pays(len(x), weights))

    def forward(i: int) -> None:
        rows = blocks[i]
        given = torch.sub(x[rows], weights.b_dec) if apply_b_dec_to_input else x[rows]
        encoder.encode(given, indices[rows], values[rows])
        team.compiled.relu(values[rows], indices[rows])
        x_hat[rows] = weights.b_dec
        team.compiled.decode(indices[rows], values[rows], W_dec, x_hat[rows].numpy())

    team.run(forward, len(blocks))
    return TopKCode(torch.from_numpy(values), torch.from_numpy(indices), x_hat)


def _entries(team: Team, name: str, *shape: int) -> _Entries:
    n, d_in, k, d_sae = shape

    def part(part: str, *shape: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
        return team.scratch(f"{part} of {name}", *shape, dtype=dtype).numpy()

    n_blocks = len(blocks_of_tokens(n))
    return _Entries(
        indices=part("indices", n, k, dtype=torch.int32),
        values=part("values", n, k),
        error=part("error", n, d_in),
        gradients=part("gradients", n, k),
        counts=part("counts", n_blocks, d_sae, dtype=torch.int32),
        starts=part("starts", d_sae + 1, dtype=torch.int64),
        ends=part("ends", n_blocks, d_sae, dtype=torch.int64),
        tokens=part("tokens", n * k, dtype=torch.int32),
        by_feature=part("values by feature", n * k),
        gradients_by_feature=part("gradients by feature", n * k),
    )


def _gradients(
    team: Team, codes: Sequence[tuple[_Entries, np.float32]], blocks: Sequence[slice], x: np.ndarray, weights: Weights, *, centres: bool
) -> Weights:
    """Compute the gradients of the weights, summed over the entries of all codes; b_dec's only through the centred input."""
    gradients = gradients_of(team, weights)
    W_enc, b_enc, W_dec, _ = (gradient.numpy() for gradient in gradients)
    W = weights.W_enc.numpy()
    for entries, _ in codes:
        _sort_by_feature(team, entries, blocks)
    ranges = _ranges(np.sum([entries.starts for entries, _ in codes], axis=0), x.shape[1])
    of_mean = np.zeros((len(ranges), x.shape[1] if centres else 0), np.float32)

    def backward(i: int) -> None:
        first, last = ranges[i]
        for number, (each, scale) in enumerate(codes):
            add = number > 0
            sorted_entries = each.starts, each.tokens, each.by_feature, each.gradients_by_feature
            team.compiled.weight_gradients(*sorted_entries, x, each.error, scale, first, last, add, W, W_enc, b_enc, W_dec, of_mean[i])

    team.run(backward, len(ranges))
    gradients.b_dec.copy_(torch.from_numpy(of_mean.sum(axis=0))) if centres else gradients.b_dec.zero_()
    return gradients


def _sort_by_feature(team: Team, code: _Entries, blocks: Sequence[slice]) -> None:
    """Sort the entries by feature, with a counting sort: counts of earlier blocks give the positions of a block's entries."""
    team.compiled.first_places(code.counts, code.starts, code.ends)

    def sort(i: int) -> None:
        rows = blocks[i]
        entries = code.indices[rows], code.values[rows], code.gradients[rows]
        team.compiled.sort_by_feature(*entries, rows.start, code.ends[i], code.tokens, code.by_feature, code.gradients_by_feature)

    team.run(sort, len(blocks), work=_OPERATIONS_PER_SORTED * code.indices.size)


def _ranges(starts: np.ndarray, d_in: int) -> list[tuple[int, int]]:
    """Return ranges of features with about the same work, counted in entries and rows."""
    n_ranges = min(max((int(starts[-1]) + len(starts)) * d_in // _RANGE_PRODUCTS, 1), _MOST_RANGES)
    if n_ranges == 1:
        return [(0, len(starts) - 1)]
    work = starts + np.arange(len(starts))
    edges = np.searchsorted(work, np.linspace(0, work[-1], n_ranges + 1))
    return [(int(first), int(last)) for first, last in pairwise(edges) if first < last]
