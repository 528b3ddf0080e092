"""Checks of hooks when a model is loaded, on models of transformers that break common assumptions, against their own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experiment import Laboratory
from tiny_models import D_MODEL, END_OF_TEXT, SIZES, VOCAB_SIZE, edit_config, write_random_model, write_tiny_model

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import HOOKS
from saeens_pipeline.language_models.hook_checks import checked_in_float32, term_errors
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model, validate_modules
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.patching import PatchedWindows, patching_problem
from saeens_pipeline.language_models.tokens import TokenBatch, open_tokens
from saeens_pipeline.storage.names import Address, Partition

BLOOM = {"vocab_size": VOCAB_SIZE, "hidden_size": D_MODEL, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
GQA = {**SIZES, "num_key_value_heads": 2}
MOE = {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Falcon": SIZES,  # adds the output of attention to that of the MLP in place
    "Bloom": BLOOM,  # attention and MLP return sums with the stream
    "Mpt": {"vocab_size": VOCAB_SIZE, "d_model": D_MODEL, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},  # the MLP does
    "Granite": {**GQA, "residual_multiplier": 0.22},  # scales both
    "GraniteMoeShared": {**MOE, "residual_multiplier": 0.22, "shared_intermediate_size": 32},  # adds the output of a second MLP
    "Doge": GQA,  # scales the stream
    "MiniMax": {**MOE, "head_dim": 8},  # adds to the normalised stream
    "Mixtral": MOE,
}
TERMS = ("attn_out", "resid_mid", "mlp_out")
ALLOWED = {  # read off the forward functions of the blocks
    "Falcon": {"attn_out", "mlp_out"},
    "Bloom": {"resid_mid"},
    "Mpt": {"attn_out", "resid_mid"},
    "Granite": {"resid_mid"},
    "GraniteMoeShared": {"resid_mid"},
    "Doge": set(),
    "MiniMax": set(),
    "Mixtral": set(TERMS),
}


def _load(path: Path) -> LanguageModel:
    return load_language_model(describe_language_model(str(path)))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(MODELS))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LanguageModel]:
    name = request.param
    return name, _load(write_random_model(tmp_path_factory.mktemp("models") / name, name, **MODELS[name]))


@pytest.mark.parametrize("hook", TERMS)
def test_terms_that_are_not_in_the_sum_are_refused_with_the_error_and_the_others(named, hook, tokens):
    name, model = named
    if hook in ALLOWED[name]:
        assert model.activations(tokens, hook, [0, 2]).keys() == {0, 2}
        return
    others = ", ".join(each for each in HOOKS if each in ALLOWED[name] | {"resid_pre", "resid_post"})
    reason = r"relative error \d|cannot be tested|no stream between|is not available in this model"
    with pytest.raises(ConfigurationError, match=rf"(?s)hook '{hook}' .*({reason})") as refused:
        model.activations(tokens, hook, [0, 1, 2])
    if "relative error" in str(refused.value):
        assert f"available: {others}, or a module path" in str(refused.value)


def test_accepted_terms_add_up_and_do_not_depend_on_the_layers_read_with_them(named, tokens):
    name, model = named
    read = {hook: model.activations(tokens, hook, [0, 1, 2]) for hook in ("resid_pre", *sorted(ALLOWED[name]), "resid_post")}
    for hook, of_layer in read.items():
        for layer, together in of_layer.items():
            assert torch.equal(model.activations(tokens, hook, [layer])[layer], together)
    if "mlp_out" in read:
        for layer in (0, 1, 2):
            torch.testing.assert_close(sum(read[hook][layer] for hook in ("resid_pre", "attn_out", "mlp_out")), read["resid_post"][layer])


def test_the_error_of_a_term_is_the_part_that_is_missing_relative_to_it():
    pre, attention, mlp = torch.randn(3, 2, 5, D_MODEL, generator=torch.Generator().manual_seed(0)).unbind()
    block = {"resid_pre": pre, "attn_out": attention, "mlp_out": mlp, "resid_mid": pre + attention, "resid_post": pre + attention + mlp}
    assert max(term_errors(block).values()) < 1e-6
    scaled = block | {"mlp_out": mlp / 0.22}
    assert term_errors(scaled)["mlp_out"] == pytest.approx(0.78, rel=1e-4)
    assert max(term_errors(scaled)[hook] for hook in ("attn_out", "resid_mid")) < 1e-6
    at_one_token = block | {"resid_post": block["resid_post"].clone()}
    at_one_token["resid_post"][1, 3] += 0.5 * mlp[1, 3]
    assert term_errors(at_one_token)["mlp_out"] == pytest.approx(0.5, rel=1e-4)
    parallel = {**block, "resid_mid": pre, "resid_post": pre + attention + mlp}
    assert term_errors(parallel)["resid_mid"] > 0.1 and term_errors(parallel)["attn_out"] < 1e-6
    halves = {hook: values.bfloat16() for hook, values in block.items()}
    assert max(term_errors(halves).values()) < 1e-3  # what rounding explains is no error
    assert term_errors({"resid_pre": pre, "attn_out": attention}) == {}


# attention to later tokens


def test_models_that_attend_to_later_tokens_or_padding_are_refused_when_they_are_loaded(tmp_path: Path):
    path = write_random_model(tmp_path / "model", "RobertaForMaskedLM", **SIZES, type_vocab_size=1, pad_token_id=1)
    for weights in ("trained", "random"):
        with pytest.raises(ConfigurationError, match=r"\(roberta\) is not causal: later tokens or padding change .*relative error 0\.\d"):
            load_language_model(describe_language_model(str(path)), weights)
    edit_config(path, is_decoder=True)
    assert _load(path).description.model_type == "roberta"


def test_a_module_that_reads_later_tokens_is_refused_by_its_path(tmp_path: Path, tokens):
    model = _load(write_tiny_model(tmp_path / "model", "llama"))
    module = model.model.get_submodule("model.layers.1.mlp.down_proj")
    reads_ahead = module.register_forward_hook(lambda _, args, output: output + output.mean(1, keepdim=True))
    with pytest.raises(ConfigurationError, match=r"not causal: later tokens or padding change 'model\.layers\.{layer}\.mlp\.down_proj'"):
        model.activations(tokens, "model.layers.{layer}.mlp.down_proj", [1])
    reads_ahead.remove()
    assert model.activations(tokens, "model.layers.{layer}.mlp.down_proj", [1])[1].shape == (3, 12, D_MODEL)


def test_a_module_that_runs_twice_is_refused(tmp_path: Path, tokens):
    model = _load(write_tiny_model(tmp_path / "model", "llama"))
    layers: Any = model.model.get_submodule("model.layers")
    layers[2] = layers[0]
    with pytest.raises(SaeensError, match=r"'model\.layers\.{layer}', layer 0: its module runs more than once"):
        model.activations(tokens, "model.layers.{layer}", [0])


# low precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_errors_of_a_hook_are_found_at_low_precision(tmp_path: Path, tokens, dtype):
    path = write_random_model(tmp_path / "granite", "Granite", **{**MODELS["Granite"], "residual_multiplier": 0.97})
    model = load_language_model(describe_language_model(str(path)), dtype=dtype)
    with pytest.raises(ConfigurationError, match=r"'mlp_out' is not available .*relative error 0\.03"):
        model.activations(tokens, "mlp_out", [0, 1])
    model = load_language_model(describe_language_model(str(write_tiny_model(tmp_path / "llama", "llama"))), dtype=dtype)
    for hook in ("resid_post", "attn_out", "mlp_out", "resid_mid"):
        assert model.activations(tokens, hook, [0, 1, 2])[1].dtype == getattr(torch, dtype)
        assert patching_problem(model, hook, [0, 1, 2]) == ""
    module = model.model.get_submodule("model.layers.1.mlp.down_proj")
    module.register_forward_hook(lambda _, args, output: output + 0.02 * output.mean(1, keepdim=True))
    with pytest.raises(ConfigurationError, match=r"not causal: later tokens or padding change 'model\.layers\.{layer}\.mlp\.down_proj'"):
        model.activations(tokens, "model.layers.{layer}.mlp.down_proj", [1])


@pytest.mark.parametrize("name", ["Mixtral", "Bloom"])
def test_a_check_computes_in_float32_and_leaves_the_weights_as_they_were(tmp_path: Path, tokens, name):
    path = write_random_model(tmp_path / "model", name, **MODELS[name])
    model = load_language_model(describe_language_model(str(path)), dtype="bfloat16").model
    wide = load_language_model(describe_language_model(str(path)), dtype="bfloat16").model.float()
    before = {key: (values.dtype, values.data_ptr()) for key, values in model.state_dict().items()}

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=tokens, use_cache=False).logits

    found = checked_in_float32(model, lambda: logits(model))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(wide))
    assert {key: (values.dtype, values.data_ptr()) for key, values in model.state_dict().items()} == before

    n_calls: list[int] = []

    def fails_in_float32() -> torch.Tensor:
        n_calls.append(1)
        if model.get_input_embeddings()(tokens).dtype == torch.float32:
            raise TypeError("expected bfloat16")
        return logits(model)

    assert checked_in_float32(model, fails_in_float32).dtype == torch.bfloat16
    assert len(n_calls) == 2
    assert {key: (values.dtype, values.data_ptr()) for key, values in model.state_dict().items()} == before


def test_a_wrong_hook_is_refused_before_tokens_are_written(empty: Laboratory, granite):
    empty.declare(granite | {"hook": "mlp_out"})
    with pytest.raises(Exception, match=r"hook 'mlp_out' is not available"):
        empty.run()
    assert not list(empty.root.rglob("tokens.zarr*"))


# patching


def _whole(tokens: torch.Tensor) -> TokenBatch:
    zeros = torch.zeros(tokens.shape, dtype=torch.int32)
    return TokenBatch(tokens, torch.ones(tokens.shape, dtype=torch.bool), zeros, zeros)


def test_rows_put_back_give_the_models_own_logits_after_other_rows_were_there(named, tokens):
    name, model = named
    with torch.no_grad():
        expected = model.model(input_ids=tokens, use_cache=False).logits
    for hook in ("resid_pre", "resid_post", *sorted(ALLOWED[name] - {"resid_mid"})):
        assert patching_problem(model, hook, [0, 1, 2]) == ""
        for layer in (0, 1, 2):
            found = PatchedWindows(model, _whole(tokens), hook, layer)
            there = found.activations.clone()
            assert not torch.allclose(found.logits(torch.zeros_like(there)), expected)
            torch.testing.assert_close(found.logits(found.activations), expected)
            assert torch.equal(found.activations, there)


def test_a_patch_that_changes_the_logits_or_fails_is_a_problem_with_its_layer(tmp_path: Path):
    model = _load(write_tiny_model(tmp_path / "model", "llama"))
    assert patching_problem(model, "resid_post", [0, 1, 2]) == ""
    n_calls: list[int] = []
    head = model.model.get_submodule("lm_head")
    other_each_time = head.register_forward_hook(lambda _, args, output: n_calls.append(1) or output * (1 + 0.1 * len(n_calls)))
    problem = "layer 1: the activations that were there, put back, change the logits (relative error"
    assert problem in patching_problem(model, "resid_post", [1])
    other_each_time.remove()
    model.module("resid_post", 2).register_forward_hook(lambda _, args, output: {}[0])
    assert "the model fails with replaced activations (KeyError" in patching_problem(model, "resid_post", [0])


@pytest.fixture
def granite(empty: Laboratory, tmp_path: Path) -> dict[str, Any]:
    path = write_random_model(tmp_path / "granite", "Granite", **{**MODELS["Granite"], "hidden_size": D_MODEL})
    return {"language_model": str(path), "hook": "resid_mid"}


def test_a_loss_whose_patch_does_not_hold_is_refused_before_any_training(empty: Laboratory, granite):
    empty.declare(granite, ce_loss_tokens=100)
    with pytest.raises(Exception, match=r"ce_loss_tokens: 100, but hook 'resid_mid' of .* nothing can be put in its place"):
        empty.run()
    assert not list(empty.root.rglob("sae_weights.safetensors"))


# files


def test_identity_follows_the_weights_that_transformers_loads(tmp_path: Path):
    path = write_tiny_model(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    save_file(weights, path / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

    def seen() -> tuple[Any, torch.Tensor]:
        return describe_language_model(str(path)).identity, _load(path).model(input_ids=torch.arange(10)[None]).logits

    identity, logits = seen()
    for file in ("model-00001-of-00001.safetensors", "model.safetensors"):
        save_file({name: value * 1.5 for name, value in weights.items()}, path / file, {"format": "pt"})
        changed, other_logits = seen()
        assert (changed != identity) == (not torch.equal(logits, other_logits)) == (file == "model.safetensors")
    (path / "model.safetensors").unlink()
    assert set(describe_language_model(str(path)).identity["sha256"]) >= {"model-00001-of-00001.safetensors"}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "settings", "context_length"),
    [
        ("Mamba", {"vocab_size": VOCAB_SIZE, "hidden_size": D_MODEL, "num_hidden_layers": 3, "state_size": 8}, None),
        ("Bloom", BLOOM, None),
        ("Falcon", SIZES, 2048),  # the default of transformers
        (
            "Bart",
            {
                "vocab_size": VOCAB_SIZE,
                "d_model": D_MODEL,
                "decoder_layers": 3,
                "encoder_layers": 2,
                "decoder_attention_heads": 4,
                "max_position_embeddings": 64,
                "is_decoder": True,
                "is_encoder_decoder": False,
            },
            64,
        ),
    ],
)
def test_sizes_that_config_json_leaves_out_are_those_of_transformers(tmp_path: Path, tokens, name, settings, context_length):
    path = write_random_model(tmp_path / "model", name, **settings)
    if name == "Falcon":
        edit_config(path, max_position_embeddings=None)
    model = _load(path)
    found = model.description
    assert (found.d_model, found.n_layers, found.context_length, found.vocab_size) == (D_MODEL, 3, context_length, VOCAB_SIZE)
    with torch.no_grad():
        expected = model.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[0 if name == "Mamba" else 1]
    assert torch.equal(model.activations(tokens, "resid_pre", [1])[1], expected)  # Mamba's list begins after the first block


def test_a_reward_model_gives_the_activations_of_its_base_and_no_loss(tmp_path: Path, tokens):
    path = write_random_model(tmp_path / "model", "LlamaForSequenceClassification", **GQA, num_labels=1, pad_token_id=0)
    from transformers import AutoModelForSequenceClassification

    with torch.no_grad():
        hidden = AutoModelForSequenceClassification.from_pretrained(path)(tokens, output_hidden_states=True).hidden_states
    model = _load(path)
    assert not model.description.has_head and model.unembedding() is None
    torch.testing.assert_close(model.activations(tokens, "resid_post", [1])[1], hidden[2])
    assert "no language-modelling head" in patching_problem(model, "resid_post", [1])


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
    {"quant_method": "aqlm"},
]


@pytest.mark.parametrize("quantised", QUANTISED)
def test_quantised_weights_without_their_library_are_refused_before_any_work(tmp_path: Path, quantised):
    path = write_tiny_model(tmp_path / "model")
    edit_config(path, quantization_config=quantised)
    description = describe_language_model(str(path))
    for refuse in (lambda: validate_modules(description, "resid_post", [0]), lambda: load_language_model(description)):
        with pytest.raises(ConfigurationError, match=r"requires|No GPU|needs") as refused:
            refuse()
        assert "\n" not in str(refused.value)
    validate_modules(description, "resid_post", [0], "random")


def test_recipes_hold_a_beginning_of_sequence_token_only_where_there_is_one(empty: Laboratory):
    empty.declare()
    assert "prepend_bos" not in empty.declarations()["tiny/tokens"].settings
    empty.declare({"prepend_bos": True})
    assert empty.declarations()["tiny/tokens"].settings["prepend_bos"] is True
    empty.run(select=["activations"])
    tokens = open_tokens(empty.store.require(Address("tiny", "source", "tokens"), Partition()).path)
    assert next(tokens.batches("train", 2)).tokens[:, 0].tolist() == [END_OF_TEXT] * 2


def test_random_weights_need_no_weights_file(empty: Laboratory, tmp_path: Path):
    path = write_tiny_model(tmp_path / "model")
    with_weights = describe_language_model(str(path), weights="random").identity
    assert with_weights == describe_language_model(str(path)).identity  # as in older recipes
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="lacks its weights"):
        describe_language_model(str(path))
    empty.declare({"language_model": str(path), "weights": "random"})
    empty.run(select=["activations"])
    assert list(empty.root.rglob("activations.zarr"))
