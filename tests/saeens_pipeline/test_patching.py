"""Patching activations at a hook: outputs and cost, against full forward passes and the model's own loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_models import CONTEXT_LENGTH, D_MODEL, VOCAB_SIZE, ListedCorpus, edit_config, write_tiny_model
from transformers import PreTrainedModel

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models import patching
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.patching import PatchedWindows, loss_batches, patched
from saeens_pipeline.language_models.tokens import TokenBatch, TokenStore, open_tokens, write_tokens

PATHS = {
    "gpt_neox": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
    "llama": "model.layers.{layer}.input_layernorm",
    "gemma2": "model.layers.{layer}.post_attention_layernorm",
    "gpt2": "transformer.h.{layer}.ln_2",
}
HOOKS = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "module path"]
IGNORED = -100  # as a label: not predicted


@pytest.fixture(scope="module", params=list(PATHS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(describe_language_model(str(write_tiny_model(tmp_path_factory.mktemp("models") / "model", request.param))))


@pytest.fixture(scope="module")
def windows() -> TokenBatch:
    """Three windows, the second with padding at its end; the first position is not kept."""
    tokens = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))
    document = torch.zeros(3, CONTEXT_LENGTH, dtype=torch.int32)
    document[1, 10:] = -1
    kept = document >= 0
    kept[:, 0] = False
    return TokenBatch(tokens, kept, document, torch.arange(CONTEXT_LENGTH, dtype=torch.int32).expand(3, -1))


def _own_loss(model: LanguageModel, windows: TokenBatch) -> float:
    labels = windows.tokens.masked_fill(~windows.is_text, IGNORED)
    with torch.no_grad():
        return model.model(input_ids=windows.tokens, labels=labels).loss.item()


def _hook(model: LanguageModel, hook: str) -> str:
    if hook == "resid_mid" and model.description.parallel_residual:
        pytest.skip("there is nothing between attention and MLP")
    return PATHS[model.description.model_type] if hook == "module path" else hook


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("hook", HOOKS)
def test_patching_the_activations_themselves_gives_the_models_own_loss(model, windows, hook, layer):
    found = PatchedWindows(model, windows, _hook(model, hook), layer)
    assert torch.equal(found.activations, model.activations(windows.tokens, _hook(model, hook), [layer])[layer])
    loss = found.loss(found.rows)
    assert loss.predictions == 2 * (CONTEXT_LENGTH - 1) + 9
    assert loss.mean == pytest.approx(_own_loss(model, windows), rel=1e-6)
    with torch.no_grad():
        assert torch.equal(found.logits(found.activations), model.model(windows.tokens).logits)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("hook", HOOKS)
def test_patching_equals_a_full_forward_pass_with_the_replacement(model, windows, hook, layer):
    found = PatchedWindows(model, windows, _hook(model, hook), layer)
    for rows in (torch.zeros_like(found.rows), found.rows.flip(0)):

        def replace(activations: torch.Tensor, rows: torch.Tensor = rows) -> torch.Tensor:
            return activations.masked_scatter(windows.kept[..., None], rows)

        with patched(model, _hook(model, hook), layer, replace):
            expected = _own_loss(model, windows)
        assert found.loss(rows).mean == pytest.approx(expected, rel=1e-6)
        assert abs(expected - _own_loss(model, windows)) > 1e-4


MLPS = {  # what the MLP adds, of what it reads
    "llama": ["post_attention_layernorm", "mlp"],
    "gemma2": ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"],
    "gpt2": ["ln_2", "mlp"],
}


@pytest.mark.parametrize("architecture", MLPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patching_between_attention_and_mlp_replaces_the_residual_stream(tmp_path: Path, windows, architecture, dtype):
    """The patch replaces both the input of the MLP and the stream to which its output is added, bit for bit."""
    model = load_language_model(describe_language_model(str(write_tiny_model(tmp_path / "model", architecture))), dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    stream = torch.randn(*windows.tokens.shape, D_MODEL, generator=generator).to(getattr(torch, dtype)) * 100
    given: list[torch.Tensor] = []
    model.activations(windows.tokens, "resid_post", [1])  # checks the hook, before it is patched
    with patched(model, "resid_mid", 1, lambda activations: given.append(activations) or stream):
        found = model.activations(windows.tokens, "resid_post", [1])[1]
    added = stream
    with torch.no_grad():
        for part in MLPS[architecture]:
            added = model.module("resid_post", 1).get_submodule(part)(added)
    assert torch.equal(found, stream + added)
    assert torch.equal(given[0], model.activations(windows.tokens, "resid_mid", [1])[1])
    before, attention = (model.activations(windows.tokens, hook, [1])[1] for hook in ("resid_pre", "attn_out"))
    assert torch.equal(given[0], before + attention)


def test_resid_mid_of_an_unsupported_block_is_refused_by_name(tmp_path: Path, windows):
    path = write_tiny_model(tmp_path / "model", "llama")
    model = load_language_model(describe_language_model(str(path)))
    scaled = model.module("resid_post", 1).register_forward_hook(lambda *given: given[-1] * 0.5)
    refused = pytest.raises(ConfigurationError, match=r"hook 'resid_mid' of .* can be read, but nothing can be put in its place")
    with refused, patched(model, "resid_mid", 1, torch.zeros_like):
        model.activations(windows.tokens, "resid_post", [1])
    scaled.remove()


@pytest.mark.parametrize(("scale", "is_refused"), [(1 + 1e-6, False), (1.01, True)])
def test_the_sum_at_resid_mid_may_be_rounded_and_not_scaled(model, scale: float, is_refused: bool):
    """A block may add its terms in another order or dtype, which rounds otherwise."""
    stream, added, replacement = torch.randn(3, 1, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    changes = patching._changes_around(model.description, lambda _: replacement)
    changes["resid_mid"](stream)
    changes["mlp_out"](added)
    if is_refused:
        with pytest.raises(ConfigurationError, match="is not simply added"):
            changes["resid_post"]((stream + added) * scale)
    else:
        assert torch.equal(changes["resid_post"]((stream + added) * scale), replacement + added)


def test_only_kept_positions_are_replaced(model, windows):
    found = PatchedWindows(model, windows._replace(kept=torch.zeros_like(windows.kept)), "resid_post", 1)
    assert found.rows.shape[0] == 0
    assert found.loss(found.rows).mean == pytest.approx(_own_loss(model, windows), rel=1e-6)


def test_zeros_in_the_last_residual_give_the_loss_of_an_empty_residual(model, windows):
    everywhere = windows._replace(kept=torch.ones_like(windows.kept))
    found = PatchedWindows(model, everywhere, "resid_post", 2)
    loss = found.loss(torch.zeros_like(found.rows))
    if model.description.model_type == "llama":  # the final norm of zeros is zero, and all tokens are equally likely
        assert loss.mean == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert loss.mean < found.loss(found.rows * 100).mean


@pytest.mark.parametrize(("hook", "expected"), [("resid_pre", [1, 2]), ("resid_post", [2]), ("mlp_out", [1, 2])])
def test_blocks_before_the_hook_run_once(model, windows, hook, expected):
    ran: list[int] = []
    mlps = [model.module("mlp_out", layer) for layer in range(3)]
    handles = [mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer)) for layer, mlp in enumerate(mlps)]
    found = PatchedWindows(model, windows, hook, 1)
    ran.clear()
    found.loss(found.rows)
    assert ran == expected
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("hook", HOOKS)
def test_patching_restores_the_model(model, windows, hook):
    before = _own_loss(model, windows)
    PatchedWindows(model, windows, _hook(model, hook), 1).loss(torch.zeros(int(windows.kept.sum()), 1).expand(-1, 1))
    assert _own_loss(model, windows) == before
    with pytest.raises(RuntimeError, match="fails"), patched(model, "resid_post", 1, torch.zeros_like):
        raise RuntimeError("fails")
    assert _own_loss(model, windows) == before


# batches of the test split


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("tokens")
    description = describe_language_model(str(write_tiny_model(folder / "model")))
    corpus = ListedCorpus(train=["some text to train on" * 3], test=[f"held-out text {i}, {'long ' * (i % 4)}" for i in range(20)])
    write_tokens(
        folder / "tokens.zarr",
        corpus,
        description,
        context_length=CONTEXT_LENGTH,
        packing="document",
        drop=["first"],
        train_tokens=20,
        test_tokens=300,
    )
    return open_tokens(folder / "tokens.zarr")


def test_all_windows_cover_the_test_split_from_short_to_long(model, tokens):
    everything = next(tokens.batches("test", 1000))
    everything = TokenBatch(*(values[everything.is_text.sum(1).argsort(stable=True)] for values in everything))
    batches = list(loss_batches(model, tokens, "resid_post", 1, n_rows=300))
    expected = model.activations(everything.tokens, "resid_post", [1])[1][everything.kept]
    torch.testing.assert_close(torch.cat([batch.x for batch in batches]), expected)
    total = sum(batch.loss(batch.x).total for batch in batches)
    n_predictions = sum(batch.loss(batch.x).predictions for batch in batches)
    assert total / n_predictions == pytest.approx(_own_loss(model, everything), rel=1e-5)


@pytest.mark.parametrize("batch_windows", [1, 3, 100])
def test_a_sample_is_spread_evenly_over_the_split(tokens, batch_windows):
    everything = next(tokens.batches("test", 1000))
    sample = list(tokens.sample("test", 100, batch_windows))
    assert all(len(batch.tokens) <= batch_windows for batch in sample)
    found = torch.cat([batch.tokens for batch in sample])
    n_windows = math.ceil(100 * len(everything.tokens) / 300)
    chosen = [round(i * (len(everything.tokens) - 1) / (n_windows - 1)) for i in range(n_windows)]
    assert torch.equal(found, everything.tokens[chosen])
    assert 70 <= sum(int(batch.kept.sum()) for batch in sample) <= 130


def test_token_ids_of_rows_are_those_of_the_text(tokens):
    everything = next(tokens.batches("test", 1000))
    rows = torch.tensor([0, 1, 17, 17, 299])
    assert tokens.token_ids("test", rows.numpy()).tolist() == everything.tokens[everything.kept][rows].tolist()


# models without a head


@pytest.mark.parametrize(
    ("classes", "has_head"),
    [(["GPTNeoXForCausalLM"], True), (["GPTNeoXModel"], False), (["GPT2LMHeadModel"], True), (None, True), ([], True)],
)
def test_a_head_is_detected_from_the_configuration(tmp_path: Path, classes, has_head):
    path = write_tiny_model(tmp_path / "model")
    edit_config(path, architectures=classes)
    assert describe_language_model(str(path)).has_head is has_head


def test_a_model_without_a_head_has_activations(tmp_path: Path, windows):
    whole = load_language_model(describe_language_model(str(write_tiny_model(tmp_path / "whole"))))
    cast("PreTrainedModel", whole.model.base_model).save_pretrained(tmp_path / "headless")
    (tmp_path / "headless" / "tokenizer.json").write_bytes((tmp_path / "whole" / "tokenizer.json").read_bytes())
    description = describe_language_model(str(tmp_path / "headless"))
    assert not description.has_head
    headless = load_language_model(description)
    assert torch.equal(*(each.activations(windows.tokens, "resid_post", [1])[1] for each in (whole, headless)))


def test_a_missing_module_is_refused(model):
    with pytest.raises(ConfigurationError, match="no module"), patched(model, "model.{layer}.nothing", 1, lambda x: x):
        pass
