"""The configuration of an SAE, and the configuration classes of the architectures by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import InitErrorDetails, PydanticCustomError

LATER_FIELDS = ("l0_target", "matryoshka")
"""Fields that recipes of before lack; left out of JSON unless they have a value."""
CONFIG_CLASSES: dict[str, type[SAEConfig]] = {}
"""The configuration class of every architecture, by name; `registry.register` adds to it."""


def architectures() -> tuple[str, ...]:
    """Return the names of the registered architectures, sorted."""
    return tuple(sorted(CONFIG_CLASSES))


def config_class(architecture: object) -> type[SAEConfig]:
    """Return the configuration class of an architecture.

    Raises pydantic's ``ValidationError`` for a missing or unknown name; its message lists the registered ones.
    """
    if isinstance(architecture, str) and architecture in CONFIG_CLASSES:
        return CONFIG_CLASSES[architecture]
    found = "is missing" if architecture is None else f"{architecture!r} is unknown"
    error = PydanticCustomError(
        "unknown_architecture", "{found}; one of: {allowed}", {"found": found, "allowed": ", ".join(architectures())}
    )
    detail = InitErrorDetails(type=error, loc=("architecture",), input=architecture)
    raise ValidationError.from_exception_data("SAEConfig", [detail])


def validate_l0_multiple(sae: OfArchitecture) -> None:
    """Raise ``ValueError`` unless a configuration or settings say how many features are active: k or ``l0_target``, for example."""
    field = config_class(sae.architecture).l0_field
    if field is None or getattr(sae, field) is None:
        able = ", ".join(name for name in architectures() if CONFIG_CLASSES[name].requires_l0())
        give = f"give {field}; " if field else ""
        raise ValueError(
            f"architecture {sae.architecture!r} sets its L0 through a sparsity coefficient, and no rule multiplies that: "
            f"{give}possible without a target with: {able}"
        )


class OfArchitecture(BaseModel, frozen=True):
    """Base class of configurations and settings. Validation returns an instance of the class of the named architecture."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    architecture: str
    """Name of the architecture: the discriminator."""

    @classmethod
    def _own_class(cls, architecture: object) -> type[Self]:
        """Return the architecture's class; an architecture's own class returns itself."""
        raise NotImplementedError

    def __new__(cls, /, *_: Any, **fields: Any) -> Self:
        return object.__new__(cls._own_class(fields.get("architecture")))

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later fields that are not used: recipes and files of SAEs from before these fields stay as they are."""
        return {name: value for name, value in handler(self).items() if name not in LATER_FIELDS or value}

    @model_validator(mode="wrap")
    @classmethod
    def _choose_class(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        own = cls._own_class(value.get("architecture")) if isinstance(value, Mapping) else cls
        return handler(value) if own is cls else own.model_validate(value)


class SAEConfig(OfArchitecture, frozen=True):
    """Configuration of one SAE. ``SAEConfig(architecture="topk", ...)`` returns an instance of that architecture's own class.

    Unknown architectures, unknown fields and values out of range raise pydantic's ``ValidationError``.
    """

    d_in: PositiveInt
    """Size of the activations."""
    d_sae: PositiveInt
    """Number of features."""
    init_seed: NonNegativeInt = 0
    """Seed of the initial weights; nothing else depends on it."""
    apply_b_dec_to_input: bool = True
    """Subtract ``b_dec`` from the input before encoding."""
    decoder_init_norm: PositiveFloat = 0.1
    """Norm of the initial decoder rows; W_enc starts as their transpose. 0.1 keeps first reconstructions from a dense code small."""

    l0_field: ClassVar[str | None] = None
    """Name of the field that sets the number of active features, or a target for it; None if there is only a sparsity coefficient."""
    adjusts_coefficient: ClassVar[bool] = False
    """With a value in ``l0_field``, training adjusts the sparsity coefficient until so many features are active."""

    @classmethod
    def _own_class(cls, architecture: object) -> type[Self]:
        return config_class(architecture) if cls is SAEConfig else cls  # pyright: ignore[reportReturnType]

    def __init__(self, /, **fields: Any) -> None:  # for type checkers: the fields depend on the architecture
        super().__init__(**fields)

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        target = getattr(self, "l0_target", None)
        if target is not None and target > self.d_sae:
            raise ValueError(f"l0_target = {target:g} is larger than d_sae = {self.d_sae}: lower it or widen the SAE")
        return self

    @classmethod
    def requires_l0(cls) -> bool:
        """Return True if every SAE of the architecture says how many features are active."""
        return cls.l0_field is not None and cls.model_fields[cls.l0_field].is_required()

    @property
    def inference_flops_per_token(self) -> int:
        """Dense-equivalent FLOPs to encode and decode one token: ``4 * d_in * d_sae``.

        Two matrix products of ``2 * d_in * d_sae`` each. They are counted as if the code were dense, so that architectures compare.
        Biases and activation functions are not counted.
        """
        return 4 * self.d_in * self.d_sae

    @property
    def train_flops_per_token(self) -> int:
        """Dense-equivalent FLOPs of one training step, per token: ``10 * d_in * d_sae``.

        Five matrix products: encode, decode, and the gradients of W_dec, of the code and of W_enc. The input needs no gradient.
        """
        return 10 * self.d_in * self.d_sae
