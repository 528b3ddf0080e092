"""The standard SAE: ReLU, and an L1 penalty weighted by the decoder norms."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from saeens_models.architectures.base import SAE, Objective, count_firings
from saeens_models.architectures.config import SAEConfig
from saeens_models.architectures.registry import register
from saeens_models.kernels import Team
from saeens_models.kernels.cpu_jumprelu import jumprelu_gradients


class StandardConfig(SAEConfig, frozen=True):
    """Configuration of a standard SAE."""

    architecture: Literal["standard"] = "standard"
    l1_coefficient: NonNegativeFloat = 1.0
    """Weight of the sparsity term; with ``l0_target`` its initial value."""
    l0_target: PositiveFloat | None = None
    """Number of active features per token. Training adjusts the coefficient towards it; None: the coefficient stays."""

    l0_field = "l0_target"
    adjusts_coefficient = True


@register(StandardConfig)
class StandardSAE(SAE):
    """``z = relu(pre)``.

    Loss, mean over tokens: ``||x_hat - x||^2 + l1_coefficient * sum_i z_i * ||W_dec_i||``. With unit decoder rows the second
    term is the L1 norm of the code. With other rows, moving norm from the code into the decoder does not lower it (SAELens 6).
    """

    config: StandardConfig

    def activate(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        z = self.encode(x)
        x_hat = self.decode(z)
        mse = (x_hat - x).square().sum(dim=-1).mean()
        l1 = self.config.l1_coefficient * sparsity_scale * (z @ self.W_dec.norm(dim=1)).mean()
        return Objective.of({"mse": mse, "l1": l1}, x_hat, count_firings(z))

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        if team is None:
            return super().backpropagate(x, dead_mask, sparsity_scale)
        centres, l1, threshold = self.config.apply_b_dec_to_input, self.config.l1_coefficient * sparsity_scale, torch.zeros_like(self.b_enc)
        found = jumprelu_gradients(team, x, self.stored_weights, threshold, apply_b_dec_to_input=centres, l1_coefficient=l1)
        return self.take_gradients(found.of_weights, "l1")
