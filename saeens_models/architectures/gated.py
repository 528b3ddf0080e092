"""The gated SAE: one encoder with two biases, for which features are active and for how much (arXiv 2404.16014)."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from saeens_models.architectures.base import SAE, Objective, count_firings
from saeens_models.architectures.config import SAEConfig
from saeens_models.architectures.registry import register


class GatedConfig(SAEConfig, frozen=True):
    """Configuration of a gated SAE."""

    architecture: Literal["gated"] = "gated"
    l1_coefficient: NonNegativeFloat = 1.0
    """Weight of the sparsity term; with ``l0_target`` its initial value."""
    l0_target: PositiveFloat | None = None
    """Number of active features per token. Training adjusts the coefficient towards it; None: the coefficient stays."""

    l0_field = "l0_target"
    adjusts_coefficient = True

    @property
    def train_flops_per_token(self) -> int:
        """Dense-equivalent FLOPs of one training step, per token: ``16 * d_in * d_sae``.

        Eight matrix products: encode, two reconstructions (from the code and from the gates), the gradients of W_dec and of the code
        through both reconstructions, and the gradient of W_enc.
        """
        return 16 * self.d_in * self.d_sae


@register(GatedConfig)
class GatedSAE(SAE):
    """``gate = (x - b_dec) @ W_enc + b_gate``, ``z = [gate > 0] * relu((x - b_dec) @ W_enc * exp(r_mag) + b_mag)``.

    Loss, mean over tokens: ``||x_hat - x||^2 + l1_coefficient * sum_i relu(gate_i) * ||W_dec_i|| + ||decode(relu(gate)) - x||^2``. The
    last term is called auxiliary; gates learn only through it and the sparsity term. As in SAELens 6, and unlike the paper, its gradient
    reaches W_dec and b_dec. ``b_gate``, ``b_mag`` and ``r_mag`` `[d_sae]` replace b_enc.
    """

    config: GatedConfig
    shared_weights = ("W_enc", "W_dec", "b_dec")
    input_unit_weights = ("b_gate", "b_mag", "b_dec")

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.b_gate = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))

    @torch.no_grad()
    def initialise(self, b_dec: Tensor | None = None) -> None:
        super().initialise(b_dec)
        for weight in (self.b_gate, self.b_mag, self.r_mag):
            weight.zero_()

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return ``(x - b_dec) @ W_enc``, without a bias."""
        self.check_input(x)
        return (x - self.b_dec if self.config.apply_b_dec_to_input else x) @ self.W_enc

    def activate(self, pre: Tensor) -> Tensor:
        return (pre + self.b_gate > 0) * torch.relu(pre * self.r_mag.exp() + self.b_mag)

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        pre = self.pre_activations(x)
        z, gate = self.activate(pre), torch.relu(pre + self.b_gate)
        x_hat = self.decode(z)
        mse = (x_hat - x).square().sum(dim=-1).mean()
        l1 = self.config.l1_coefficient * sparsity_scale * (gate @ self.W_dec.norm(dim=1)).mean()
        auxiliary = (self.decode(gate) - x).square().sum(dim=-1).mean()
        return Objective.of({"mse": mse, "l1": l1, "auxiliary": auxiliary}, x_hat, count_firings(z))
