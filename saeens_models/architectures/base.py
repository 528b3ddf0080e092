"""The base class of the architectures: weights, shape checks, initialisation, encoding and decoding.

``z = act((x - b_dec) @ W_enc + b_enc)``, ``x_hat = z @ W_dec + b_dec``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saeens_models.architectures.config import SAEConfig
from saeens_models.kernels import Team
from saeens_models.kernels.weights import BatchLoss, Weights
from saeens_models.sparse_code import SparseCode


class Objective(NamedTuple):
    """The training objective on one batch."""

    loss: Tensor
    """Scalar to differentiate: the sum of the terms."""
    terms: dict[str, Tensor]
    """Scalars by name, detached, with their coefficients: ``mse`` (sum over d_in, mean over tokens) and the architecture's own."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`, detached."""
    fire_counts: Tensor
    """Number of tokens of the batch on which each feature is active, `[d_sae]`."""

    @classmethod
    def of(cls, terms: dict[str, Tensor], x_hat: Tensor, fire_counts: Tensor) -> Objective:
        """Return the objective of these terms, whose sum is the loss."""
        detached = {name: term.detach() for name, term in terms.items()}
        return cls(reduce(add, terms.values()), detached, x_hat.detach(), fire_counts)

    @property
    def l0(self) -> Tensor:
        """Mean number of active features per token, scalar."""
        return self.fire_counts.sum() / self.x_hat.shape[0]


