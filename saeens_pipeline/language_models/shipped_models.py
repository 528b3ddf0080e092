"""Configurations of the models on the hub that the shipped experiments use, for `saeens plan` where the hub cannot be reached.

`shipped_configurations/` has the fields of their config.json that decide sizes, and neither tokenizers nor weights.
"""

from __future__ import annotations

from pathlib import Path

from saeens_pipeline.language_models.descriptions import TRANSFORMER_LENS, LanguageModelDescription
from saeens_pipeline.language_models.models import describe_configuration
from saeens_pipeline.language_models.transformer_lens_models import describe_transformer_lens_configuration

_FOLDER = Path(__file__).parent / "shipped_configurations"
_CONFIGURATIONS = {
    "EleutherAI/pythia-160m": "pythia_160m",
    "google/gemma-2-2b": "gemma_2_2b",
    "transformer_lens:gelu-1l": "gelu_1l",
}


def describe_shipped_model(name: str, revision: str) -> LanguageModelDescription | None:
    """Return the description of a model from its shipped configuration, without tokenizer and identity; None for other models.

    For forecasts only: nothing is computed from it.
    """
    if name not in _CONFIGURATIONS or revision != "main":
        return None
    describe = describe_transformer_lens_configuration if name.startswith(TRANSFORMER_LENS) else describe_configuration
    return describe(name, revision, _FOLDER / _CONFIGURATIONS[name])
