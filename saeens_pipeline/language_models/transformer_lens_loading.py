"""Loading of language models in TransformerLens' own format."""

from __future__ import annotations

import warnings
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from saeens_pipeline.errors import ConfigurationError, SaeensError, counted
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.descriptions import LanguageModelDescription, Weights, read_config
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.transformer_lens_models import (
    CONFIG,
    PICKLE,
    SAFETENSORS,
    repository_of,
    weights_file,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer  # pyright: ignore[reportMissingImports]

_FIELDS = ("d_model", "n_layers", "n_ctx", "d_vocab", "d_head", "n_heads", "d_mlp", "act_fn", "attn_only", "final_rms")
_INSTALL = "install it with `pip install --constraint constraints.txt --editable '.[transformer_lens]'`"


def load_transformer_lens_model(
    description: LanguageModelDescription, weights: Weights, device: str, dtype: torch.dtype, seed: int
) -> LanguageModel:
    """Load the model with TransformerLens. Raises as `load_language_model`, and ConfigurationError without TransformerLens."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigurationError(
            f"language model {description.name!r} needs TransformerLens 3, which is not installed: {_INSTALL}"
        ) from error
    config = read_config(description.name, description.path)
    try:
        settings = HookedTransformerConfig(
            **{name: config[name] for name in _FIELDS if name in config},
            normalization_type=config.get("normalization", config.get("normalization_type")),
            positional_embedding_type="standard",
            init_weights=weights == "random",
            device=device,
            dtype=dtype,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of HookedTransformer, which this format needs
            torch.manual_seed(seed)
            hooked = HookedTransformer(settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigurationError(f"TransformerLens cannot build {description.path}: {error}") from error
    if weights == "trained":
        _load_weights(description, hooked, dtype)
    hooked.requires_grad_(False)
    return _HookedLanguageModel(description, hooked.eval())


class _HookedLanguageModel(LanguageModel):
    """A HookedTransformer, called as transformers' models are: its hooks have the same names, and those inside a block are modules."""

    stream_passes_modules = True

    def __init__(self, description: LanguageModelDescription, hooked: HookedTransformer) -> None:
        forward = hooked.forward

        def call(*args: Any, input_ids: torch.Tensor | None = None, use_cache: bool = False, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if input_ids is None else SimpleNamespace(logits=forward(input_ids))

        hooked.forward = call
        hooked.device = hooked.W_E.device
        super().__init__(description, cast("Any", hooked))

    def module(self, hook: str, layer: int) -> torch.nn.Module:
        inside = hook not in ("resid_pre", "resid_post") and "{layer}" not in hook
        return super().module(f"blocks.{{layer}}.hook_{hook}" if inside else hook, layer)

    def unembedding(self) -> torch.Tensor:
        return cast("Any", self.model).W_U.detach().T


def _load_weights(description: LanguageModelDescription, hooked: HookedTransformer, dtype: torch.dtype) -> None:
    if description.commit:
        hub.download(repository_of(description.name), description.commit, [CONFIG, SAFETENSORS, PICKLE])
    file = weights_file(description.name, description.path)
    try:
        state = load_file(file) if file.name == SAFETENSORS else torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ConfigurationError(f"{file} does not hold weights that can be read: {error}") from error
    own = hooked.state_dict()
    constants = {name for name in own if name.rsplit(".", 1)[-1] in ("mask", "IGNORE")}  # buffers that the sizes decide
    missing = sorted(own.keys() - state.keys() - constants)
    wrong = sorted(name for name in own.keys() & state.keys() - constants if own[name].shape != state[name].shape)
    if missing or wrong:
        problem = (
            f"lacks {counted(len(missing), 'tensor')}: {missing[0]}, ..."
            if missing
            else f"has {wrong[0]} in another shape than config.json says"
        )
        raise SaeensError(f"{file} {problem}")
    hooked.load_state_dict({name: state[name].to(dtype) for name in own.keys() - constants}, strict=False)
