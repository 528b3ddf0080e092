"""The training step of ReLU and JumpReLU SAEs on the CPU: five dense products, cut into blocks for the threads of a team.

Autograd takes a sixth product, for the gradient of an input that needs none, and a pass over all codes for each operation between.
Codes and their gradients are held feature by feature, one block of tokens after another: so each is the first factor of the products
that it is in, and contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels.cpu import Weights, blocks_of_tokens, gradients_of
from saeens_models.kernels.products import linear
from saeens_models.kernels.team import Team

_RANGE_FEATURES = 256, 2048


class GatedLoss(NamedTuple):
    """What a batch costs, and what was found on the way."""

    mse: Tensor
    """Scalar: squared error summed over d_in, mean over tokens."""
    sparsity: Tensor
    """Scalar: the sparsity term, with its coefficient."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""
    fire_counts: Tensor
    """In how many tokens each feature is active, `[d_sae]`."""
    gradients: Weights
    threshold_gradient: Tensor
    """`[d_sae]`"""


def gated_gradients(
    team: Team,
    x: Tensor,
    weights: Weights,
    threshold: Tensor,
    *,
    apply_b_dec_to_input: bool,
    l1_coefficient: float = 0.0,
    l0_coefficient: float = 0.0,
    bandwidth: float = 0.0,
) -> GatedLoss:
    """The loss of an SAE with code ``z = pre * (pre > threshold)`` on ``x`` `[n, d_in]` (float32, contiguous), and its gradients.

    The loss is ``mean ||x_hat - x||^2 + l1_coefficient * mean sum_i z_i ||W_dec_i|| + l0_coefficient * mean sum_i [z_i active]``.
    ``threshold`` `[d_sae]` learns from pre-activations within half a ``bandwidth`` of it, as in
    :class:`~saeens_models.architectures.jumprelu.JumpReLUSAE`. Memory beside the result: the codes of the batch and their gradients,
    ``2 n d_sae``, W_dec once more, and three blocks of pre-activations per thread.
    """
    from saeens_models.kernels import compiled

    n, d_in = x.shape
    d_sae = len(threshold)
    blocks = blocks_of_tokens(n)
    z, of_pre = (_by_block(team.scratch(name, n * d_sae), blocks, d_sae) for name in ("z", "gradient of pre"))
    centred = team.scratch("centred", n, d_in) if apply_b_dec_to_input else x
    error, x_hat = team.scratch("error", n, d_in), torch.empty_like(x)
    sums, of_b_enc, of_threshold = (
        team.scratch(name, len(blocks), d_sae).numpy() for name in ("sums", "gradients of b_enc", "gradients of threshold")
    )
    fires = team.scratch("fires", len(blocks), d_sae, dtype=torch.int32).numpy()
    norms = weights.W_dec.norm(dim=1)
    of_code = (l1_coefficient / n * norms).numpy()
    scale, of_activity, half_bandwidth = np.array([2 / n, l0_coefficient / n, bandwidth / 2], np.float32)
    directions = team.scratch("W_dec by dimension", d_in, d_sae).copy_(weights.W_dec.t())

    def forward(i: int) -> float:
        rows = blocks[i]
        if apply_b_dec_to_input:
            torch.sub(x[rows], weights.b_dec, out=centred[rows])
        pre = linear(weights.W_enc, centred[rows]).numpy()
        compiled.gate(pre, weights.b_enc.numpy(), threshold.numpy(), z[i].numpy(), sums[i], fires[i])
        decoded = linear(directions, z[i].t()).numpy()
        squares: float = compiled.compare(decoded, weights.b_dec.numpy(), x[rows].numpy(), x_hat[rows].numpy(), error[rows].numpy())
        of_z = linear(weights.W_dec, error[rows]).numpy()
        settings = scale, of_code, half_bandwidth, of_activity
        compiled.gate_gradients(pre, threshold.numpy(), of_z, *settings, of_pre[i].numpy(), of_b_enc[i], of_threshold[i])
        return squares

    mse = sum(team.run(forward, len(blocks))) / n
    gradients = gradients_of(team, weights)
    of_norms = torch.from_numpy(sums.sum(axis=0)) * (l1_coefficient / n) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    gradients.b_enc.copy_(torch.from_numpy(of_b_enc.sum(axis=0)))
    fewest, most = _RANGE_FEATURES
    size = min(max(-(-d_sae // 8), fewest), most)

    def backward(i: int) -> None:
        features = slice(i * size, min((i + 1) * size, d_sae))
        W_enc, W_dec = gradients.W_enc[features], gradients.W_dec[features]
        for number, rows in enumerate(blocks):
            for gradient, code, per_token in ((W_enc, of_pre[number], centred[rows]), (W_dec, z[number], error[rows])):
                product = linear(code[features], per_token.t())
                gradient.copy_(product) if number == 0 else gradient.add_(product)
        W_dec.mul_(float(scale))
        if l1_coefficient:
            W_dec.addcmul_(weights.W_dec[features], of_norms[features, None])

    team.run(backward, -(-d_sae // size))
    torch.sum(error, dim=0, out=gradients.b_dec).mul_(float(scale))
    if apply_b_dec_to_input:
        gradients.b_dec.addmv_(weights.W_enc.t(), gradients.b_enc, alpha=-1)
    fire_counts = torch.from_numpy(fires.sum(axis=0))
    sparsity = l1_coefficient / n * float(sums.sum(axis=0) @ norms.numpy()) + l0_coefficient / n * int(fire_counts.sum())
    return GatedLoss(
        mse=torch.tensor(mse, dtype=torch.float32),
        sparsity=torch.tensor(sparsity, dtype=torch.float32),
        x_hat=x_hat,
        fire_counts=fire_counts,
        gradients=gradients,
        threshold_gradient=torch.from_numpy(of_threshold.sum(axis=0)),
    )


def _by_block(memory: Tensor, blocks: Sequence[slice], d_sae: int) -> list[Tensor]:
    """A matrix `[d_sae, tokens]` for each block of tokens."""
    return [memory[rows.start * d_sae : rows.stop * d_sae].view(d_sae, -1) for rows in blocks]
