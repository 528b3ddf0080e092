"""The matching pursuit SAE (MP-SAE, arXiv 2506.03093): one dictionary, whose atoms are chosen one by one to fit the residual."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from saeens_models.architectures.base import SAE, Objective, SparseReconstruction, count_firings
from saeens_models.architectures.config import SAEConfig
from saeens_models.architectures.registry import register
from saeens_models.kernels import Team, cpu_team
from saeens_models.kernels.cpu_pursuit import MOST_ATOMS, Gram, Limits, Pursuit, gram, pursue, pursuit_gradients
from saeens_models.sparse_code import SparseCode


class MatchingPursuitConfig(SAEConfig, frozen=True):
    """Configuration of a matching pursuit SAE."""

    architecture: Literal["matching_pursuit"] = "matching_pursuit"
    max_iterations: PositiveInt
    """Largest number of choices per token, and so of active features."""
    residual_threshold: NonNegativeFloat = 1e-2
    """Stop at a token when the norm of its residual is below this, in the unit of the training activations; 0: never."""
    stop_on_duplicate_support: bool = True
    """Stop at a token when a feature is chosen again."""
    decoder_init_norm: PositiveFloat = 1.0
    """Norm of the initial atoms. A choice subtracts a projection only with norm 1, which ``unit_norm_decoder`` keeps."""

    l0_field = "max_iterations"

    @property
    def inference_flops_per_token(self) -> int:
        """FLOPs of the definition with all iterations: ``max_iterations * (2 * d_in * d_sae + 2 * d_in)``.

        Each iteration correlates the residual with every atom and subtracts one atom. The reconstruction is a by-product.
        """
        return self.max_iterations * (2 * self.d_in * self.d_sae + 2 * self.d_in)

    @property
    def train_flops_per_token(self) -> int:
        """FLOPs of one training step, per token: those of inference, and ``max_iterations * 10 * d_in`` for the backward pass.

        An iteration's backward pass only involves its own atom: it restores the residual before the iteration, multiplies the atom with
        the gradient, and updates the gradients of the atom and of the residual.
        """
        return self.inference_flops_per_token + self.max_iterations * 10 * self.d_in


class _Choices(NamedTuple):
    code: Tensor  # [n, d_sae]
    residual: Tensor  # [n, d_in]


@register(MatchingPursuitConfig)
class MatchingPursuitSAE(SAE):
    """``r_0 = x - b_dec``; ``i = argmax_j W_dec_j . r``, ``a = relu(W_dec_i . r)``, ``z_i += a``, ``r -= a * W_dec_i``, and so on.

    A token takes at most ``max_iterations`` iterations, and fewer if its residual falls below ``residual_threshold`` or a feature is
    chosen again. Loss, mean over tokens: ``||x_hat - x||^2``, the squared norm of the last residual. The gradient flows through all
    values, not through the choices. There is no W_enc and no b_enc: the property ``W_enc`` returns the transposed W_dec. Without
    ``apply_b_dec_to_input`` b_dec is not used at all (SAELens 6).
    """

    config: MatchingPursuitConfig
    shared_weights = ("W_dec", "b_dec")
    input_unit_weights = ("b_dec",)

    def __init__(self, config: MatchingPursuitConfig) -> None:
        super().__init__(config)
        self._gram: tuple[int, Gram] | None = None

    @property
    def W_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]  # a view of W_dec
        return self.W_dec.t()

    @property
    def decoder_bias(self) -> Tensor:
        return self.b_dec if self.config.apply_b_dec_to_input else torch.zeros_like(self.b_dec)

    def _pursue(self, x: Tensor) -> _Choices:
        """Compute the definition in torch, differentiably, for rows `[n, d_in]` on any device."""
        config = self.config
        residual = x - self.decoder_bias
        code = residual.new_zeros(len(x), config.d_sae)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(config.max_iterations):
            with torch.no_grad():
                chosen = (residual @ self.W_dec.t()).argmax(dim=1)
            atoms = self.W_dec[chosen]
            values = torch.linalg.vecdot(residual, atoms).relu() * ~done
            if config.stop_on_duplicate_support:
                done = done | (code.detach().gather(1, chosen[:, None]).squeeze(1) != 0) | (values <= 0)
            code = code.scatter_add(1, chosen[:, None], values[:, None])
            residual = residual - values[:, None] * atoms
            if config.residual_threshold > 0:
                done = done | (residual.detach().norm(dim=1) < config.residual_threshold)
            if done.all():
                break
        return _Choices(code, residual)

    def encode(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._pursue(x.reshape(-1, self.config.d_in)).code.view(*x.shape[:-1], self.config.d_sae)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> SparseReconstruction:
        self.check_input(x)
        with cpu_team(x.device) as team:
            if team is None or x.dtype != torch.float32 or self.config.d_sae > MOST_ATOMS:
                code, residual = self._pursue(x)
                return SparseReconstruction(SparseCode.from_dense(code), x - residual)
            found = pursue(team, x - self.decoder_bias, self.W_dec.detach(), self._kept_gram(team), self._limits)
        return SparseReconstruction(self._sparse_code(found), x - found.residual)

    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        code, residual = self._pursue(x)
        mse = residual.square().sum(dim=-1).mean()
        if not self.config.apply_b_dec_to_input:
            mse = mse + 0 * self.b_dec.sum()  # the optimiser needs a gradient of every weight
        residual = residual.detach()
        return Objective(mse, {"mse": mse.detach()}, x - residual, count_firings(code.detach()))

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        if team is None or self.config.d_sae > MOST_ATOMS:
            return super().backpropagate(x, dead_mask, sparsity_scale, team)
        found = pursuit_gradients(team, x - self.decoder_bias.detach(), self.W_dec.detach(), self._limits)
        self.W_dec.grad = found.W_dec
        self.b_dec.grad = found.centre if self.config.apply_b_dec_to_input else torch.zeros_like(found.centre)
        fire_counts = self._sparse_code(found.pursuit).feature.bincount(minlength=self.config.d_sae)
        return Objective(found.mse, {"mse": found.mse}, x - found.pursuit.residual, fire_counts)

    @property
    def _limits(self) -> Limits:
        return Limits(self.config.max_iterations, self.config.residual_threshold, self.config.stop_on_duplicate_support)

    def _kept_gram(self, team: Team) -> Gram:
        """Return the atoms' inner products, computed again if the weights have changed. Memory: ``2 * d_sae ** 2`` bytes."""
        version = self.W_dec._version
        if self._gram is None or self._gram[0] != version:
            self._gram = version, gram(team, self.W_dec.detach())
        return self._gram[1]

    def _sparse_code(self, found: Pursuit) -> SparseCode:
        return SparseCode.from_choices(found.values, found.indices.long(), self.config.d_sae)

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Drop the kept inner products: the weights have changed, and a compiled optimiser does not change their torch version."""
        self._gram = None

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.config = self.config.model_copy(update={"residual_threshold": self.config.residual_threshold / scale})

    def saelens_fields(self) -> dict[str, Any]:
        return self._limits._asdict()

    @classmethod
    def from_saelens(cls, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = {name: cfg[name] for name in ("residual_threshold", "stop_on_duplicate_support") if name in cfg}
        return {**fields, "max_iterations": cfg.get("max_iterations") or cfg["d_in"]}, weights
