"""All causal language models that transformers registers, tiny and random: what is accepted is right, what is not is refused by name."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_models import END_OF_TEXT, VOCAB_SIZE, write_tiny_tokenizer

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.descriptions import HOOKS
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.patching import PatchedWindows, patching_problem
from saeens_pipeline.language_models.tokens import TokenBatch

MOST_PARAMETERS = 3_000_000
N_LAYERS = 2
SIZES = {
    32: (
        "hidden_size",
        "d_model",
        "n_embd",
        "embedding_size",
        "intermediate_size",
        "ffn_dim",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "n_inner",
    ),
    N_LAYERS: ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "decoder_attention_heads",
        "encoder_attention_heads",
        "num_experts",
        "n_routed_experts",
    ),
    2: ("num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group", "num_experts_per_token"),
    8: ("head_dim", "state_size", "moe_intermediate_size", "shared_intermediate_size", "kv_lora_rank", "q_lora_rank", "rotary_dim"),
    64: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    VOCAB_SIZE: ("vocab_size",),
    END_OF_TEXT: ("bos_token_id", "eos_token_id", "pad_token_id"),
}
OTHERS = {
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "num_local_experts": 4,
    "is_decoder": True,
}
LAYERS = list(range(N_LAYERS))


def _tiny_config(config_class: Any) -> Any:
    """A configuration with small values for those of the known sizes that the class has."""
    default = config_class()
    known = default.to_dict().keys() | config_class.attribute_map.keys()
    known -= {"head_dim"} if "qk_rope_head_dim" in known else set()  # derived from it
    wanted = {name: value for value, names in SIZES.items() for name in names} | OTHERS
    return config_class(**{name: value for name, value in wanted.items() if name in known})


def _built(config_class: Any, model_class: Any, path: Path) -> LanguageModel | None:
    """The model as it is loaded from a folder with the configuration alone; None if no tiny one can be built."""
    from transformers import AutoModelForCausalLM

    try:
        config = _tiny_config(config_class)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
        if sum(weights.numel() for weights in whole.parameters()) > MOST_PARAMETERS:
            return None
        config.architectures = [model_class if isinstance(model_class, str) else model_class.__name__]
        config.save_pretrained(path)
    except Exception:
        return None
    write_tiny_tokenizer(path)
    loaded = load_language_model(describe_language_model(str(path), weights="random"), "random")
    generator = torch.Generator().manual_seed(0)
    for weights in loaded.model.parameters():
        if weights.ndim == 1:
            weights.data += 0.3 * torch.randn(weights.shape, generator=generator)
    return LanguageModel(loaded.description, loaded.model)


def _faults(model: LanguageModel, tokens: torch.Tensor, counts: Counter[str]) -> list[str]:
    """Return the faults of accepted activations."""
    found: list[str] = []
    read: dict[str, dict[int, torch.Tensor]] = {}
    for hook in HOOKS:
        try:
            read[hook] = model.activations(tokens, hook, LAYERS)
        except SaeensError:
            counts[f"{hook} refused"] += 1
            continue
        counts[f"{hook} accepted"] += 1
        padded = model.activations(torch.cat([tokens[:, :7], torch.zeros_like(tokens)], 1), hook, LAYERS)
        if not torch.equal(model.activations(tokens, hook, [0])[0], read[hook][0]):
            found.append(f"{hook} of layer 0 depends on the layers read with it")
        for layer, whole in read[hook].items():
            if not torch.allclose(padded[layer][:, :7], whole[:, :7], rtol=1e-3, atol=1e-3 * whole.abs().max().item()):
                found.append(f"{hook} of layer {layer} depends on padding")
        if hook in ("resid_mid", "resid_post"):
            found += _patching_faults(model, tokens, hook, counts)
    if read.keys() >= {"attn_out", "mlp_out", "resid_pre", "resid_post"}:
        for layer in LAYERS:
            error = (read["resid_pre"][layer] + read["attn_out"][layer] + read["mlp_out"][layer] - read["resid_post"][layer]).norm()
            if error > 1e-3 * read["mlp_out"][layer].norm():
                found.append(f"the terms of layer {layer} do not add up")
    return found


def _patching_faults(model: LanguageModel, tokens: torch.Tensor, hook: str, counts: Counter[str]) -> list[str]:
    if patching_problem(model, hook, LAYERS):
        counts["patch refused"] += 1
        return []
    counts["patch accepted"] += 1
    zeros = torch.zeros(tokens.shape, dtype=torch.int32)
    windows = TokenBatch(tokens, torch.ones(tokens.shape, dtype=torch.bool), zeros, zeros)
    with torch.no_grad():
        expected = model.model(input_ids=tokens, use_cache=False).logits
    for layer in LAYERS:
        patch = PatchedWindows(model, windows, hook, layer)
        patch.logits(torch.zeros_like(patch.activations))
        if not torch.allclose(patch.logits(patch.activations), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
            return [f"{hook} of layer {layer}: rows put back give other logits"]
    return []


@pytest.mark.slow
def test_models_of_transformers_are_right_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    tokens = torch.randint(1, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    counts: Counter[str] = Counter()
    faults: dict[str, list[str]] = {}
    for number, (config_class, model_class) in enumerate(cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING).items()):
        name = config_class.__name__.removesuffix("Config")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = _built(config_class, model_class, tmp_path / str(number))
                counts["not built" if model is None else "built"] += 1
                wrong = [] if model is None else _faults(model, tokens, counts)
            except SaeensError:
                counts["refused"] += 1
                continue
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            faults[name] = wrong
    with capsys.disabled():
        print(dict(sorted(counts.items())))
    assert not faults, faults
    assert counts["built"] >= 60
