"""The TopK SAE: the k largest pre-activations are the code (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from saeens_models.architectures.base import SAE, Objective, SAEConfig
from saeens_models.architectures.registry import register
from saeens_models.kernels import select_topk, topk_reconstruction


class TopKConfig(SAEConfig, frozen=True):
    """Configuration of a TopK SAE."""

    architecture: Literal["topk"] = "topk"
    k: PositiveInt
    """Number of features that may be active per token."""
    aux_loss_coefficient: NonNegativeFloat = 1.0
    """Weight of the auxiliary loss that revives dead features; 0 switches it off."""
    k_aux: PositiveInt | None = None
    """Number of dead features that the auxiliary loss decodes from; None is d_in / 2."""
    decoder_init_norm: PositiveFloat = 1.0
    """Norm of the initial decoder rows. With k active features unit rows reconstruct in the scale of the input from the start."""

    l0_field = "k"

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is larger than d_sae = {self.d_sae}: lower k or widen the SAE")
        return self


@register(TopKConfig)
class TopKSAE(SAE):
    """``z = relu(pre)`` on the k largest pre-activations of a token, 0 elsewhere.

    Loss, mean over tokens: ``||x_hat - x||^2 + aux_loss_coefficient * min(n_dead / k_aux, 1) * ||e_hat - e||^2``, where
    ``e = x - x_hat`` is held constant and ``e_hat`` is decoded, without b_dec, from the k_aux largest pre-activations among the
    dead features.
    """

    config: TopKConfig

    def activate(self, pre: Tensor) -> Tensor:
        top = select_topk(pre, self.config.k)
        return pre.new_zeros(pre.shape).scatter(-1, top.indices, top.values.relu())

    def forward(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``. Without gradients it never makes the dense code, which costs less (and rounds differently)."""
        if torch.is_grad_enabled():
            return super().forward(x)
        self.check_input(x)
        rows = x.reshape(-1, self.config.d_in)
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        top = topk_reconstruction(rows, *weights, k=self.config.k, apply_b_dec_to_input=self.config.apply_b_dec_to_input)
        return top.x_hat.view_as(x)

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        config = self.config
        k_aux = config.k_aux or max(config.d_in // 2, 1)
        top = topk_reconstruction(
            x,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            k=config.k,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            dead_mask=dead_mask if config.aux_loss_coefficient > 0 else None,
            k_aux=k_aux,
        )
        error = x - top.x_hat
        mse = error.square().sum(dim=-1).mean()
        loss = mse
        auxiliary = mse.new_zeros(())
        if top.error_hat is not None:
            coefficient = config.aux_loss_coefficient * min(top.n_dead / k_aux, 1.0)
            auxiliary = coefficient * (top.error_hat - error.detach()).square().sum(dim=-1).mean()
            loss = mse + auxiliary
        return Objective(
            loss=loss,
            terms={"mse": mse.detach(), "auxiliary": auxiliary.detach()},
            x_hat=top.x_hat.detach(),
            fire_counts=top.fire_counts,
        )

    def saelens_fields(self) -> dict[str, Any]:
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def from_saelens(cls, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if "k" not in cfg:
            raise ValueError("cfg.json has no k")
        if cfg.get("rescale_acts_by_decoder_norm", False):
            # Pre-activations times the decoder norms, codes divided by them at decode: the same as an SAE with unit decoder rows.
            norms = weights["W_dec"].norm(dim=1)
            if not (norms > 0).all():
                raise ValueError("rescale_acts_by_decoder_norm needs decoder rows that are not zero")
            weights = {
                **weights,
                "W_enc": weights["W_enc"] * norms,
                "b_enc": weights["b_enc"] * norms,
                "W_dec": weights["W_dec"] / norms[:, None],
            }
        return {"k": cfg["k"]}, weights
