"""Descriptions and loading of language models: transformers' format, local or on the hub, and TransformerLens' format."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.descriptions import (
    HUB_FILES,
    HUB_WEIGHTS,
    TRANSFORMER_LENS,
    LanguageModelDescription,
    Weights,
    find_size,
    identity_of,
    locate_model,
    read_config,
    read_size,
    require_tokenizer,
    weight_files,
)
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.transformer_lens_models import describe_transformer_lens_model, load_transformer_lens_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
    """Describe `builtin/reference`, a local folder in transformers' format, a model on the hub, or `transformer_lens:NAME`.

    Downloads configuration and tokenizer of a model on the hub, unless they are in its cache. Loads neither torch nor transformers, unless
    config.json leaves sizes to the defaults of transformers. Random weights need no weights file.
    Raises ConfigurationError for a model that does not exist or that the hub refuses, for missing config.json, tokenizer.json or
    safetensors weights, and for an incomplete configuration; SaeensError if the hub cannot be reached.
    """
    if name.startswith(TRANSFORMER_LENS):
        return describe_transformer_lens_model(name, revision, weights)
    folder = locate_model(name, revision, HUB_FILES)
    config = read_config(name, folder.path)
    text = config.get("text_config", config)  # the language part of a multimodal model
    model_type = str(text.get("model_type", config.get("model_type", "unknown")))
    if any(find_size(text, *keys) is None for keys in _SIZES.values()):
        text = _with_defaults(folder.path, text)
    end_of_text = text.get("eos_token_id", config.get("eos_token_id"))
    begin_of_text = text.get("bos_token_id", config.get("bos_token_id"))
    classes = [str(each) for each in config.get("architectures") or []]
    parallel = bool(text.get("use_parallel_residual", text.get("parallel_attn", model_type in _PARALLEL_RESIDUAL_TYPES)))
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=folder.path,
        model_type=model_type,
        d_model=read_size(text, folder.path, *_SIZES["d_model"]),
        n_layers=read_size(text, folder.path, *_SIZES["n_layers"]),
        context_length=find_size(text, *_SIZES["context_length"]),
        vocab_size=read_size(text, folder.path, *_SIZES["vocab_size"]),
        end_of_text=next(iter(end_of_text), None) if isinstance(end_of_text, list) else end_of_text,
        parallel_residual=parallel,
        identity=identity_of(name, revision, folder, weights),
        commit=folder.commit,
        tokenizer_file=require_tokenizer(name, folder),
        begin_of_text=begin_of_text if isinstance(begin_of_text, int) else None,
        has_head=not classes or not all(_WITHOUT_HEAD.search(each) for each in classes),
    )


def _with_defaults(path: Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the sizes that transformers' own class adds to config.json; as it is where transformers cannot read it.

    The class also maps its own names of sizes, such as n_embd, to the common ones.
    """
    from transformers import AutoConfig

    try:
        with _quiet_transformers():
            complete = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config(decoder=True)
    except Exception:  # the missing size is reported by name
        return dict(text)
    defaults = {key: getattr(complete, key, None) for keys in _SIZES.values() for key in keys}
    return defaults | {key: value for key, value in text.items() if value is not None}


def validate_modules(description: LanguageModelDescription, hook: str, layers: Collection[int], weights: Weights = "trained") -> None:
    """Raise ConfigurationError for a layer without the module of a hook, and for an architecture that transformers does not know.

    Also for quantised weights whose library is not installed. Takes some seconds, since it imports transformers.
    """
    if weights == "trained" and not description.name.startswith(TRANSFORMER_LENS):
        _require_quantiser(description)
    model = _structure(description)
    for layer in layers:
        model.module(hook, layer)


def quantisation(description: LanguageModelDescription) -> dict[str, Any]:
    """Return the settings of quantised weights; empty for others."""
    if description.name.startswith(TRANSFORMER_LENS):
        return {}
    config = read_config(description.name, description.path)
    return config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}


def _require_quantiser(description: LanguageModelDescription) -> None:
    """Raise ConfigurationError for quantised weights that transformers cannot read on this machine."""
    quantised = quantisation(description)
    if not quantised:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with _quiet_transformers():
            if AutoHfQuantizer.supports_quant_method(quantised):
                AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # ImportError, RuntimeError without a GPU, and what a damaged configuration raises
        raise ConfigurationError(
            f"the weights of {description.name} are quantised ({quantised.get('quant_method', 'unknown method')}) and cannot be read here: "
            f"{_one_line(error)}"
        ) from error


def block_parameters(description: LanguageModelDescription) -> list[int]:
    """Return the number of parameters of each block, without embeddings. Raises the errors of `validate_modules`."""
    of_blocks = [0] * description.n_layers
    for name, weights in _structure(description).model.named_parameters():
        found = re.search(r"\.(\d+)\.", name)
        if found and int(found[1]) < len(of_blocks):
            of_blocks[int(found[1])] += weights.numel()
    return of_blocks


def _structure(description: LanguageModelDescription) -> LanguageModel:
    """Return the language model without weights, on torch's meta device."""
    import torch

    with torch.device("meta"):
        return load_language_model(description, "random", device="meta")


def load_language_model(
    description: LanguageModelDescription,
    weights: Weights = "trained",
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    seed: int = 0,
) -> LanguageModel:
    """Load a model in evaluation mode. Code and pickles in the folder are not run.

    Downloads trained weights of a model on the hub, unless they are in its cache. `weights="random"` builds the untrained architecture,
    initialised from `seed`, as a control. Raises SaeensError for weights that are missing in the files, ConfigurationError for an
    architecture that transformers does not know, for files that it cannot read, and for a model that attends to later tokens.
    """
    import torch

    torch_dtype: torch.dtype = getattr(torch, dtype)
    if description.name.startswith(TRANSFORMER_LENS):
        return load_transformer_lens_model(description, weights, device, torch_dtype, seed)
    if weights == "trained" and description.commit:
        hub.download(description.name, description.commit, [*HUB_FILES, *HUB_WEIGHTS])
        weight_files(description.name, description.path)
    try:
        with _quiet_transformers():
            model = _trained(description, torch_dtype) if weights == "trained" else _untrained(description, torch_dtype, seed)
        cast("torch.nn.Module", model.eval()).to(device)
    except (SaeensError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, and what a wrong configuration leads to
        raise ConfigurationError(f"transformers cannot load {description.path} as a causal language model: {_one_line(error)}") from error
    loaded = LanguageModel(description, model)
    if device != "meta":
        loaded.require_causal()
    return loaded


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:500] or type(error).__name__}"


def _trained(description: LanguageModelDescription, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        description.path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    unused = set() if description.has_head or head is None else {id(weights) for weights in head.parameters()}
    unused -= {id(weights) for weights in embedding.parameters()}
    unused_names = {name for name, weights in model.named_parameters() if id(weights) in unused}
    missing = sorted(set(report["missing_keys"]) - unused_names)
    if missing:  # transformers would initialise them randomly
        raise SaeensError(f"the weights in {description.path} lack {len(missing)} tensors that config.json asks for: {missing[0]}, ...")
    return model


def _untrained(description: LanguageModelDescription, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(description.path, local_files_only=True, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
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
