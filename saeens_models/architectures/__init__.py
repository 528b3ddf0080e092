"""SAE architectures, one file each. A new architecture is a new file here that registers its class; no other file changes."""

from importlib import import_module
from pkgutil import iter_modules

from saeens_models.architectures.base import SAE, Objective
from saeens_models.architectures.config import SAEConfig, architectures, validate_l0_multiple
from saeens_models.architectures.registry import build_sae, register, sae_class
from saeens_models.architectures.saelens_format import InputScaleMissingError, load_sae, save_sae
from saeens_models.architectures.settings import SAESettings, settings_class

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "SAE",
    "InputScaleMissingError",
    "Objective",
    "SAEConfig",
    "SAESettings",
    "architectures",
    "build_sae",
    "load_sae",
    "register",
    "sae_class",
    "save_sae",
    "settings_class",
    "validate_l0_multiple",
]
