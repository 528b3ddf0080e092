"""SAE configurations from recipes and settings, given the width of the activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from saeens_pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from saeens_models import SAEConfig, SAESettings

START = "initial weights"
"""Name of the input that provides the initial weights of an SAE."""


def sae_config(sae: SAESettings | Mapping[str, Any], d_in: int, *, seed: int, name: str) -> SAEConfig:
    """Return the configuration of settings or of a recipe's `sae` for activations of width d_in. Raises ConfigurationError, with `name`."""
    from saeens_models import SAESettings

    try:
        return SAESettings.model_validate(sae).config(d_in, seed)
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise ConfigurationError(f"{name}: the SAE cannot be built for activations of width {d_in}: {reasons}") from None
