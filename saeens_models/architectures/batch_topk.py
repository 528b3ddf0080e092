"""The BatchTopK SAE: the largest pre-activations of a whole batch are the code (Bussmann et al. 2024, arXiv 2412.06410)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from saeens_models.architectures.base import SAE, Objective
from saeens_models.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from saeens_models.architectures.registry import register
from saeens_models.architectures.topk import AuxiliaryLossConfig, dense_objective
from saeens_models.kernels import Team


class BatchTopKConfig(AuxiliaryLossConfig, frozen=True):
    """Configuration of a BatchTopK SAE."""

    architecture: Literal["batch_topk"] = "batch_topk"
    k: PositiveFloat
    """Mean number of active features per token of a batch."""
    threshold_rate: float = Field(default=0.01, gt=0, le=1)
    """Share of the distance to the batch's smallest kept pre-activation that the threshold moves in a step."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k:g} is larger than d_sae = {self.d_sae}: lower k or widen the SAE")
        return self


@register(BatchTopKConfig)
class BatchTopKSAE(SAE):
    """In training ``z = pre`` on the ``k * n`` largest positive pre-activations of a batch of n tokens, and 0 elsewhere; ties are kept.

    The loss is TopK's, over this code, also with ``matryoshka``. At inference a token has no batch: the SAE is a JumpReLU SAE,
    ``z = pre * (pre > threshold)``, and is saved as one. All features share the threshold. During training it starts at 0 and follows the
    smallest kept pre-activation, ``threshold += threshold_rate * (smallest - threshold)`` after each batch (SAELens 6). Unlike SAELens,
    inference divides it by ``1 - (1 - threshold_rate) ** n_batches``, the bias correction of Adam: otherwise far too many features fire
    after few batches.
    Such an average lags behind the weights. Training therefore ends with a calibration: the threshold becomes the one that keeps ``k``
    pre-activations per token, on average over rows of the last batches.
    """

    config: BatchTopKConfig
    calibrates = True
    threshold: Tensor
    """Scalar, float64: a buffer; saved in checkpoints."""
    threshold_share: Tensor
    """Scalar, float64: a buffer, the weight of all batches in ``threshold``, 1 - (1 - threshold_rate) ** n_batches."""

    def __init__(self, config: BatchTopKConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("threshold_share", torch.zeros((), dtype=torch.float64))
        self._smallest_of_batch: Tensor | None = None  # set while a batch is processed in parts
        self._smallest: Tensor | None = None  # smallest kept pre-activation of the last objective

    @torch.no_grad()
    def initialise(self, b_dec: Tensor | None = None) -> None:
        super().initialise(b_dec)
        self.threshold.zero_()
        self.threshold_share.zero_()

    @property
    def inference_threshold(self) -> Tensor:
        """Scalar, float64: the threshold at inference; 0 before the first batch."""
        return torch.where(self.threshold_share > 0, self.threshold / self.threshold_share, self.threshold)

    def activate(self, pre: Tensor) -> Tensor:
        return pre * (pre > self.inference_threshold.to(pre.dtype))

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        pre = self.pre_activations(x)
        self._smallest = self._smallest_of_batch if self._smallest_of_batch is not None else self._smallest_kept([x], pre.detach())
        return dense_objective(self, x, pre, pre * (pre >= self._smallest), dead_mask)

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        objective = super().backpropagate(x, dead_mask, sparsity_scale, team)
        if self._smallest_of_batch is None:
            self._move_threshold()
        return objective

    @contextmanager
    def batch_in_parts(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Return a context in which parts keep the same pre-activations as the whole batch.

        The parts are encoded once more, first, to find the smallest pre-activation that the whole batch keeps.
        """
        self._smallest_of_batch = self._smallest = self._smallest_kept(parts)
        try:
            yield
            self._move_threshold()
        finally:
            self._smallest_of_batch = None

    @torch.no_grad()
    def _smallest_kept(self, parts: Sequence[Tensor], pre: Tensor | None = None) -> Tensor:
        """Return the smallest positive pre-activation that a batch keeps; infinite if it keeps none.

        ``pre``: pre-activations of the only part, if they are known. Memory: the pre-activations of a part, and ``2 k`` numbers per token.
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
    def calibrate(self, parts: Sequence[Tensor]) -> None:
        smallest = self._smallest_kept(parts)
        if smallest.isfinite():
            self.threshold.copy_(smallest.nextafter(torch.zeros_like(smallest)))  # the smallest one is above the threshold
            self.threshold_share.fill_(1)

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
        sae.metadata = dict(self.metadata)
        return sae
