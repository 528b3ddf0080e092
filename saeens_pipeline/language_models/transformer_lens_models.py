"""Language models in TransformerLens' own format, such as GELU-1L: `transformer_lens:gelu-1l`.

They are repositories or folders with TransformerLens' config.json, weights as model.safetensors or `*final.pth`, and a tokenizer, either
their own or that of the repository in `tokenizer_name`. Weights are used unchanged (TransformerLens' "no processing"). torch's restricted
unpickler reads `.pth` files; it builds tensors and calls no code.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.descriptions import (
    TRANSFORMER_LENS,
    LanguageModelDescription,
    Weights,
    locate_model,
    read_config,
    read_size,
    require_tokenizer,
    weights_fingerprint,
)
from saeens_pipeline.language_models.language_model import LanguageModel

if TYPE_CHECKING:
    import torch
    from transformer_lens import HookedTransformer  # pyright: ignore[reportMissingImports]

REPOSITORIES = {
    f"{name.lower().replace('_', '-')}-{n}l": f"NeelNanda/{name}_{n}L512W_C4_Code"
    for name in ("GELU", "SoLU", "Attn_Only")
    for n in (1, 2, 3, 4)
}
"""Repositories on the hub, by TransformerLens' name of the model."""

_CONFIG, _SAFETENSORS, _PICKLE = "config.json", "model.safetensors", "*final.pth"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_FIELDS = ("d_model", "n_layers", "n_ctx", "d_vocab", "d_head", "n_heads", "d_mlp", "act_fn", "attn_only", "final_rms")
_INSTALL = "install it with `pip install --constraint constraints.txt --editable '.[transformer_lens]'`"


def describe_transformer_lens_model(name: str, revision: str, weights: Weights = "trained") -> LanguageModelDescription:
    """Return the description of `transformer_lens:NAME`: one of REPOSITORIES, another repository in that format, or a folder.

    Does not need TransformerLens. Documents are separated by the beginning-of-text token, if the tokenizer has one, as in the training of
    these models. Raises as `describe_language_model`.
    """
    repository = _repository(name)
    folder = locate_model(repository, revision, [_CONFIG, *_TOKENIZER_FILES])
    config = read_config(name, folder.path)
    if "model_type" in config:
        raise ConfigurationError(f"language model {name!r} is in transformers' format: write language_model: {repository}")
    if config.get("architecture", "neel") != "neel" or config.get("shortformer_pos"):
        raise ConfigurationError(
            f"language model {name!r} has an unsupported, older version of TransformerLens' format; supported: {', '.join(REPOSITORIES)}"
        )
    tokenizer = folder
    if not (folder.path / "tokenizer.json").is_file():
        if not isinstance(config.get("tokenizer_name"), str):
            raise ConfigurationError(f"language model {name!r}: {folder.path} has no tokenizer.json, and config.json no tokenizer_name")
        tokenizer = locate_model(config["tokenizer_name"], "main", _TOKENIZER_FILES)
    tokenizer_file = require_tokenizer(name, tokenizer)
    identity: dict[str, object] = {"name": name, "revision": folder.commit or revision}
    if tokenizer.commit:
        identity["tokenizer"] = {"name": config["tokenizer_name"], "revision": tokenizer.commit}
    if not folder.commit:
        files = [folder.path / _CONFIG, tokenizer_file]
        try:
            files.append(_weights_file(name, folder.path))
        except ConfigurationError:
            if weights == "trained":
                raise
        identity["sha256"] = {file.name: weights_fingerprint(file) for file in files}
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=folder.path,
        model_type="transformer_lens",
        d_model=read_size(config, folder.path, "d_model"),
        n_layers=read_size(config, folder.path, "n_layers"),
        context_length=read_size(config, folder.path, "n_ctx"),
        vocab_size=read_size(config, folder.path, "d_vocab"),
        end_of_text=_token_id(tokenizer.path, "bos_token"),
        parallel_residual=bool(config.get("parallel_attn_mlp")),
        identity=identity,
        commit=folder.commit,
        tokenizer_file=tokenizer_file,
        begin_of_text=_token_id(tokenizer.path, "bos_token"),
        without=("resid_mid", "mlp_out") if config.get("attn_only") else (),
    )


def load_transformer_lens_model(
    description: LanguageModelDescription, weights: Weights, device: str, dtype: torch.dtype, seed: int
) -> LanguageModel:
    """Load the model with TransformerLens. Raises as `load_language_model`, and ConfigurationError without TransformerLens."""
    import torch

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
    import torch
    from safetensors.torch import load_file

    if description.commit:
        hub.download(_repository(description.name), description.commit, [_CONFIG, _SAFETENSORS, _PICKLE])
    file = _weights_file(description.name, description.path)
    try:
        state = load_file(file) if file.name == _SAFETENSORS else torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ConfigurationError(f"{file} does not hold weights that can be read: {error}") from error
    own = hooked.state_dict()
    constants = {name for name in own if name.rsplit(".", 1)[-1] in ("mask", "IGNORE")}  # buffers that the sizes decide
    missing = sorted(own.keys() - state.keys() - constants)
    wrong = sorted(name for name in own.keys() & state.keys() - constants if own[name].shape != state[name].shape)
    if missing or wrong:
        problem = (
            f"lacks {len(missing)} tensors: {missing[0]}, ..." if missing else f"has {wrong[0]} in another shape than config.json says"
        )
        raise SaeensError(f"{file} {problem}")
    hooked.load_state_dict({name: state[name].to(dtype) for name in own.keys() - constants}, strict=False)


def _repository(name: str) -> str:
    place = name.removeprefix(TRANSFORMER_LENS)
    return REPOSITORIES.get(place, place)


def _weights_file(name: str, path: Path) -> Path:
    for file in (path / _SAFETENSORS, *sorted(path.glob(_PICKLE))):
        if file.is_file():
            return file
    raise ConfigurationError(f"language model {name!r}: {path} lacks its weights, {_SAFETENSORS} or {_PICKLE}")


def _token_id(folder: Path, role: str) -> int | None:
    """Return the id of the token with a role, such as bos_token, from the tokenizer's files; None if there is no such token."""
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    for file in (folder / each for each in _TOKENIZER_FILES[1:]):
        if file.is_file():
            token = json.loads(file.read_text(encoding="utf-8")).get(role)
            content = token.get("content") if isinstance(token, dict) else token
            for each in tokens:
                if content is not None and each.get("content") == content:
                    return each["id"]
    return None
