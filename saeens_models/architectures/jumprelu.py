"""The JumpReLU SAE: a learned threshold per feature, trained with a straight-through estimator (arXiv 2407.14435)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from saeens_models.architectures.base import SAE, Objective, count_firings
from saeens_models.architectures.config import SAEConfig
from saeens_models.architectures.registry import register
from saeens_models.kernels import Team
from saeens_models.kernels.cpu_jumprelu import jumprelu_gradients


class JumpReLUConfig(SAEConfig, frozen=True):
    """Configuration of a JumpReLU SAE."""

    architecture: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: NonNegativeFloat = 1.0
    """Weight of the sparsity term. With ``l0_target`` that of a relative distance from it: of the order of the input's squared norm."""
    l0_target: PositiveFloat | None = None
    """Number of active features per token that training aims for; None: as many as ``l0_coefficient`` leaves."""
    init_threshold: NonNegativeFloat = 0.01
    """Initial threshold of every feature, in the unit of the training activations."""
    bandwidth: PositiveFloat = 0.05
    """Width of the rectangle kernel: a threshold learns from pre-activations at most half a bandwidth away."""

    l0_field = "l0_target"


@register(JumpReLUConfig)
class JumpReLUSAE(SAE):
    """``z = pre * (pre > threshold)``, with ``threshold`` `[d_sae]`, a float32 parameter (not its logarithm) kept at or above 0.

    Loss, mean over tokens: ``||x_hat - x||^2 + l0_coefficient * sum_i step(pre_i - threshold_i)``.

    With ``l0_target`` the second term is ``l0_coefficient * (L0 / l0_target - 1)^2``, where L0 is the batch's mean of
    ``sum_i step(pre_i - threshold_i)``, as in dictionary_learning and Gemma Scope 2.
    """

    config: JumpReLUConfig
    input_unit_weights = ("b_enc", "b_dec", "threshold")

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))
        self._l0_of_batch: Tensor | None = None  # set while a batch is processed in parts

    @torch.no_grad()
    def initialise(self, b_dec: Tensor | None = None) -> None:
        super().initialise(b_dec)
        self.threshold.fill_(self.config.init_threshold)

    def activate(self, pre: Tensor) -> Tensor:
        return pre * (pre > self.threshold)

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        pre = self.pre_activations(x)
        z, active = _JumpReLU.apply(pre, self.threshold, self.config.bandwidth)
        x_hat = self.decode(z)
        mse = (x_hat - x).square().sum(dim=-1).mean()
        l0 = active.sum(dim=-1).mean()
        value, slope = self._penalty(l0.detach(), sparsity_scale)
        return Objective.of({"mse": mse, "l0": value + slope * (l0 - l0.detach())}, x_hat, count_firings(z))

    def _penalty(self, l0: Tensor, sparsity_scale: float) -> tuple[Tensor, Tensor | float]:
        """Return the sparsity term and its derivative by ``l0``, the scalar L0 of these tokens.

        With a target the L0 of the whole batch decides.
        """
        coefficient, target = self.config.l0_coefficient * sparsity_scale, self.config.l0_target
        if target is None:
            return coefficient * l0, coefficient
        excess = (l0 if self._l0_of_batch is None else self._l0_of_batch) / target - 1
        return coefficient * excess.square(), 2 * coefficient / target * excess

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        if team is None:
            return super().backpropagate(x, dead_mask, sparsity_scale)
        config, threshold = self.config, self.threshold.detach()
        l0 = config.l0_coefficient * sparsity_scale if config.l0_target is None else 0.0
        settings: dict[str, Any] = {"apply_b_dec_to_input": config.apply_b_dec_to_input, "bandwidth": config.bandwidth}
        found = jumprelu_gradients(
            team, x, self.stored_weights, threshold, l0_coefficient=l0, count_near=config.l0_target is not None, **settings
        )
        self.threshold.grad, of_weights = found.threshold_gradient, found.of_weights
        if found.near is not None:
            value, slope = self._penalty(of_weights.fire_counts.sum() / len(x), sparsity_scale)
            self.threshold.grad -= slope / (len(x) * config.bandwidth) * found.near
            of_weights = of_weights._replace(second_term=value)
        return self.take_gradients(of_weights, "l0")

    @contextmanager
    def batch_in_parts(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Return a context in which the distance from ``l0_target`` is that of the whole batch. Parts are encoded once more, first."""
        if self.config.l0_target is None:
            yield
            return
        with torch.no_grad():
            n_active = torch.stack([count_firings(self.encode(part)).sum() for part in parts]).sum()
        self._l0_of_batch = n_active / sum(map(len, parts))
        try:
            yield
        finally:
            self._l0_of_batch = None

    @torch.no_grad()
    def apply_constraints(self) -> None:
        self.threshold.clamp_(min=0)

    @classmethod
    def from_saelens(cls, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (weights["threshold"] < 0).any():
            raise ValueError("threshold has negative entries; a JumpReLU SAE keeps it at or above 0")
        return super().from_saelens(cfg, weights)


class _JumpReLU(torch.autograd.Function):
    """Code and activity `[n, d_sae]` of pre-activations `[n, d_sae]` under thresholds `[d_sae]`.

    Both jump at the threshold. A rectangle kernel ``K(u) = [|u| < 1/2]`` estimates their derivatives there:
    ``d z / d threshold = -threshold/bandwidth * K((pre - threshold)/bandwidth)`` and
    ``d active / d threshold = -1/bandwidth * K((pre - threshold)/bandwidth)``. ``active`` passes no gradient to ``pre``.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth = bandwidth
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_z, grad_active = grad_outputs
        pre, threshold, active = ctx.saved_tensors
        near = ((pre - threshold) / ctx.bandwidth).abs() < 0.5
        grad_jump = (grad_z * threshold + grad_active) / -ctx.bandwidth
        return grad_z * active, torch.where(near, grad_jump, 0).sum(dim=0), None
