"""The SAE classes by architecture name. An architecture registers its class in its own file; no other file names architectures."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from saeens_models.architectures.base import SAE
from saeens_models.architectures.config import CONFIG_CLASSES, SAEConfig, config_class
from saeens_models.architectures.settings import add_settings_class

_SAE_CLASSES: dict[str, type[SAE]] = {}

SAEClass = TypeVar("SAEClass", bound="type[SAE]")


def register(configured_by: type[SAEConfig]) -> Callable[[SAEClass], SAEClass]:
    """Register the decorated :class:`SAE` and its configuration class under the architecture name that the configuration declares.

    Raises ``ValueError`` for a name that is registered already.
    """

    def add(sae_class: SAEClass) -> SAEClass:
        name = configured_by.model_fields["architecture"].default
        if name in _SAE_CLASSES:
            raise ValueError(f"architecture {name!r} is registered twice: {_SAE_CLASSES[name].__qualname__} and {sae_class.__qualname__}")
        sae_class.config_class = configured_by
        _SAE_CLASSES[name] = sae_class
        CONFIG_CLASSES[name] = configured_by
        add_settings_class(name, configured_by)
        return sae_class

    return add


def sae_class(architecture: object) -> type[SAE]:
    """Return the class of an architecture.

    Raises pydantic's ``ValidationError`` for a missing or unknown name; its message lists the registered ones.
    """
    return _SAE_CLASSES[config_class(architecture).model_fields["architecture"].default]


def build_sae(config: SAEConfig, b_dec: Tensor | None = None) -> SAE:
    """Return a new SAE with initial weights drawn from ``config.init_seed``; ``b_dec`` `[d_in]` replaces the zero decoder bias."""
    sae = sae_class(config.architecture)(config)
    sae.initialise(b_dec)
    return sae
