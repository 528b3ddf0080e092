"""The TopK training step on the CPU: compiled loops over blocks of tokens and ranges of features, each on one thread of a team.

A block of tokens is encoded, its features are selected and decoded while its pre-activations are in the cache; those of a whole batch
never exist. The gradients of a feature's weights are summed by one thread over the tokens that it is active on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels.cpu_revival import DenseRevival
from saeens_models.kernels.reference import SPARSE_BELOW
from saeens_models.kernels.team import Team

_BLOCK_TOKENS = 64, 256
"""Fewest and most tokens of a block: a product of fewer rows is slow, and the pre-activations of more leave the cache."""
_RANGE_PRODUCTS, _MOST_RANGES = 2**19, 64
"""Multiplications that a range of features should be worth, for a thread to be sent there; and into how many ranges at most."""
_ROUNDED_FEATURES = 512
"""How many features' weights are rounded to bfloat16 at a time."""
_ROUGH_PRODUCTS = 2**26
"""From how many multiplications of an encoder on bfloat16 is worth the second look. Measured: the whole step is 1.05 times faster there,
1.2 to 1.6 times from eight times as many on."""


class Weights(NamedTuple):
    """The weights of an SAE, or their gradients, as they lie in memory."""

    W_enc: Tensor
    """`[d_sae, d_in]`: feature by feature."""
    b_enc: Tensor
    """`[d_sae]`"""
    W_dec: Tensor
    """`[d_sae, d_in]`"""
    b_dec: Tensor
    """`[d_in]`"""


class TopKLoss(NamedTuple):
    """What a batch costs, and what was found on the way."""

    mse: Tensor
    """Scalar: squared error summed over d_in, mean over tokens."""
    auxiliary: Tensor
    """Scalar: the auxiliary loss of the dead features, with its coefficient."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""
    fire_counts: Tensor
    """In how many tokens each feature is active, `[d_sae]`."""
    gradients: Weights


class TopKCode(NamedTuple):
    """What some tokens are encoded to, and decoded again."""

    values: Tensor
    """The entries of the code `[n, k]`; those that are not active are 0."""
    indices: Tensor
    """Their features, int32 `[n, k]`; -1 where not active."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""


class _Entries(NamedTuple):
    """The entries of a sparse code `[n, k]`, and what the loss says of them."""

    indices: np.ndarray  # int32
    values: np.ndarray
    error: np.ndarray  # [n, d_in]: the gradient of what the code decodes to, but for scale
    gradients: np.ndarray
    counts: np.ndarray  # int32 [n_blocks, d_sae]: active tokens
    scale: np.float32


class _Revived(NamedTuple):
    """The dead features that the auxiliary loss may revive."""

    entries: _Entries
    features: np.ndarray  # int32 [n_dead]
    W_enc: Tensor  # [n_dead, d_in]
    b_enc: Tensor  # [n_dead]


