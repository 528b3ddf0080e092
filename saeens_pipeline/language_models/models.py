"""Descriptions of language models: transformers' format, local or on the hub, and TransformerLens' format."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeens_pipeline.language_models.descriptions import (
    HUB_FILES,
    TRANSFORMER_LENS,
    LanguageModelDescription,
    Weights,
    find_size,
    identity_of,
    locate_model,
    read_config,
    read_size,
    require_tokenizer,
)
from saeens_pipeline.language_models.gguf_models import describe_gguf, gguf_file
from saeens_pipeline.language_models.transformer_lens_models import describe_transformer_lens_model

_PARALLEL_RESIDUAL_TYPES = ("codegen", "cohere", "falcon", "gpt_neox", "gptj", "phi")
_SIZES = {
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "n_layers": ("decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "context_length"),
    "vocab_size": ("vocab_size",),
}
_WITHOUT_HEAD = re.compile(r"(?<!LMHead)(?<!DoubleHeads)Model$|For(Sequence|Token)Classification$|ForQuestionAnswering$|ForMultipleChoice$")
"""Classes without a language-modelling head: base models, and reward models and other classifiers."""


def describe_language_model(name: str, revision: str = "main", weights: Weights = "trained") -> LanguageModelDescription:
    """Describe `builtin/reference`, `builtin/smollm2`, a local folder in transformers' format, a GGUF file, a model on the hub, or
    `transformer_lens:NAME`.

    Downloads configuration and tokenizer of a model on the hub, unless they are in its cache. Loads neither torch nor transformers, unless
    config.json leaves sizes to the defaults of transformers. Random weights need no weights file.
    Raises ConfigurationError for a model that does not exist or that the hub refuses, for missing config.json, tokenizer.json or
    safetensors weights, for an incomplete configuration, and as `describe_gguf`; SaeensError if the hub cannot be reached.
    """
    if name.startswith(TRANSFORMER_LENS):
        return describe_transformer_lens_model(name, revision, weights)
    if file := gguf_file(name):
        return describe_gguf(name, revision, file)
    folder = locate_model(name, revision, HUB_FILES)
    return replace(
        describe_configuration(name, revision, folder.path),
        identity=identity_of(name, revision, folder, weights),
        commit=folder.commit,
        tokenizer_file=require_tokenizer(name, folder),
    )


def describe_configuration(name: str, revision: str, path: Path) -> LanguageModelDescription:
    """Describe a model from the config.json in a folder, without tokenizer and identity. Raises as `describe_language_model`."""
    config = read_config(name, path)
    text = config.get("text_config", config)  # the language part of a multimodal model
    model_type = str(text.get("model_type", config.get("model_type", "unknown")))
    if any(find_size(text, *keys) is None for keys in _SIZES.values()):
        text = _with_defaults(path, text)
    end_of_text = text.get("eos_token_id", config.get("eos_token_id"))
    begin_of_text = text.get("bos_token_id", config.get("bos_token_id"))
    classes = [str(each) for each in config.get("architectures") or []]
    parallel = bool(text.get("use_parallel_residual", text.get("parallel_attn", model_type in _PARALLEL_RESIDUAL_TYPES)))
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=path,
        model_type=model_type,
        d_model=read_size(text, path, *_SIZES["d_model"]),
        n_layers=read_size(text, path, *_SIZES["n_layers"]),
        context_length=find_size(text, *_SIZES["context_length"]),
        vocab_size=read_size(text, path, *_SIZES["vocab_size"]),
        end_of_text=next(iter(end_of_text), None) if isinstance(end_of_text, list) else end_of_text,
        parallel_residual=parallel,
        identity={},
        begin_of_text=begin_of_text if isinstance(begin_of_text, int) else None,
        has_head=not classes or not all(_WITHOUT_HEAD.search(each) for each in classes),
    )


def _with_defaults(path: Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the sizes that transformers' own class adds to config.json; as it is where transformers cannot read it.

    The class also maps its own names of sizes, such as n_embd, to the common ones.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            complete = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config(decoder=True)
    except Exception:  # the missing size is reported by name
        return dict(text)
    defaults = {key: getattr(complete, key, None) for keys in _SIZES.values() for key in keys}
    return defaults | {key: value for key, value in text.items() if value is not None}


def quantisation(description: LanguageModelDescription) -> dict[str, Any]:
    """Return the settings of quantised weights in transformers' format; empty for others, and for GGUF, which is dequantised."""
    if description.name.startswith(TRANSFORMER_LENS) or description.gguf_file:
        return {}
    config = read_config(description.name, description.path)
    return config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence loading bars and warnings of transformers, which would break the progress display."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
