"""The training step of ReLU and JumpReLU SAEs on the CPU: five dense products, cut into blocks for the threads of a team.

Autograd takes a sixth product, for the gradient of an input that needs none, and a pass over all codes for each operation between.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels.cpu import Weights, blocks_of_tokens, gradients_of
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
    ``2 n d_sae``, and a block of pre-activations per thread.
    """
    from saeens_models.kernels import compiled

    n, d_in = x.shape
    d_sae = len(threshold)
    blocks = blocks_of_tokens(n)
    z, of_pre = team.scratch("z", n, d_sae), team.scratch("gradient of pre", n, d_sae)
    centred = team.scratch("centred", n, d_in) if apply_b_dec_to_input else x
    error, x_hat = team.scratch("error", n, d_in), torch.empty_like(x)
    sums, of_threshold = (team.scratch(name, len(blocks), d_sae).numpy() for name in ("sums", "gradient of threshold"))
    fires = team.scratch("fires", len(blocks), d_sae, dtype=torch.int32).numpy()
    norms = weights.W_dec.norm(dim=1)
    of_code = (l1_coefficient / n * norms).numpy()
    scale, of_activity, half_bandwidth = np.array([2 / n, l0_coefficient / n, bandwidth / 2], np.float32)

    def forward(i: int) -> float:
        rows = blocks[i]
        if apply_b_dec_to_input:
            torch.sub(x[rows], weights.b_dec, out=centred[rows])
        pre = torch.mm(centred[rows], weights.W_enc.t(), out=team.scratch("pre-activations", rows.stop - rows.start, d_sae)).numpy()
        compiled.gate(pre, weights.b_enc.numpy(), threshold.numpy(), z[rows].numpy(), sums[i], fires[i])
        torch.sub(weights.b_dec, x[rows], out=error[rows]).addmm_(z[rows], weights.W_dec)
        torch.add(error[rows], x[rows], out=x_hat[rows])
        torch.mm(error[rows], weights.W_dec.t(), out=of_pre[rows])
        compiled.gate_gradients(pre, threshold.numpy(), of_pre[rows].numpy(), scale, of_code, half_bandwidth, of_activity, of_threshold[i])
        return compiled.squares(error[rows].numpy())

    mse = sum(team.run(forward, len(blocks))) / n
    gradients = gradients_of(team, weights)
    of_norms = torch.from_numpy(sums.sum(axis=0)) * (l1_coefficient / n) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    fewest, most = _RANGE_FEATURES
    size = min(max(-(-d_sae // 8), fewest), most)

    def backward(i: int) -> None:
        features = slice(i * size, min((i + 1) * size, d_sae))
        torch.mm(of_pre[:, features].t(), centred, out=gradients.W_enc[features])
        torch.sum(of_pre[:, features], dim=0, out=gradients.b_enc[features])
        torch.mm(z[:, features].t(), error, out=gradients.W_dec[features]).mul_(float(scale))
        if l1_coefficient:
            gradients.W_dec[features].addcmul_(weights.W_dec[features], of_norms[features, None])

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
