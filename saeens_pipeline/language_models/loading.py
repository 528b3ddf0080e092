"""Loading of language models in transformers' format, and checks of their modules. It loads torch and transformers."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from saeens_pipeline.errors import ConfigurationError, SaeensError, counted
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.descriptions import (
    HUB_FILES,
    HUB_WEIGHTS,
    TRANSFORMER_LENS,
    LanguageModelDescription,
    Weights,
    weight_files,
)
from saeens_pipeline.language_models.gguf_loading import dequantise, read_gguf_config
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.models import quantisation, quiet_transformers
from saeens_pipeline.language_models.transformer_lens_loading import load_transformer_lens_model
from saeens_pipeline.language_models.transformer_lens_models import transformer_lens_block_parameters


def validate_modules(description: LanguageModelDescription, hook: str, layers: Collection[int], weights: Weights = "trained") -> None:
    """Raise ConfigurationError for a layer without the module of a hook, and for an architecture that transformers does not know.

    Also for quantised weights whose library is not installed. Takes some seconds, since it imports transformers.
    """
    if weights == "trained" and not description.name.startswith(TRANSFORMER_LENS):
        _require_quantiser(description)
    model = _structure(description)
    for layer in layers:
        model.module(hook, layer)


def _require_quantiser(description: LanguageModelDescription) -> None:
    """Raise ConfigurationError for quantised weights that transformers cannot read on this machine."""
    quantised = quantisation(description)
    if not quantised:
        return
    try:
        with quiet_transformers():
            if AutoHfQuantizer.supports_quant_method(quantised):
                AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # ImportError, RuntimeError without a GPU, and what a damaged configuration raises
        raise ConfigurationError(
            f"the weights of {description.name} are quantised ({quantised.get('quant_method', 'unknown method')}) and cannot be read here: "
            f"{_one_line(error)}"
        ) from error


def block_parameters(description: LanguageModelDescription) -> list[int]:
    """Return the number of parameters of each block, without embeddings. Raises the errors of `validate_modules`."""
    if description.name.startswith(TRANSFORMER_LENS):
        return [transformer_lens_block_parameters(description)] * description.n_layers
    of_blocks = [0] * description.n_layers
    for name, weights in _structure(description).model.named_parameters():
        found = re.search(r"\.(\d+)\.", name)
        if found and int(found[1]) < len(of_blocks):
            of_blocks[int(found[1])] += weights.numel()
    return of_blocks


def _structure(description: LanguageModelDescription) -> LanguageModel:
    """Return the language model without weights, on torch's meta device."""
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

    Downloads trained weights of a model on the hub, unless they are in its cache, and dequantises a GGUF file at its first use.
    `weights="random"` builds the untrained architecture, initialised from `seed`, as a control. Raises SaeensError for weights that are
    missing in the files, ConfigurationError for an architecture that transformers does not know, for files that it cannot read, and for a
    model that attends to later tokens.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if description.name.startswith(TRANSFORMER_LENS):
        return load_transformer_lens_model(description, weights, device, torch_dtype, seed)
    if weights == "trained":
        dequantise(description)
    if weights == "trained" and description.commit:
        hub.download(description.name, description.commit, [*HUB_FILES, *HUB_WEIGHTS])
        weight_files(description.name, description.path)
    try:
        with quiet_transformers():
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
        lacking = f"{counted(len(missing), 'tensor')} that config.json asks for: {missing[0]}, ..."
        raise SaeensError(f"the weights in {description.path} lack {lacking}")
    return model


def _untrained(description: LanguageModelDescription, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    if description.gguf_file:
        config = read_gguf_config(description)
    else:
        config = AutoConfig.from_pretrained(description.path, local_files_only=True, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
