"""The training step of JumpReLU and ReLU (threshold 0) SAEs on the CPU: five dense products, cut into blocks for a team of threads.

Autograd computes a sixth product, the gradient of the input, and passes over all codes for each operation in between. Here codes and
their gradients lie feature by feature, block of tokens by block: contiguous, as the first factor of their products. In a block with
few active features only the entries of those are decoded and differentiated, which leaves the encoder's product: the main cost of a
step once an SAE is sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels import products
from saeens_models.kernels.team import Team, blocks_of_tokens
from saeens_models.kernels.weights import BatchLoss, Weights, gradients_of

SPARSE_BLOCK_MAX_DENSITY = 0.1
"""Share of non-zero codes in a block below which its entries are processed one by one. Measured with d_in 384 and d_sae 4096 on two cores
of a Xeon: a step is 2.7 times faster at 0.02, 1.9 times at 0.1, and as fast at 0.17; the limit is lower where products are faster."""
_RANGE_FEATURES = 256, 2048
"""Fewest and most features of a range for which one thread computes gradients."""


class JumpReLULoss(NamedTuple):
    """Loss of a batch and its gradients, also those of the thresholds."""

    of_weights: BatchLoss
    """Loss and the gradients of the weights; the second term is the sparsity term."""
    threshold_gradient: Tensor
    """`[d_sae]`"""
    near: Tensor | None
    """Number of tokens from which each threshold learns, `[d_sae]`; None unless it was asked for."""


def jumprelu_gradients(
    team: Team,
    x: Tensor,
    weights: Weights,
    threshold: Tensor,
    *,
    apply_b_dec_to_input: bool,
    l1_coefficient: float = 0.0,
    l0_coefficient: float = 0.0,
    bandwidth: float = 0.0,
    count_near: bool = False,
) -> JumpReLULoss:
    """Compute the loss of an SAE with code ``z = pre * (pre > threshold)`` on ``x`` `[n, d_in]` (float32, contiguous) and its gradients.

    The loss is ``mean ||x_hat - x||^2 + l1_coefficient * mean sum_i z_i ||W_dec_i|| + l0_coefficient * mean sum_i [z_i active]``.
    ``threshold`` `[d_sae]` learns from pre-activations within half a ``bandwidth`` of it, as in
    :class:`~saeens_models.architectures.jumprelu.JumpReLUSAE`; ``count_near`` counts these.

    Memory in addition to the result: the codes of the batch and their gradients, ``2 n d_sae``; a copy of W_dec; three blocks of
    pre-activations per thread; and W_enc and W_dec in bfloat16 if products are in bfloat16.
    """
    compiled, (n, d_in) = team.compiled, x.shape
    blocks = blocks_of_tokens(n)
    memory = _Memory.of(team, blocks, d_in, len(threshold))
    centred = team.scratch("centred", n, d_in) if apply_b_dec_to_input else x
    x_hat = torch.empty_like(x)
    norms = weights.W_dec.norm(dim=1)
    of_code = (l1_coefficient / n * norms).numpy()
    scale, of_activity, half_bandwidth = np.array([2 / n, l0_coefficient / n, bandwidth / 2], np.float32)
    settings = scale, of_code, half_bandwidth, of_activity
    linear = partial(products.linear, in_bfloat16=team.in_bfloat16)
    W_enc, directions = ((W.bfloat16() if team.in_bfloat16 else W) for W in (weights.W_enc, weights.W_dec))
    by_dimension = _Transposed(team, directions)
    b_enc, W_dec, b_dec = (weight.numpy() for weight in weights[1:])
    sparse: dict[int, _Entries] = {}  # by block
    near = np.zeros((len(blocks), len(threshold)), np.int32) if count_near else None

    def forward(i: int) -> float:
        rows = blocks[i]
        z, of_pre, sums, fires, counts, starts, of_b_enc, of_threshold = memory.block(i)
        if apply_b_dec_to_input:
            torch.sub(x[rows], weights.b_dec, out=centred[rows])
        pre = linear(W_enc, centred[rows]).numpy()
        n_entries = compiled.jumprelu(pre, b_enc, threshold.numpy(), half_bandwidth, z.numpy(), sums, fires, counts)
        if near is not None:
            compiled.count_near(pre, threshold.numpy(), half_bandwidth, near[i])
        error = memory.error[rows]
        compared = x[rows].numpy(), x_hat[rows].numpy(), error.numpy()
        if n_entries < SPARSE_BLOCK_MAX_DENSITY * pre.size:
            sparse[i] = _Entries.within(of_pre, starts, n_entries)
            _, tokens, values, gradients = sparse[i]
            compiled.list_entries(pre, z.numpy(), threshold.numpy(), half_bandwidth, counts, starts, tokens, values)
            squares: float = compiled.decode_entries(starts, tokens, values, W_dec, b_dec, *compared)
            of_entries = starts, tokens, error.numpy(), W_dec
            compiled.entry_gradients(pre, threshold.numpy(), *of_entries, *settings, gradients, of_b_enc, of_threshold)
        else:
            squares = compiled.compare(linear(by_dimension.matrix(), z.t()).numpy(), b_dec, *compared)
            of_z = linear(directions, error).numpy()
            compiled.jumprelu_gradients(pre, threshold.numpy(), of_z, *settings, of_pre.numpy(), of_b_enc, of_threshold)
        return squares

    mse = sum(team.run(forward, len(blocks))) / n
    sums = torch.from_numpy(memory.sums.sum(axis=0))
    of_norms = sums * (l1_coefficient / n) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    gradients = _gradients(team, memory, sparse, weights, centred, of_norms if l1_coefficient else None, float(scale))
    if apply_b_dec_to_input:
        gradients.b_dec.addmv_(weights.W_enc.t(), gradients.b_enc, alpha=-1)
    fire_counts = torch.from_numpy(memory.fires.sum(axis=0))
    sparsity = l1_coefficient / n * float(sums @ norms) + l0_coefficient / n * int(fire_counts.sum())
    terms = torch.tensor(mse, dtype=torch.float32), torch.tensor(sparsity, dtype=torch.float32)
    of_threshold, n_near = torch.from_numpy(memory.of_threshold.sum(axis=0)), None if near is None else torch.from_numpy(near.sum(axis=0))
    return JumpReLULoss(BatchLoss(*terms, x_hat, fire_counts, gradients), of_threshold, n_near)


def _gradients(  # noqa: PLR0917 - called once
    team: Team, memory: _Memory, sparse: Mapping[int, _Entries], weights: Weights, x: Tensor, of_norms: Tensor | None, scale: float
) -> Weights:
    """Compute the gradients of the weights from the gradients of the pre-activations, from ``x`` and from the error.

    The gradient of b_dec has its decoder part, and with ``apply_b_dec_to_input`` not yet its part through the encoder.
    ``of_norms`` `[d_sae]`: gradients of W_dec's norms, divided by the norms; None without an L1 term.
    """
    gradients, d_sae = gradients_of(team, weights), len(weights.b_enc)
    gradients.b_enc.copy_(torch.from_numpy(memory.of_b_enc.sum(axis=0)))
    whole_W_enc, whole_W_dec = gradients.W_enc.numpy(), gradients.W_dec.numpy()
    fewest, most = _RANGE_FEATURES
    size = min(max(-(-d_sae // 8), fewest), most)

    def backward(i: int) -> None:
        features = slice(i * size, min((i + 1) * size, d_sae))
        W_enc, W_dec = gradients.W_enc[features], gradients.W_dec[features]
        for number, rows in enumerate(blocks_of_tokens(len(x))):
            per_token = x[rows], memory.error[rows]
            if number in sparse:
                to = whole_W_enc, whole_W_enc, memory.ignored, whole_W_dec, np.empty(0, np.float32)
                of_tokens = (each.numpy() for each in per_token)
                add = number > 0
                team.compiled.weight_gradients(*sparse[number], *of_tokens, np.float32(1), features.start, features.stop, add, *to)
                continue
            for gradient, code, of_token in zip((W_enc, W_dec), (memory.of_pre[number], memory.z[number]), per_token, strict=True):
                product = products.linear(code[features], of_token.t(), in_bfloat16=team.in_bfloat16)
                gradient.copy_(product) if number == 0 else gradient.add_(product)
        W_dec.mul_(scale)
        if of_norms is not None:
            W_dec.addcmul_(weights.W_dec[features], of_norms[features, None])

    team.run(backward, -(-d_sae // size))
    torch.sum(memory.error, dim=0, out=gradients.b_dec).mul_(scale)
    return gradients


class _Memory(NamedTuple):
    """Memory for the results of a batch. The last two fields exist once, the others once per block of tokens."""

    z: list[Tensor]  # [d_sae, tokens]
    of_pre: list[Tensor]  # [d_sae, tokens]: gradients of pre-activations; in a sparse block memory for its entries
    sums: np.ndarray  # [d_sae], like all below: sums of z
    fires: np.ndarray  # int32: active tokens
    counts: np.ndarray  # int32: tokens that contribute to a gradient
    starts: np.ndarray  # int64 [d_sae + 1]: position of each feature's first entry, in a sparse block
    of_b_enc: np.ndarray
    of_threshold: np.ndarray
    error: Tensor  # [n, d_in]
    ignored: np.ndarray  # [d_sae]: gradients of b_enc that a kernel writes once more

    @classmethod
    def of(cls, team: Team, blocks: Sequence[slice], d_in: int, d_sae: int) -> _Memory:
        n = blocks[-1].stop

        def by_block(name: str) -> list[Tensor]:
            memory = team.scratch(name, n * d_sae)
            return [memory[rows.start * d_sae : rows.stop * d_sae].view(d_sae, -1) for rows in blocks]

        def by_feature(name: str, size: int = d_sae, dtype: torch.dtype = torch.float32) -> np.ndarray:
            return team.scratch(name, len(blocks), size, dtype=dtype).numpy()

        return cls(
            z=by_block("z"),
            of_pre=by_block("gradient of pre"),
            sums=by_feature("sums"),
            fires=by_feature("fires", dtype=torch.int32),
            counts=by_feature("counts", dtype=torch.int32),
            starts=by_feature("starts", d_sae + 1, torch.int64),
            of_b_enc=by_feature("gradients of b_enc"),
            of_threshold=by_feature("gradients of threshold"),
            error=team.scratch("error", n, d_in),
            ignored=team.scratch("gradients of b_enc that are known", d_sae).numpy(),
        )

    def block(self, i: int) -> tuple[Any, ...]:
        return tuple(each[i] for each in self[:-2])


class _Entries(NamedTuple):
    """The codes of a block that contribute to gradients, sorted by feature, then by token."""

    starts: np.ndarray  # int64 [d_sae + 1]: position of each feature's first entry
    tokens: np.ndarray  # int32: in the block
    values: np.ndarray
    gradients: np.ndarray  # of the pre-activations

    @classmethod
    def within(cls, memory: Tensor, starts: np.ndarray, n: int) -> _Entries:
        """Return n entries as views of ``memory``, the block's memory for gradients of pre-activations. They need at most a third."""
        tokens, values, gradients = memory.flatten()[: 3 * n].split(n) if n else (memory.flatten()[:0],) * 3
        return cls(starts, tokens.view(torch.int32).numpy(), values.numpy(), gradients.numpy())


class _Transposed:
    """W_dec by dimension, `[d_in, d_sae]`, copied when a block first needs it."""

    def __init__(self, team: Team, W_dec: Tensor) -> None:
        self._memory, self._W_dec = team.scratch("W_dec by dimension", *W_dec.t().shape, dtype=W_dec.dtype), W_dec
        self._lock, self._is_copied = Lock(), False

    def matrix(self) -> Tensor:
        with self._lock:
            if not self._is_copied:
                self._memory.copy_(self._W_dec.t())
                self._is_copied = True
        return self._memory