def topk_gradients(
    team: Team,
    x: Tensor,
    weights: Weights,
    *,
    k: int,
    apply_b_dec_to_input: bool,
    dead: Tensor | None = None,
    k_aux: int = 1,
    aux_coefficient: float = 0.0,
) -> TopKLoss:
    """The loss of a TopK SAE on ``x`` `[n, d_in]` (float32, contiguous) and its gradients.

    The loss is ``mean ||x_hat - x||^2 + aux_coefficient * mean ||e_hat - (x - x_hat)||^2``, where ``e_hat`` is decoded from the
    ``k_aux`` largest pre-activations among the features ``dead`` (indices, at least one, or None), as in
    :class:`~saeens_models.architectures.topk.TopKSAE`. Memory beside the result: a block of pre-activations per thread, four tensors
    of the size of ``x`` or of the code, and with few dead features, fewer than ``k_aux / 0.15``, what :class:`DenseRevival` says.
    """
    from saeens_models.kernels import compiled

    n, d_in = x.shape
    blocks = blocks_of_tokens(n)
    centred = team.scratch("centred", n, d_in) if apply_b_dec_to_input else x
    main = _entries(team, "main", x, k=k, d_sae=len(weights.b_enc), n_blocks=len(blocks), scale=2 / n)
    revived, dense = None, None
    scale, k_aux = 2 / n * aux_coefficient, k_aux if dead is None else min(k_aux, len(dead))
    if dead is not None and k_aux > SPARSE_BELOW["cpu"] * len(dead):
        dense = DenseRevival(team, weights, dead, k=k_aux, n_tokens=n, scale=scale)
    elif dead is not None:
        entries = _entries(team, "revived", x, k=k_aux, d_sae=len(weights.b_enc), n_blocks=len(blocks), scale=scale)
        revived = _Revived(entries, dead.to(torch.int32).numpy(), weights.W_enc[dead], weights.b_enc[dead])
    W_dec, b_dec = weights.W_dec.numpy(), weights.b_dec.numpy()
    x_hat = torch.empty_like(x)
    x_rows, x_hat_rows = x.numpy(), x_hat.numpy()
    errors = torch.from_numpy(main.error)
    encoder = Encoder(team, weights, rough=_bfloat16_pays(n, weights))

    def forward(i: int) -> tuple[float, float]:
        rows = blocks[i]
        indices, values, error, gradients = (each[rows] for each in main[:4])
        if apply_b_dec_to_input:
            torch.sub(x[rows], weights.b_dec, out=centred[rows])
        encoder.encode(centred[rows], indices, values)
        squares = compiled.reconstruct(
            indices, values, W_dec, b_dec, x_rows[rows], main.scale, x_hat_rows[rows], error, gradients, main.counts[i]
        )
        if dense is not None:
            return squares, dense.forward(rows, centred[rows], errors[rows])
        if revived is None:
            return squares, 0.0
        indices, values, error_of_dead, gradients = (each[rows] for each in revived.entries[:4])
        pre = torch.mm(centred[rows], revived.W_enc.t()).numpy()
        compiled.select_topk(pre, revived.b_enc.numpy(), indices.shape[1], indices, values)
        indices[:] = revived.features[indices]
        squares_of_dead = compiled.reconstruct_error(
            indices, values, W_dec, error, revived.entries.scale, error_of_dead, gradients, revived.entries.counts[i]
        )
        return squares, squares_of_dead

    mse, auxiliary = np.array(team.run(forward, len(blocks))).sum(axis=0) / n
    gradients = gradients_of(team, weights)
    tasks = [] if dense is None else [partial(dense.backward, features, centred) for features in dense.ranges]
    tasks += _backward(team, [main] if revived is None else [main, revived.entries], blocks, centred.numpy(), gradients)
    team.run(lambda i: tasks[i](), len(tasks))
    if dense is not None:
        dense.add_to(gradients)
    decoder_bias_gradient(gradients, weights, errors, float(main.scale), apply_b_dec_to_input)
    return TopKLoss(
        mse=torch.tensor(mse, dtype=torch.float32),
        auxiliary=torch.tensor(aux_coefficient * auxiliary, dtype=torch.float32),
        x_hat=x_hat,
        fire_counts=torch.from_numpy(main.counts.sum(axis=0)),
        gradients=gradients,
    )


def topk_reconstruct(team: Team, x: Tensor, weights: Weights, *, k: int, apply_b_dec_to_input: bool) -> TopKCode:
    """Encode and decode ``x`` `[n, d_in]` (float32, contiguous) with a TopK SAE. Memory: a block of pre-activations per thread."""
    from saeens_models.kernels import compiled

    blocks = blocks_of_tokens(len(x))
    indices, values, x_hat = np.empty((len(x), k), np.int32), np.empty((len(x), k), np.float32), torch.empty_like(x)
    W_dec = weights.W_dec.numpy()
    encoder = Encoder(team, weights, rough=_bfloat16_pays(len(x), weights))

    def forward(i: int) -> None:
        rows = blocks[i]
        given = torch.sub(x[rows], weights.b_dec) if apply_b_dec_to_input else x[rows]
        encoder.encode(given, indices[rows], values[rows])
        x_hat[rows] = weights.b_dec
        compiled.decode(indices[rows], values[rows], W_dec, x_hat[rows].numpy())

    team.run(forward, len(blocks))
    return TopKCode(torch.from_numpy(values), torch.from_numpy(indices), x_hat)