class SparseReconstruction(NamedTuple):
    """A batch encoded and decoded by an SAE. The code holds only its non-zero entries."""

    code: SparseCode
    """Code of the batch."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder: the base class of all architectures.

    The weights are zero until :func:`build_sae` draws them or :func:`load_sae` reads them. An architecture has the weights that
    ``shared_weights`` names, and may add its own.

    | weight | shape |
    |---|---|
    | W_enc | `[d_in, d_sae]`, stored feature by feature (transposed in memory): a feature's gradient is contiguous |
    | b_enc | `[d_sae]` |
    | W_dec | `[d_sae, d_in]`, row i is the direction of feature i |
    | b_dec | `[d_in]` |
    """

    config_class: ClassVar[type[SAEConfig]]
    """Configuration class of the architecture; set by :func:`register`."""
    input_unit_weights: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Names of the weights in the unit of the activations: they scale with the input, other weights do not."""
    calibrates: ClassVar[bool] = False
    """Training ends with :meth:`calibrate`, on the last batches."""
    shared_weights: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    """Names of the weights of the table that the architecture has; W_dec and b_dec always."""
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    metadata: dict[str, Any]
    """Origin of the SAE as JSON values: model_name, hook_name, ... :func:`load_sae` reads them, :func:`save_sae` writes them."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata = {}
        weights = {
            "W_enc": torch.zeros(config.d_sae, config.d_in).t(),
            "b_enc": torch.zeros(config.d_sae),
            "W_dec": torch.zeros(config.d_sae, config.d_in),
            "b_dec": torch.zeros(config.d_in),
        }
        for name in self.shared_weights:
            self.register_parameter(name, nn.Parameter(weights[name]))

    @torch.no_grad()
    def initialise(self, b_dec: Tensor | None = None) -> None:
        """Draw the initial weights: decoder rows in random directions with norm ``decoder_init_norm``, ``W_enc = W_dec^T``, biases zero.

        A separate generator, seeded with ``init_seed``, draws them. ``b_dec`` `[d_in]` replaces the zero decoder bias.

        Raises ``ValueError`` for a ``b_dec`` of another shape.
        """
        generator = torch.Generator().manual_seed(self.config.init_seed)
        rows = torch.randn(self.config.d_sae, self.config.d_in, generator=generator)
        self.W_dec.copy_(F.normalize(rows, dim=1) * self.config.decoder_init_norm)
        if "W_enc" in self.shared_weights:
            self.W_enc.copy_(self.W_dec.t())
        if "b_enc" in self.shared_weights:
            self.b_enc.zero_()
        self.b_dec.zero_()
        if b_dec is not None:
            if b_dec.shape != self.b_dec.shape:
                raise ValueError(f"b_dec has shape {list(b_dec.shape)}, expected [{self.config.d_in}] (d_in)")
            self.b_dec.copy_(b_dec)

    def activate(self, pre: Tensor) -> Tensor:
        """Return the code of pre-activations, both `[..., d_sae]`.

        Raises ``NotImplementedError`` for an architecture without an activation function, which overrides :meth:`encode` instead.
        """
        raise NotImplementedError(f"{type(self).__name__} has no activation function: it overrides encode")

    @abstractmethod
    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        """Return the training objective on a batch ``x`` `[n, d_in]`.

        ``dead_mask`` `[d_sae]` (bool) marks the features that an auxiliary loss may revive. ``sparsity_scale`` multiplies the
        sparsity coefficient, for warm-up.
        """

    def backpropagate(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0, team: Team | None = None) -> Objective:
        """``objective``, detached, and its gradients, which become the parameters' ``grad``.

        With a ``team`` of CPU threads an architecture may compute both in compiled loops; gradients then hold until the team's next.
        """
        with nullcontext() if team is None else team.resting():
            objective = self.objective(x, dead_mask, sparsity_scale)
            self.zero_grad()
            objective.loss.backward()
        return objective._replace(loss=objective.loss.detach())

    @classmethod
    def backpropagate_together(
        cls, saes: Sequence[SAE], x: Tensor, dead_masks: Sequence[Tensor | None], sparsity_scale: float = 1.0
    ) -> list[Objective] | None:
        """Call :meth:`backpropagate` for several SAEs in fewer kernel launches; the first of ``saes`` is of this class.

        Returns None, and changes nothing, if these SAEs cannot share launches. Up to rounding, the objective and the gradients of each
        SAE are the same as from its own :meth:`backpropagate`.
        """
        return None

    def batch_in_parts(self, parts: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Return a context for :meth:`backpropagate` on each of ``parts`` `[n_i, d_in]` of one batch.

        An architecture whose objective depends on all tokens of the batch overrides it.
        """
        return nullcontext()

    @property
    def stored_weights(self) -> Weights:
        """The four weights in the order of memory, without gradients."""
        return Weights(self.W_enc.detach().t(), self.b_enc.detach(), self.W_dec.detach(), self.b_dec.detach())

    def take_gradients(self, found: BatchLoss, second_term: str) -> Objective:
        """Set the parameters' ``grad``, and return the objective of a compiled step with the name of its second term."""
        W_enc, self.b_enc.grad, self.W_dec.grad, self.b_dec.grad = found.gradients
        self.W_enc.grad = W_enc.t()
        return Objective.of({"mse": found.mse, second_term: found.second_term}, found.x_hat, found.fire_counts)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return ``(x - b_dec) @ W_enc + b_enc`` `[..., d_sae]` of ``x`` `[..., d_in]`.

        Without ``apply_b_dec_to_input`` b_dec is not subtracted.
        """
        self.check_input(x)
        if self.config.apply_b_dec_to_input:
            x = x - self.b_dec
        return F.linear(x, self.W_enc.t(), self.b_enc)

    def check_input(self, x: Tensor) -> None:
        """Raise ``ValueError`` unless ``x`` is `[..., d_in]` and floating point."""
        _check_last_dimension(x, self.config.d_in, "x", "d_in")

    def encode(self, x: Tensor) -> Tensor:
        """Return the code `[..., d_sae]` of ``x`` `[..., d_in]`. Raises ``ValueError`` if the last dimension is not ``d_in``."""
        return self.activate(self.pre_activations(x))

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction `[..., d_in]` of a code ``z`` `[..., d_sae]`.

        Raises ``ValueError`` if the last dimension is not ``d_sae``.
        """
        _check_last_dimension(z, self.config.d_sae, "z", "d_sae")
        return F.linear(z, self.W_dec.t()) + self.decoder_bias

    @property
    def decoder_bias(self) -> Tensor:
        """Return the bias that ``decode`` adds to ``z @ W_dec``, `[d_in]`: b_dec, unless the architecture does not use it."""
        return self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Return ``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def reconstruct(self, x: Tensor) -> SparseReconstruction:
        """Encode and decode rows ``x`` `[n, d_in]`. Architectures that can do so never allocate the dense code."""
        z = self.encode(x)
        return SparseReconstruction(SparseCode.from_dense(z), self.decode(z))

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Project the weights onto the values that the architecture allows; called after each optimiser step."""

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of ``scale * x`` into the equivalent SAE of ``x``, in place.

        Weights in the unit of the activations are divided by ``scale``. W_enc and W_dec stay, so that decoder rows keep their norm.
        """
        for name in self.input_unit_weights:
            self.get_parameter(name).div_(scale)

    @torch.no_grad()
    def calibrate(self, parts: Sequence[Tensor]) -> None:
        """Set what inference needs and no gradient finds, at the end of training, from unscaled rows `[n_i, d_in]` of the training input.

        Without effect unless ``calibrates`` is True.
        """

    def inference_form(self) -> SAE:
        """Return the SAE to save: this one, unless the architecture is for training only."""
        return self

    def saelens_fields(self) -> dict[str, Any]:
        """Return the fields that this architecture adds to SAELens' ``cfg.json``."""
        return {}

    @classmethod
    def from_saelens(cls, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return this architecture's own configuration fields and its weights, given SAELens' ``cfg.json`` and weights.

        Raises ``ValueError`` for a variant that cannot be represented.
        """
        return {}, weights


def count_firings(z: Tensor) -> Tensor:
    """Return the number of rows of a code `[n, d_sae]` in which each feature is active, `[d_sae]`."""
    return (z > 0).sum(dim=0)


def _check_last_dimension(tensor: Tensor, size: int, name: str, size_name: str) -> None:
    if tensor.ndim == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, its last dimension must be {size_name} = {size}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, expected floating point")
