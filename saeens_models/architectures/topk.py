"""The TopK SAE: the k largest pre-activations are the code (Gao et al. 2024, arXiv 2406.04093)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from saeens_models.architectures.base import SAE, Objective, SparseReconstruction, count_firings
from saeens_models.architectures.config import SAEConfig
from saeens_models.architectures.registry import register
from saeens_models.kernels import Team, TopKReconstruction, cpu_team, select_topk, topk_reconstruction
from saeens_models.kernels.cpu_topk import COMPILED_STEP_MAX_DENSITY, topk_gradients, topk_reconstruct
from saeens_models.kernels.cuda_topk import FourWeights, topk_reconstructions
from saeens_models.kernels.reference import TopKSettings, marked_features
from saeens_models.sparse_code import SparseCode


class AuxiliaryLossConfig(SAEConfig, frozen=True):
    """Configuration of the architectures that keep the largest pre-activations and revive dead features with an auxiliary loss."""

    aux_loss_coefficient: NonNegativeFloat = 1.0
    """Weight of the auxiliary loss that revives dead features; 0 switches it off."""
    k_aux: PositiveInt | None = None
    """Number of dead features in the auxiliary loss; None: d_in / 2."""
    decoder_init_norm: PositiveFloat = 1.0
    """Norm of the initial decoder rows. With k active features, unit rows reconstruct at the scale of the input from the start."""
    matryoshka: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the dictionary, ascending, such as [0.0625, 0.25]: its first features, so many, have a loss of their own in training."""

    l0_field = "k"

    @model_validator(mode="after")
    def _prefixes_ascend(self) -> Self:
        if any(not 0 < first < second for first, second in pairwise((*self.prefixes, self.d_sae))) or 0 in self.prefixes:
            shares = ", ".join(f"{share:g}" for share in self.matryoshka)
            raise ValueError(
                f"matryoshka: [{shares}] of {self.d_sae} features are {list(self.prefixes)}: each needs more than the one before"
            )
        return self

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of features of the nested dictionaries that ``matryoshka`` names, without the whole."""
        return tuple(round(share * self.d_sae) for share in self.matryoshka)

    @property
    def most_revived(self) -> int:
        """Largest number of dead features in the auxiliary loss."""
        return self.k_aux or max(self.d_in // 2, 1)

    def auxiliary_weight(self, n_dead: int) -> float:
        """Return the weight of the auxiliary loss with so many dead features."""
        return self.aux_loss_coefficient * min(n_dead / self.most_revived, 1.0)


def dense_objective(sae: SAE, x: Tensor, pre: Tensor, z: Tensor, dead_mask: Tensor | None) -> Objective:
    """Return the objective of a dense code ``z`` `[n, d_sae]` of ``x``, from pre-activations ``pre``.

    It is ``||x_hat - x||^2`` plus the auxiliary loss of the dead features. With ``matryoshka`` the squared errors of the prefixes, whose
    ``x_hat`` is decoded from the first features alone, are added (Bussmann et al. 2025, arXiv 2503.17547).
    """
    config = sae.config
    assert isinstance(config, AuxiliaryLossConfig)
    x_hat, partial, terms = sae.decode(z), sae.b_dec, {}
    for first, end in pairwise((0, *config.prefixes)):
        partial = partial + z[:, first:end] @ sae.W_dec[first:end]
        terms["prefixes"] = terms.get("prefixes", 0) + (x - partial).square().sum(dim=-1).mean()
    error = x - x_hat
    mse = error.square().sum(dim=-1).mean()
    auxiliary = mse.new_zeros(())
    dead = marked_features(dead_mask if config.aux_loss_coefficient > 0 else None)
    if dead is not None:
        of_dead = pre[:, dead]
        top = select_topk(of_dead, min(config.most_revived, len(dead)))
        error_hat = torch.zeros_like(of_dead).scatter(1, top.indices, top.values) @ sae.W_dec[dead]
        auxiliary = config.auxiliary_weight(len(dead)) * (error_hat - error.detach()).square().sum(dim=-1).mean()
    return Objective.of({"mse": mse, **terms, "auxiliary": auxiliary}, x_hat, count_firings(z))


class TopKConfig(AuxiliaryLossConfig, frozen=True):
    """Configuration of a TopK SAE."""

    architecture: Literal["topk"] = "topk"
    k: PositiveInt
    """Number of features that may be active per token."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is larger than d_sae = {self.d_sae}: lower k or widen the SAE")
        return self