class Encoder:
    """Encodes blocks of tokens. `rough`: pre-activations in bfloat16, after which the largest are found out exactly in float32."""

    def __init__(self, team: Team, weights: Weights, rough: bool) -> None:
        self._team, self._weights = team, weights
        self._W_rough: Tensor | None = None
        if rough:
            from saeens_models.kernels import compiled

            W_enc = weights.W_enc
            W_rough = self._W_rough = team.scratch("rough W_enc", *W_enc.shape, dtype=torch.bfloat16)

            def prepare(i: int) -> tuple[float, float]:
                features = slice(i * _ROUNDED_FEATURES, (i + 1) * _ROUNDED_FEATURES)
                W_rough[features] = W_enc[features]
                return compiled.largest_norms(W_enc[features].numpy(), _bits(W_rough[features]))

            norms = team.run(prepare, -(-len(W_enc) // _ROUNDED_FEATURES), work=4 * W_enc.numel())
            self._norm, self._rounding = np.max(norms, axis=0).astype(np.float32)
            self._summation = np.float32(2 * W_enc.shape[1] * np.finfo(np.float32).eps)

    def encode(self, x: Tensor, indices: np.ndarray, values: np.ndarray) -> None:
        """Write the code of a block of tokens, `[n, k]`."""
        from saeens_models.kernels import compiled

        (W_enc, b_enc, *_), k = self._weights, indices.shape[1]
        shape = len(x), len(b_enc)
        if self._W_rough is None:
            pre = torch.mm(x, W_enc.t(), out=self._team.scratch("pre-activations", *shape))
            compiled.select_topk(pre.numpy(), b_enc.numpy(), k, indices, values)
        else:
            x_rough, rough = (
                self._team.scratch(name, *size, dtype=torch.bfloat16) for name, size in (("rough x", x.shape), ("rough pre", shape))
            )
            torch.mm(x_rough.copy_(x), self._W_rough.t(), out=rough)
            compiled.select_topk_exactly(
                _bits(rough), b_enc.numpy(), x.numpy(), _bits(x_rough), W_enc.numpy(),
                self._norm, self._rounding, self._summation, k, indices, values,
            )  # fmt: skip
        compiled.relu(values, indices)


def _bits(rough: Tensor) -> np.ndarray:
    """Of bfloat16, which numpy does not know."""
    return rough.view(torch.uint16).numpy()


def _bfloat16_pays(n_tokens: int, weights: Weights) -> bool:
    return n_tokens * weights.W_enc.numel() >= _ROUGH_PRODUCTS and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32. Looked up, not timed: a result must not depend on its load."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def gradients_of(team: Team, weights: Weights) -> Weights:
    """Memory for the gradients of all weights: of the team, so that those of the next SAE take their place. Undefined content."""
    return Weights(*(team.scratch(f"gradient of {name}", *weight.shape) for name, weight in weights._asdict().items()))


def decoder_bias_gradient(gradients: Weights, weights: Weights, error: Tensor, scale: float, apply_b_dec_to_input: bool) -> None:
    """Write the gradient of b_dec, which x_hat is moved by, and the input that is encoded, where b_dec is subtracted from it."""
    torch.sum(error, dim=0, out=gradients.b_dec).mul_(scale)
    if apply_b_dec_to_input:
        gradients.b_dec.addmv_(weights.W_enc.t(), gradients.b_enc, alpha=-1)


def blocks_of_tokens(n_tokens: int) -> list[slice]:
    """A batch in blocks, one of which a thread works on at a time. It does not depend on the threads: nor do the bits of a result."""
    fewest, most = _BLOCK_TOKENS
    size = min(max(-(-n_tokens // 2), fewest), most)
    return [slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size)]


def _entries(team: Team, name: str, x: Tensor, *, k: int, d_sae: int, n_blocks: int, scale: float) -> _Entries:
    def scratch(part: str, *shape: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
        return team.scratch(f"{name} {part}", *shape, dtype=dtype).numpy()

    n = len(x)
    return _Entries(
        indices=scratch("indices", n, k, dtype=torch.int32),
        values=scratch("values", n, k),
        error=scratch("error", *x.shape),
        gradients=scratch("gradients", n, k),
        counts=scratch("counts", n_blocks, d_sae, dtype=torch.int32),
        scale=np.float32(scale),
    )


def _backward(
    team: Team, codes: Sequence[_Entries], blocks: Sequence[slice], x: np.ndarray, gradients: Weights
) -> list[Callable[[], None]]:
    """Tasks that write the gradients of the weights, but for b_dec's: of each feature, the sum over its entries in all codes."""
    from saeens_models.kernels import compiled

    W_enc, b_enc, W_dec, _ = (gradient.numpy() for gradient in gradients)
    by_feature = [_sort_by_feature(team, i, code, blocks) for i, code in enumerate(codes)]
    ranges = _ranges(np.sum([each.starts for each in by_feature], axis=0), x.shape[1])

    def backward(first: int, last: int) -> None:
        for number, (each, code) in enumerate(zip(by_feature, codes, strict=True)):
            add = number > 0
            compiled.weight_gradients(*each, x, code.error, code.scale, first, last, add, W_enc, b_enc, W_dec)

    return [partial(backward, *features) for features in ranges]


class _ByFeature(NamedTuple):
    """The entries of a code, those of each feature together and in the order of the tokens."""

    starts: np.ndarray  # int64 [d_sae + 1]
    tokens: np.ndarray  # int32 [nnz]
    values: np.ndarray
    gradients: np.ndarray


def _sort_by_feature(team: Team, number: int, code: _Entries, blocks: Sequence[slice]) -> _ByFeature:
    """A counting sort: each block knows from the counts of the blocks before it where its entries go."""
    from saeens_models.kernels import compiled

    n_blocks, d_sae = code.counts.shape
    starts, ends = np.empty(d_sae + 1, np.int64), np.empty((n_blocks, d_sae), np.int64)
    compiled.first_places(code.counts, starts, ends)
    tokens, values, gradients = (
        team.scratch(f"{part} of code {number}, by feature", int(starts[-1]), dtype=dtype).numpy()
        for part, dtype in (("tokens", torch.int32), ("values", torch.float32), ("gradients", torch.float32))
    )

    def sort(i: int) -> None:
        rows = blocks[i]
        compiled.sort_by_feature(
            code.indices[rows], code.values[rows], code.gradients[rows], rows.start, ends[i], tokens, values, gradients
        )

    team.run(sort, len(blocks), work=4 * len(tokens))
    return _ByFeature(starts, tokens, values, gradients)


def _ranges(starts: np.ndarray, d_in: int) -> list[tuple[int, int]]:
    """Ranges of features with about the same work each: their entries, and their own rows."""
    n_ranges = min(max((int(starts[-1]) + len(starts)) * d_in // _RANGE_PRODUCTS, 1), _MOST_RANGES)
    if n_ranges == 1:
        return [(0, len(starts) - 1)]
    work = starts + np.arange(len(starts))
    edges = np.searchsorted(work, np.linspace(0, work[-1], n_ranges + 1))
    return [(int(first), int(last)) for first, last in pairwise(edges) if first < last]
