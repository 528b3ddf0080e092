"""What every SAE architecture shares: configuration, weights, shape checks, initialisation, cost.

``z = act((x - b_dec) @ W_enc + b_enc)``, ``x_hat = z @ W_dec + b_dec``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from torch import Tensor, nn
from torch.nn import functional as F

from saeens_models.architectures.registry import sae_class, validate_l0_multiple
from saeens_models.kernels import Team
from saeens_models.kernels.cpu import Weights
from saeens_models.sparse_code import SparseCode


class SAEConfig(BaseModel, frozen=True):
    """Configuration of one SAE. ``SAEConfig(architecture="topk", ...)`` gives an instance of that architecture's own class.

    Unknown architectures, unknown fields and values out of range raise pydantic's ``ValidationError``.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    architecture: str
    """Which architecture: the discriminator."""
    d_in: PositiveInt
    """Size of the activations."""
    d_sae: PositiveInt
    """Number of features."""
    init_seed: NonNegativeInt = 0
    """Seed of the initial weights, and of nothing else."""
    apply_b_dec_to_input: bool = True
    """Subtract ``b_dec`` from the input before encoding."""
    decoder_init_norm: PositiveFloat = 0.1
    """Norm of the initial decoder rows; W_enc starts as their transpose. 0.1 keeps the first reconstructions of a dense code small."""

    l0_field: ClassVar[str | None] = None
    """Name of the field that sets the number of active features directly; None where a sparsity coefficient sets it indirectly."""

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        if cls is SAEConfig:
            return object.__new__(sae_class(fields.get("architecture")).config_class)  # pyright: ignore[reportReturnType]
        return object.__new__(cls)

    def __init__(self, **fields: Any) -> None:  # says to type checkers that the fields depend on the architecture
        super().__init__(**fields)

    @model_validator(mode="wrap")
    @classmethod
    def _choose_class(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is SAEConfig and isinstance(value, Mapping):
            return sae_class(value.get("architecture")).config_class.model_validate(value)  # pyright: ignore[reportReturnType]
        return handler(value)

    def with_l0_multiplied(self, factor: int) -> Self:
        """The same configuration with ``factor`` times as many active features.

        Raises ``ValueError`` for architectures that set their L0 through a sparsity coefficient: finding that takes a search.
        """
        validate_l0_multiple(self.architecture)
        assert self.l0_field is not None
        fields = self.model_dump()
        return type(self)(**{**fields, self.l0_field: fields[self.l0_field] * factor})

    @property
    def inference_flops_per_token(self) -> int:
        """Dense-equivalent FLOPs to encode and decode one token: ``4 * d_in * d_sae``.

        Two matrix products of ``2 * d_in * d_sae`` each, as if the code were dense, so that architectures compare; biases and
        activation functions are left out.
        """
        return 4 * self.d_in * self.d_sae

    @property
    def train_flops_per_token(self) -> int:
        """Dense-equivalent FLOPs of one training step, per token: ``10 * d_in * d_sae``.

        Five matrix products: encode, decode, and the gradients of W_dec, of the code and of W_enc. The input needs none.
        """
        return 10 * self.d_in * self.d_sae


class Objective(NamedTuple):
    """What a training step needs to know about a batch."""

    loss: Tensor
    """Scalar to differentiate: the sum of the terms."""
    terms: dict[str, Tensor]
    """Scalars by name, detached, with their coefficients: ``mse`` (sum over d_in, mean over tokens) and the architecture's own."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`, detached."""
    fire_counts: Tensor
    """In how many of the batch's tokens each feature is active, `[d_sae]`."""

    @property
    def l0(self) -> Tensor:
        """Mean number of active features per token, scalar."""
        return self.fire_counts.sum() / self.x_hat.shape[0]


class SparseReconstruction(NamedTuple):
    """What an SAE makes of some tokens, its code without the zeros."""

    code: SparseCode
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder. Weights are zero until :func:`build_sae` draws or :func:`load_sae` reads them.

    An architecture has those of these that are in ``shared_weights``, and adds its own.

    | weight | shape |
    |---|---|
    | W_enc | `[d_in, d_sae]`, stored feature by feature (transposed in memory): a feature's gradient is contiguous |
    | b_enc | `[d_sae]` |
    | W_dec | `[d_sae, d_in]`, row i is the direction of feature i |
    | b_dec | `[d_in]` |
    """

    config_class: ClassVar[type[SAEConfig]]
    """Set by :func:`register`."""
    input_unit_weights: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Weights in the unit of the activations: they scale with the input, the others do not."""
    shared_weights: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    """Which of the table's weights the architecture has: W_dec and b_dec at least."""
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
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
        """Draw the weights: decoder rows in random directions with norm ``decoder_init_norm``, ``W_enc = W_dec^T``, biases zero.

        The draws come from a generator of their own, seeded with ``init_seed``. ``b_dec`` `[d_in]` replaces the zero decoder bias.
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
        """The activation function: pre-activations to code, both `[..., d_sae]`. An architecture has it, or an ``encode`` of its own."""
        raise NotImplementedError(f"{type(self).__name__} has no activation function: it encodes tokens in a way of its own")

    @abstractmethod
    def objective(self, x: Tensor, dead_mask: Tensor | None = None, sparsity_scale: float = 1.0) -> Objective:
        """The training objective on a batch ``x`` `[n, d_in]`.

        ``dead_mask`` `[d_sae]` (bool) marks the features that an auxiliary loss may revive; ``sparsity_scale`` multiplies the
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
        """:meth:`backpropagate` of several SAEs, the first one of this class, in fewer launches; None, and nothing done, where it cannot.

        Rounding apart, the objective and the gradients of each are those that it has alone.
        """
        del saes, x, dead_masks, sparsity_scale
        return None

    def batch_in_parts(self, parts: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Around :meth:`backpropagate` on each of ``parts`` `[n_i, d_in]` of one batch: for what depends on all of its tokens."""
        del parts
        return nullcontext()

    @property
    def stored_weights(self) -> Weights:
        """The four weights as they lie in memory, without gradients."""
        return Weights(self.W_enc.detach().t(), self.b_enc.detach(), self.W_dec.detach(), self.b_dec.detach())

    def set_gradients(self, gradients: Weights) -> None:
        """Make these the parameters' ``grad``."""
        self.W_enc.grad = gradients.W_enc.t()
        self.b_enc.grad, self.W_dec.grad, self.b_dec.grad = gradients.b_enc, gradients.W_dec, gradients.b_dec

    def pre_activations(self, x: Tensor) -> Tensor:
        """``(x - b_dec) @ W_enc + b_enc``: `[..., d_in]` to `[..., d_sae]`; without the subtraction if the configuration says so."""
        self.check_input(x)
        if self.config.apply_b_dec_to_input:
            x = x - self.b_dec
        return F.linear(x, self.W_enc.t(), self.b_enc)

    def check_input(self, x: Tensor) -> None:
        """Raise ``ValueError`` unless ``x`` is `[..., d_in]` and floating point."""
        _check_last_dimension(x, self.config.d_in, "x", "d_in")

    def encode(self, x: Tensor) -> Tensor:
        """The code of ``x``: `[..., d_in]` to `[..., d_sae]`. Raises ``ValueError`` if the last dimension is not ``d_in``."""
        return self.activate(self.pre_activations(x))

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction from ``z``: `[..., d_sae]` to `[..., d_in]`. Raises ``ValueError`` if the last dimension is not ``d_sae``."""
        _check_last_dimension(z, self.config.d_sae, "z", "d_sae")
        return F.linear(z, self.W_dec.t()) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def reconstruct(self, x: Tensor) -> SparseReconstruction:
        """``encode`` and ``decode`` of rows ``x`` `[n, d_in]` in one: where the architecture can, without ever making a dense code."""
        z = self.encode(x)
        return SparseReconstruction(SparseCode.from_dense(z), self.decode(z))

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Put the weights back where the architecture allows them to be; called after each optimiser step."""

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of ``scale * x`` into the same SAE of ``x``, in place.

        Everything in the unit of the activations is divided by ``scale``; W_enc and W_dec stay, so that decoder rows keep their norm.
        """
        for name in self.input_unit_weights:
            self.get_parameter(name).div_(scale)

    def inference_form(self) -> SAE:
        """What is saved: this SAE, unless the architecture is one for training only."""
        return self

    def saelens_fields(self) -> dict[str, Any]:
        """What this architecture adds to SAELens' ``cfg.json``."""
        return {}

    @classmethod
    def from_saelens(cls, cfg: Mapping[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """This architecture's own configuration fields and its weights, from SAELens' ``cfg.json`` and weights.

        Raises ``ValueError`` for a variant that cannot be represented.
        """
        del cfg
        return {}, weights


def count_firings(z: Tensor) -> Tensor:
    """In how many rows of a code `[n, d_sae]` each feature is active, `[d_sae]`."""
    return (z > 0).sum(dim=0)


def _check_last_dimension(tensor: Tensor, size: int, name: str, size_name: str) -> None:
    if tensor.ndim == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, its last dimension must be {size_name} = {size}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, expected floating point")
