"""The BatchTopK SAE: the largest pre-activations of a whole batch are its code (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from saeens_models.architectures.base import SAE, Objective, count_firings
from saeens_models.architectures.config import SAEConfig
from saeens_models.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from saeens_models.architectures.registry import register
from saeens_models.kernels import Team, select_topk
from saeens_models.kernels.reference import marked_features


class BatchTopKConfig(SAEConfig, frozen=True):
    """Configuration of a BatchTopK SAE."""

    architecture: Literal["batch_topk"] = "batch_topk"
    k: PositiveFloat
    """Number of features that are active per token, in the mean over a batch."""
    threshold_rate: float = Field(default=0.01, gt=0, le=1)
    """How far the threshold moves in a step towards the smallest pre-activation that the batch kept."""
    aux_loss_coefficient: NonNegativeFloat = 1.0
    """Weight of the auxiliary loss that revives dead features; 0 switches it off."""
    k_aux: PositiveInt | None = None
    """Number of dead features that the auxiliary loss decodes from; None is d_in / 2."""
    decoder_init_norm: PositiveFloat = 1.0
    """Norm of the initial decoder rows, as for TopK."""

    l0_field = "k"

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k:g} is larger than d_sae = {self.d_sae}: lower k or widen the SAE")
        return self


@register(BatchTopKConfig)
class BatchTopKSAE(SAE):
    """In training ``z = pre`` on the ``k * n`` largest positive pre-activations of a batch of n tokens, else 0; equal ones are all kept.

    Loss as for TopK, over this code. A token alone has no batch: trained, it is a JumpReLU SAE, ``z = pre * (pre > threshold)``, and is
    saved as one. The one threshold of all features follows the smallest pre-activation kept,
    ``threshold += threshold_rate * (smallest - threshold)`` after each batch, from 0 (SAELens 6). Unlike there it is divided by
    ``1 - (1 - threshold_rate) ** n_batches`` before it is used, as Adam's means are: else, after few batches, far too many features fire.
    """

    config: BatchTopKConfig
    threshold: Tensor
    """Scalar, float64: no weight, but part of what a training is taken up with."""
    threshold_share: Tensor
    """Scalar, float64, the same: the share of batches in ``threshold``, 1 - (1 - threshold_rate) ** n_batches; the rest is the first 0."""

    def __init__(self, config: BatchTopKConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("threshold_share", torch.zeros((), dtype=torch.float64))
        self._smallest_of_batch: Tensor | None = None  # while the batch is taken in parts
        self._smallest: Tensor | None = None  # of the last objective

    @torch.no_grad()
    def initialise(self, b_dec: Tensor | None = None) -> None:
        super().initialise(b_dec)
        self.threshold.zero_()
        self.threshold_share.zero_()

    @property
    def inference_threshold(self) -> Tensor:
        """Scalar, float64: what a pre-activation has to exceed without a batch; before the first batch 0."""
        return torch.where(self.threshold_share > 0, self.threshold / self.threshold_share, self.threshold)

    def activate(self, pre: Tensor) -> Tensor:
        return pre * (pre > self.inference_threshold.to(pre.dtype))

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        pre = self.pre_activations(x)
        self._smallest = self._smallest_of_batch if self._smallest_of_batch is not None else self._smallest_kept([x], pre.detach())
        z = pre * (pre >= self._smallest)
        x_hat = self.decode(z)
        error = x - x_hat
        mse = error.square().sum(dim=-1).mean()
        auxiliary = mse.new_zeros(())
        dead = marked_features(dead_mask if self.config.aux_loss_coefficient > 0 else None)
        if dead is not None:
            k_aux = self.config.k_aux or max(self.config.d_in // 2, 1)
            of_dead = pre[:, dead]
            top = select_topk(of_dead, min(k_aux, len(dead)))
            error_hat = torch.zeros_like(of_dead).scatter(1, top.indices, top.values) @ self.W_dec[dead]
            coefficient = self.config.aux_loss_coefficient * min(len(dead) / k_aux, 1.0)
            auxiliary = coefficient * (error_hat - error.detach()).square().sum(dim=-1).mean()
        return Objective(
            loss=mse + auxiliary,
            terms={"mse": mse.detach(), "auxiliary": auxiliary.detach()},
            x_hat=x_hat.detach(),
            fire_counts=count_firings(z.detach()),
        )

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        objective = super().backpropagate(x, dead_mask, sparsity_scale, team)
        if self._smallest_of_batch is None:
            self._move_threshold()
        return objective

    @contextmanager
    def batch_in_parts(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Parts keep what the whole batch would: they are encoded once more before, for its smallest pre-activation to keep."""
        self._smallest_of_batch = self._smallest = self._smallest_kept(parts)
        try:
            yield
            self._move_threshold()
        finally:
            self._smallest_of_batch = None

    @torch.no_grad()
    def _smallest_kept(self, parts: Sequence[Tensor], pre: Tensor | None = None) -> Tensor:
        """Of a batch the smallest positive pre-activation that is kept, infinite if there is none; ``pre`` is the only part's, if known.

        Memory: the pre-activations of a part, and twice ``k`` numbers for each token of the batch.
        """
        n_kept = int(self.config.k * sum(map(len, parts)))
        kept = self.b_dec.new_empty(0)
        for part in parts:
            positive = (self.pre_activations(part) if pre is None else pre).flatten()
            kept = torch.cat([kept, positive.topk(min(n_kept, len(positive)), sorted=False).values])
            kept = kept.topk(min(n_kept, len(kept)), sorted=False).values
        return torch.where(kept > 0, kept, torch.inf).min() if n_kept else kept.new_tensor(torch.inf)

    @torch.no_grad()
    def _move_threshold(self) -> None:
        assert self._smallest is not None
        smallest = self._smallest.to(self.threshold.dtype)
        for kept, target in ((self.threshold, smallest), (self.threshold_share, torch.ones_like(smallest))):
            moved = kept + self.config.threshold_rate * (target - kept)
            kept.copy_(torch.where(smallest.isfinite(), moved, kept))

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.threshold.div_(scale)

    def inference_form(self) -> JumpReLUSAE:
        shared = self.config.model_dump(include={"d_in", "d_sae", "init_seed", "apply_b_dec_to_input", "decoder_init_norm"})
        sae = JumpReLUSAE(JumpReLUConfig(**shared))
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        threshold = self.inference_threshold.to(self.b_dec.dtype).expand(self.config.d_sae)
        sae.to(self.b_dec.device).load_state_dict({**weights, "threshold": threshold})
        return sae