@register(TopKConfig)
class TopKSAE(SAE):
    """``z = relu(pre)`` on the k largest pre-activations of a token, 0 elsewhere.

    Loss, mean over tokens: ``||x_hat - x||^2 + aux_loss_coefficient * min(n_dead / k_aux, 1) * ||e_hat - e||^2``. There
    ``e = x - x_hat`` is held constant, and ``e_hat`` is decoded, without b_dec, from the k_aux largest pre-activations among the
    dead features. With ``matryoshka`` the squared errors of the nested dictionaries are added; such steps use torch.
    """

    config: TopKConfig

    def activate(self, pre: Tensor) -> Tensor:
        top = select_topk(pre, self.config.k)
        return pre.new_zeros(pre.shape).scatter(-1, top.indices, top.values.relu())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``decode(encode(x))``. Without gradients the dense code is never allocated, which is faster and rounds differently."""
        if torch.is_grad_enabled():
            return super().forward(x)
        self.check_input(x)
        return self.reconstruct(x.reshape(-1, self.config.d_in)).x_hat.view_as(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> SparseReconstruction:
        config = self.config
        with cpu_team(x.device) as team:
            if team is None or x.dtype != torch.float32:
                top = select_topk(self.pre_activations(x), config.k)
                code = SparseCode.from_topk(top.values, top.indices, config.d_sae)
                return SparseReconstruction(code, code.decode(self.W_dec) + self.b_dec)
            self.check_input(x)
            values, indices, x_hat = topk_reconstruct(
                team, x.contiguous(), self.stored_weights, k=config.k, apply_b_dec_to_input=config.apply_b_dec_to_input
            )
        return SparseReconstruction(SparseCode.from_topk(values, indices.long(), config.d_sae), x_hat)

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        if self.config.matryoshka:
            pre = self.pre_activations(x)
            return dense_objective(self, x, pre, self.activate(pre), dead_mask)
        dead_mask = dead_mask if self.config.aux_loss_coefficient > 0 else None
        return self._objective(x, topk_reconstruction(x, *self._weights, dead_mask=dead_mask, **self._selection))

    @property
    def _weights(self) -> FourWeights:
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    @property
    def _selection(self) -> TopKSettings:
        config = self.config
        return {"k": config.k, "apply_b_dec_to_input": config.apply_b_dec_to_input, "k_aux": config.most_revived}

    def _objective(self, x: Tensor, top: TopKReconstruction) -> Objective:
        error = x - top.x_hat
        mse = error.square().sum(dim=-1).mean()
        loss, auxiliary = mse, mse.new_zeros(())
        if top.error_hat is not None:
            auxiliary = self.config.auxiliary_weight(top.n_dead) * (top.error_hat - error.detach()).square().sum(dim=-1).mean()
            loss = mse + auxiliary
        return Objective(loss, {"mse": mse.detach(), "auxiliary": auxiliary.detach()}, top.x_hat.detach(), top.fire_counts)

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        config = self.config
        if team is None or config.matryoshka or config.k > COMPILED_STEP_MAX_DENSITY * config.d_sae:
            return super().backpropagate(x, dead_mask, sparsity_scale, team)
        dead = marked_features(dead_mask if config.aux_loss_coefficient > 0 else None)
        weight = 0.0 if dead is None else config.auxiliary_weight(len(dead))
        found = topk_gradients(team, x, self.stored_weights, **self._selection, dead=dead, aux_coefficient=weight)
        return self.take_gradients(found, "auxiliary")

    @classmethod
    def backpropagate_together(
        cls, saes: Sequence[SAE], x: Tensor, dead_masks: Sequence[Tensor | None], sparsity_scale: float = 1.0
    ) -> list[Objective] | None:
        shapes = [sae.config.model_copy(update={"init_seed": 0}) for sae in saes]
        alike = [sae for sae, shape in zip(saes, shapes, strict=True) if isinstance(sae, cls) and shape == shapes[0]]
        if len(alike) < len(saes) or alike[0].config.matryoshka:
            return None
        if alike[0].config.aux_loss_coefficient == 0:
            dead_masks = [None] * len(saes)
        tops = topk_reconstructions(x, [sae._weights for sae in alike], dead_masks=dead_masks, **alike[0]._selection)
        if tops is None:
            return None
        objectives = [sae._objective(x, top) for sae, top in zip(alike, tops, strict=True)]
        for sae in alike:
            sae.zero_grad()
        torch.autograd.backward([objective.loss for objective in objectives])
        return [objective._replace(loss=objective.loss.detach()) for objective in objectives]

    def saelens_fields(self) -> dict[str, Any]:
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def from_saelens(cls, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if cfg.get("k") is None:
            raise ValueError("cfg.json has no k")
        if cfg.get("rescale_acts_by_decoder_norm", False):
            # SAELens multiplies pre-activations by the decoder norms and divides codes by them: equivalent to unit decoder rows.
            norms = weights["W_dec"].norm(dim=1)
            if not (norms > 0).all():
                raise ValueError("rescale_acts_by_decoder_norm needs decoder rows other than zero")
            encoder = {name: weights[name] * norms for name in ("W_enc", "b_enc")}
            weights = {**weights, **encoder, "W_dec": weights["W_dec"] / norms[:, None]}
        return {"k": cfg["k"]}, weights
