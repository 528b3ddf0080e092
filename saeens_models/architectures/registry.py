"""The architectures by name. Each registers itself where it is defined; nothing else knows their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from torch import Tensor

    from saeens_models.architectures.base import SAE, SAEConfig

_SAE_CLASSES: dict[str, type[SAE]] = {}
_SET_PER_SAE = ("d_in", "d_sae", "init_seed")

SAEClass = TypeVar("SAEClass", bound="type[SAE]")


def register(config_class: type[SAEConfig]) -> Callable[[SAEClass], SAEClass]:
    """Class decorator: the decorated :class:`SAE` is what ``config_class`` configures, under the architecture name that it declares."""

    def add(sae_class: SAEClass) -> SAEClass:
        name = config_class.model_fields["architecture"].default
        if name in _SAE_CLASSES:
            raise ValueError(f"architecture {name!r} is registered twice: {_SAE_CLASSES[name].__qualname__} and {sae_class.__qualname__}")
        sae_class.config_class = config_class
        _SAE_CLASSES[name] = sae_class
        return sae_class

    return add


def architectures() -> tuple[str, ...]:
    """The names that ``architecture`` may take, sorted."""
    return tuple(sorted(_SAE_CLASSES))


def sae_class(architecture: object) -> type[SAE]:
    """The class of an architecture. A name that is not registered raises pydantic's ``ValidationError`` and lists those that are."""
    if isinstance(architecture, str) and architecture in _SAE_CLASSES:
        return _SAE_CLASSES[architecture]
    allowed = ", ".join(architectures())
    found = "is missing" if architecture is None else f"{architecture!r} is unknown"
    error = PydanticCustomError("unknown_architecture", "{found}; one of: {allowed}", {"found": found, "allowed": allowed})
    detail = InitErrorDetails(type=error, loc=("architecture",), input=architecture)
    raise ValidationError.from_exception_data("SAEConfig", [detail])


def build_sae(config: SAEConfig, b_dec: Tensor | None = None) -> SAE:
    """A new SAE with initial weights drawn from ``config.init_seed``; ``b_dec`` `[d_in]` replaces the zero decoder bias."""
    sae = sae_class(config.architecture)(config)
    sae.initialise(b_dec)
    return sae


def validate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without ``d_in``, ``d_sae`` and ``init_seed``, as experiments write it, checked and with defaults filled in.

    ``SAEConfig(**validate_settings(settings), d_in=..., d_sae=..., init_seed=...)`` makes it whole. Unknown names, missing and
    out-of-range values raise pydantic's ``ValidationError``, which names the field.
    """
    config_class = sae_class(settings.get("architecture")).config_class
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in config_class.model_fields.items() if name not in _SET_PER_SAE
    }
    model: type[BaseModel] = create_model(
        f"{config_class.__name__} settings", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )
    return model.model_validate(dict(settings)).model_dump()


def validate_l0_multiple(architecture: str) -> None:
    """Raise ``ValueError`` unless the architecture sets its L0 directly, as ``SAEConfig.with_l0_multiplied`` needs."""
    if sae_class(architecture).config_class.l0_field is None:
        able = ", ".join(name for name in architectures() if sae_class(name).config_class.l0_field is not None)
        raise ValueError(
            f"architecture {architecture!r} sets its L0 through a sparsity coefficient, and there is no search for the one that gives "
            f"a multiple; possible with: {able}"
        )
