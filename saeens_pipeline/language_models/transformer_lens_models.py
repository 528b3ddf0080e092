"""Language models in TransformerLens' own format, such as GELU-1L: `transformer_lens:gelu-1l`.

They are repositories or folders with TransformerLens' config.json, weights as model.safetensors or `*final.pth`, and a tokenizer, either
their own or that of the repository in `tokenizer_name`. Weights are used unchanged (TransformerLens' "no processing"). torch's restricted
unpickler reads `.pth` files; it builds tensors and calls no code.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from saeens_pipeline.errors import ConfigurationError
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

REPOSITORIES = {
    f"{name.lower().replace('_', '-')}-{n}l": f"NeelNanda/{name}_{n}L512W_C4_Code"
    for name in ("GELU", "SoLU", "Attn_Only")
    for n in (1, 2, 3, 4)
}
"""Repositories on the hub, by TransformerLens' name of the model."""

CONFIG, SAFETENSORS, PICKLE = "config.json", "model.safetensors", "*final.pth"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def describe_transformer_lens_model(name: str, revision: str, weights: Weights = "trained") -> LanguageModelDescription:
    """Return the description of `transformer_lens:NAME`: one of REPOSITORIES, another repository in that format, or a folder.

    Does not need TransformerLens. Documents are separated by the beginning-of-text token, if the tokenizer has one, as in the training of
    these models. Raises as `describe_language_model`.
    """
    repository = repository_of(name)
    folder = locate_model(repository, revision, [CONFIG, *_TOKENIZER_FILES])
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
        files = [folder.path / CONFIG, tokenizer_file]
        try:
            files.append(weights_file(name, folder.path))
        except ConfigurationError:
            if weights == "trained":
                raise
        identity["sha256"] = {file.name: weights_fingerprint(file) for file in files}
    return replace(
        describe_transformer_lens_configuration(name, revision, folder.path),
        end_of_text=_token_id(tokenizer.path, "bos_token"),
        identity=identity,
        commit=folder.commit,
        tokenizer_file=tokenizer_file,
        begin_of_text=_token_id(tokenizer.path, "bos_token"),
    )


def describe_transformer_lens_configuration(name: str, revision: str, path: Path) -> LanguageModelDescription:
    """Return the description of a model from the config.json in a folder, without tokenizer and identity."""
    config = read_config(name, path)
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=path,
        model_type="transformer_lens",
        d_model=read_size(config, path, "d_model"),
        n_layers=read_size(config, path, "n_layers"),
        context_length=read_size(config, path, "n_ctx"),
        vocab_size=read_size(config, path, "d_vocab"),
        end_of_text=None,
        parallel_residual=bool(config.get("parallel_attn_mlp")),
        identity={},
        without=("resid_mid", "mlp_out") if config.get("attn_only") else (),
    )


def transformer_lens_block_parameters(description: LanguageModelDescription) -> int:
    """Return the number of parameters of one block, from config.json: without TransformerLens, which would build the model."""
    config = read_config(description.name, description.path)
    d_model, d_heads = description.d_model, read_size(config, description.path, "n_heads") * read_size(config, description.path, "d_head")
    norm = 2 * d_model if config.get("normalization", config.get("normalization_type")) == "LN" else 0
    attention = 4 * d_model * d_heads + 3 * d_heads + d_model + norm
    if config.get("attn_only"):
        return attention
    d_mlp = config.get("d_mlp") or 4 * d_model
    return attention + 2 * d_model * d_mlp + d_mlp + d_model + norm


def repository_of(name: str) -> str:
    place = name.removeprefix(TRANSFORMER_LENS)
    return REPOSITORIES.get(place, place)


def weights_file(name: str, path: Path) -> Path:
    for file in (path / SAFETENSORS, *sorted(path.glob(PICKLE))):
        if file.is_file():
            return file
    raise ConfigurationError(f"language model {name!r}: {path} lacks its weights, {SAFETENSORS} or {PICKLE}")


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
