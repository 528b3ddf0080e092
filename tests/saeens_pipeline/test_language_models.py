"""Describing and loading language models, and reading their activations at a hook."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT_LENGTH, D_MODEL, END_OF_TEXT, N_LAYERS, VOCAB_SIZE, Architecture, edit_config, write_tiny_model

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import descriptions
from saeens_pipeline.language_models.descriptions import HOOKS, validate_hook
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model, validate_modules
from saeens_pipeline.language_models.models import describe_language_model

LAYERS = list(range(N_LAYERS))


@pytest.fixture(scope="module")
def gpt_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "gpt_neox")


FAMILIES: tuple[Architecture, ...] = get_args(Architecture)
SEQUENTIAL = [family for family in FAMILIES if family != "gpt_neox"]
FINAL_NORMS = {"gpt_neox": "gpt_neox.final_layer_norm", "llama": "model.norm", "gemma2": "model.norm", "gpt2": "transformer.ln_f"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(describe_language_model(str(write_tiny_model(tmp_path_factory.mktemp("models") / "model", request.param))))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def copied(gpt_neox: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt_neox, tmp_path / "model"))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_descriptions_of_models_have_the_values_of_their_configuration(architecture, tmp_path):
    path = write_tiny_model(tmp_path / "model", architecture)
    found = describe_language_model(str(path))
    assert (found.d_model, found.n_layers, found.context_length, found.vocab_size) == (D_MODEL, N_LAYERS, CONTEXT_LENGTH, VOCAB_SIZE)
    assert (found.model_type, found.end_of_text, found.parallel_residual) == (architecture, END_OF_TEXT, architecture == "gpt_neox")


def test_describing_a_model_imports_neither_torch_nor_transformers(gpt_neox):
    program = (
        "import sys; from saeens_pipeline.language_models import models, tokens; from saeens_pipeline.orchestration import catalogue; "
        "models.describe_language_model(sys.argv[1]); "
        "sys.exit(str({'torch', 'transformers', 'zarr'} & set(sys.modules)) if {'torch', 'transformers', 'zarr'} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program, str(gpt_neox)], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_identity_changes_with_every_file_that_affects_activations(copied, file):
    before = describe_language_model(str(copied)).identity
    (copied / "README.md").write_text("a model card changes nothing")
    assert describe_language_model(str(copied)).identity == before
    content = (copied / file).read_bytes()
    (copied / file).write_bytes(content + b" " if file.endswith("json") else content[:-1] + bytes([content[-1] ^ 1]))
    assert describe_language_model(str(copied)).identity != before


def test_identity_of_large_weights_is_sampled_and_changes_with_their_values(copied, monkeypatch):
    monkeypatch.setattr(descriptions, "_WHOLLY_HASHED_BYTES", 1024)
    monkeypatch.setattr(descriptions, "_SAMPLE_BYTES", 64)
    before = describe_language_model(str(copied)).identity["sha256"]
    assert isinstance(before, dict) and before["model.safetensors"].startswith("sampled-")
    weights = load_file(copied / "model.safetensors")
    save_file({name: value * 1.001 for name, value in weights.items()}, copied / "model.safetensors", metadata={"format": "pt"})
    after = describe_language_model(str(copied)).identity["sha256"]
    assert after != before


def _remove(*names: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return remove


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_remove("config.json"), "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
        (lambda path: edit_config(path, hidden_size=None, model_type="no_such_model"), "gives none of hidden_size"),
        (_remove("tokenizer.json"), "no tokenizer.json"),
        (_remove("model.safetensors"), "lacks its weights, model.safetensors"),
        (_pickled, "pickle.*convert it to safetensors"),
        (shutil.rmtree, "no such folder.*builtin/reference"),
    ],
)
def test_incomplete_folders_are_refused_with_their_missing_files(copied, break_it, message):
    break_it(copied)
    with pytest.raises(ConfigurationError, match=message):
        describe_language_model(str(copied))


def test_an_invalid_model_name_is_refused_with_the_valid_forms():
    for name in ("builtin/other", "a/b/c", "../up", "some model"):
        with pytest.raises(ConfigurationError, match=r"no such folder. It can be builtin/reference, .*hub, or transformer_lens:NAME"):
            describe_language_model(name)


def test_revisions_of_local_models_are_refused(gpt_neox):
    with pytest.raises(ConfigurationError, match="revision 'v2'"):
        describe_language_model(str(gpt_neox), revision="v2")


def test_the_reference_model_is_found_from_every_data_root(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("SAEENS_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(descriptions, "_PACKAGED_REFERENCE_MODEL", tmp_path / "not_a_wheel")
    monkeypatch.setattr(descriptions, "_CHECKED_OUT_REFERENCE_MODEL", copied)
    assert describe_language_model("builtin/reference").path == copied
    shutil.rmtree(copied)
    with pytest.raises(SaeensError, match="saeens reference-model train"):
        describe_language_model("builtin/reference")


def test_layers_that_the_model_lacks_are_refused_with_the_allowed_range(gpt_neox):
    description = describe_language_model(str(gpt_neox))
    validate_hook(description, "resid_post", [0, 2])
    for layer in (-1, 3):
        with pytest.raises(ConfigurationError, match=rf"has no layer {layer}: it has layers 0 to 2"):
            validate_hook(description, "resid_post", [0, layer])


@pytest.mark.parametrize(("hook", "message"), [("resid_mid", "parallel.*available: resid_pre"), ("residpost", "'residpost' is not known")])
def test_unknown_hooks_are_refused_with_those_of_the_model(gpt_neox, hook, message):
    with pytest.raises(ConfigurationError, match=message):
        validate_hook(describe_language_model(str(gpt_neox)), hook, [0])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_modules_are_validated_without_reading_weights(tmp_path, architecture):
    path = write_tiny_model(tmp_path / "model", architecture)
    description = describe_language_model(str(path))
    (path / "model.safetensors").unlink()
    for hook in HOOKS:
        if hook != "resid_mid" or architecture in SEQUENTIAL:
            validate_modules(description, hook, LAYERS)
    block = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}.get(architecture, "model.layers")
    validate_modules(description, block + ".{layer}.mlp", LAYERS)
    with pytest.raises(ConfigurationError, match=rf"has no module '{block}\.2\.router'; it has .*{block}\.2\.mlp"):
        validate_modules(description, block + ".{layer}.router", [2])


def test_unembedding_normalises_the_residual_stream(model, tokens):
    with torch.no_grad():
        output = model.model(tokens, output_hidden_states=True)
    unembedding = model.unembedding()
    assert unembedding.shape == (model.description.vocab_size, model.description.d_model)
    logits = output.hidden_states[-1] @ unembedding.T
    if model.description.model_type == "gemma2":  # caps its logits
        logits = torch.tanh(logits / 30.0) * 30.0
    torch.testing.assert_close(logits, output.logits)


def test_resid_post_and_resid_pre_equal_the_hidden_states_of_transformers(model, tokens):
    with torch.no_grad():
        expected = model.model(tokens, output_hidden_states=True).hidden_states
    post, pre = model.activations(tokens, "resid_post", LAYERS), model.activations(tokens, "resid_pre", LAYERS)
    for layer in LAYERS[:-1]:
        assert torch.equal(post[layer], expected[layer + 1])
    for layer in LAYERS:
        assert torch.equal(pre[layer], expected[layer])
    final_norm = model.model.get_submodule(FINAL_NORMS[model.description.model_type])
    with torch.no_grad():
        assert torch.equal(final_norm(post[LAYERS[-1]]), expected[-1])


def test_a_block_adds_the_outputs_of_attention_and_mlp_to_its_input(model, tokens):
    parts = [model.activations(tokens, hook, [1])[1] for hook in ("resid_pre", "attn_out", "mlp_out")]
    torch.testing.assert_close(sum(parts), model.activations(tokens, "resid_post", [1])[1])


@pytest.mark.parametrize("architecture", SEQUENTIAL)
def test_the_residual_stream_is_the_sum_of_attention_and_mlp_outputs(architecture, tmp_path, tokens):
    model = load_language_model(describe_language_model(str(write_tiny_model(tmp_path / "model", architecture))))
    for layer in LAYERS:
        pre, attention, mid, mlp, post = (
            model.activations(tokens, hook, [layer])[layer] for hook in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        assert torch.equal(pre + attention, mid)
        assert torch.equal(mid + mlp, post)


def test_gemma_2_adds_normalised_outputs_to_the_residual_stream(tmp_path, tokens):
    model = load_language_model(describe_language_model(str(write_tiny_model(tmp_path / "model", "gemma2"))))
    for hook, inside, norm in (
        ("attn_out", "self_attn", "post_attention_layernorm"),
        ("mlp_out", "mlp", "post_feedforward_layernorm"),
    ):
        before = model.activations(tokens, f"model.layers.{{layer}}.{inside}", [1])[1]
        with torch.no_grad():
            assert torch.equal(model.activations(tokens, hook, [1])[1], model.model.get_submodule(f"model.layers.1.{norm}")(before))


def test_layers_read_one_by_one_equal_those_of_one_forward_pass(model, tokens):
    together = model.activations(tokens, "resid_post", LAYERS)
    for layer in LAYERS:
        assert torch.equal(model.activations(tokens, "resid_post", [layer])[layer], together[layer])


def test_the_forward_pass_stops_after_the_deepest_requested_layer(model, tokens):
    ran: list[int] = []
    blocks = [model.module("resid_post", layer) for layer in LAYERS]
    handles = [block.register_forward_hook(lambda *_, layer=layer: ran.append(layer)) for layer, block in enumerate(blocks)]
    model.activations(tokens, "resid_post", [1, 0])
    ran.clear()  # the first call also checks the hook
    model.activations(tokens, "resid_post", [1, 0])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_reading_activations_restores_the_model(model, tokens):
    with torch.no_grad():
        before = model.model(tokens).logits
        model.activations(tokens, "mlp_out", [0])
        assert torch.equal(model.model(tokens).logits, before)


def test_a_module_path_reads_the_output_of_that_module(tmp_path, tokens):
    model = load_language_model(describe_language_model(str(write_tiny_model(tmp_path / "model", "llama"))))
    layer_input = model.activations(tokens, "model.layers.{layer}.input_layernorm", [1])[1]
    norm = model.model.get_submodule("model.layers.1.input_layernorm")
    with torch.no_grad():
        assert torch.equal(layer_input, norm(model.activations(tokens, "resid_pre", [1])[1]))
    assert model.widths("model.layers.{layer}.mlp.up_proj", [0, 2]) == {0: 32, 2: 32}
    with pytest.raises(ConfigurationError, match=r"no module 'model.layers.1.mlp.up'; it has .*model.layers.1.mlp"):
        model.activations(tokens, "model.layers.{layer}.mlp.up", [1])


def test_padding_does_not_change_earlier_activations(model, tokens):
    padded = tokens.clone()
    padded[:, 10:] = END_OF_TEXT
    expected = model.activations(tokens, "resid_post", [2])[2][:, :10]
    torch.testing.assert_close(model.activations(padded, "resid_post", [2])[2][:, :10], expected)


def test_random_weights_are_untrained_and_seeded_without_the_global_generator(gpt_neox, tokens):
    description = describe_language_model(str(gpt_neox))
    state = torch.random.get_rng_state()
    first, again, other = (
        load_language_model(description, "random", seed=seed).activations(tokens, "resid_post", [1])[1] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, load_language_model(description).activations(tokens, "resid_post", [1])[1])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: edit_config(path, model_type="no_such_model"), "no_such_model"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json"), "cannot load"),
        (lambda path: edit_config(path, intermediate_size=48), "cannot load"),
    ],
)
def test_unloadable_models_are_reported_in_one_message(copied, break_it, message):
    break_it(copied)
    with pytest.raises(ConfigurationError, match=message):
        load_language_model(describe_language_model(str(copied)))


def test_weights_without_a_required_tensor_are_refused(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SaeensError, match=r"lack 1 tensor .*layers.1.mlp.dense_h_to_4h"):
        load_language_model(describe_language_model(str(copied)))
