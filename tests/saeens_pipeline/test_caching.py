"""From tokens to stored activations, against a forward pass of transformers itself."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_models import D_MODEL, ListedCorpus, write_tiny_model

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.caching import cache_activations, kept_activations
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens, write_tokens
from saeens_pipeline.storage.activations import ActivationStore

TEXTS = [
    "def encode(self, x):\n    return self.act(x)",
    "short",
    "A sparse autoencoder reads activations and explains them with few features.",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(describe_language_model(str(write_tiny_model(tmp_path_factory.mktemp("models") / "model"))))


@pytest.fixture(scope="module", params=["document", "concatenate"])
def tokens(request: pytest.FixtureRequest, model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    path = tmp_path_factory.mktemp("tokens") / "tokens.zarr"
    corpus = ListedCorpus(TEXTS, TEXTS[::-1])
    write_tokens(
        path,
        corpus,
        model.description,
        context_length=16,
        packing=request.param,
        drop=["first", "special"],
        train_tokens=90,
        test_tokens=20,
    )
    return open_tokens(path)


def _expected(model: LanguageModel, tokens: TokenStore, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, documents and positions from one forward pass over all windows, with nothing stopped early."""
    (batch,) = tokens.batches("train", 1000)
    with torch.no_grad():
        hidden = model.model(batch.tokens, output_hidden_states=True).hidden_states[layer + 1]
    return hidden[batch.kept], batch.document[batch.kept], batch.position[batch.kept]


@pytest.mark.parametrize("batch_tokens", [1, 3, 40, 1000])
def test_stored_rows_equal_the_activations_of_the_kept_positions(model, tokens, tmp_path, batch_tokens):
    outputs = {layer: tmp_path / f"layer={layer}" for layer in (0, 1)}
    statistics = cache_activations(model, tokens, "resid_post", outputs, "float32", batch_tokens=batch_tokens)
    for layer, path in outputs.items():
        store = ActivationStore(path)
        rows, document, position = _expected(model, tokens, layer)
        assert (store.n_rows("train"), store.n_rows("test"), store.d_in) == (90, 20, D_MODEL)
        torch.testing.assert_close(torch.cat(list(store.chunks("train"))), rows)
        assert store.document("train").tolist() == document.tolist()
        assert store.position("train").tolist() == position.tolist()
        torch.testing.assert_close(torch.from_numpy(statistics[layer]["train"].mean), rows.double().mean(0), rtol=1e-5, atol=1e-6)


def test_a_batch_has_windows_of_similar_length_and_no_positions_after_the_last_kept_one(model, tokens):
    (windows,) = tokens.batches("train", 1000)
    lengths = [int(kept.nonzero().max()) + 1 if kept.any() else 0 for kept in windows.kept]
    batches = list(windows.by_length(windows.kept, 40))
    numbers = torch.cat([numbers for numbers, _ in batches])
    assert sorted(numbers.tolist()) == [number for number, length in enumerate(lengths) if length]
    assert [lengths[number] for number in numbers] == sorted(length for length in lengths if length)
    for numbers, batch in batches:
        longest = max(lengths[number] for number in numbers)
        assert batch.tokens.shape == (len(numbers), longest)
        assert batch.tokens.numel() <= 40
        for name, values in batch._asdict().items():
            assert torch.equal(values, getattr(windows, name)[numbers, :longest])
    of_all = kept_activations(model, windows, "resid_post", [1], 10**6)[1]
    torch.testing.assert_close(kept_activations(model, windows, "resid_post", [1], 40)[1], of_all)


def test_one_forward_pass_caches_all_layers(model, tokens, tmp_path):
    runs: list[int] = []
    model.widths("resid_post", range(3))  # checks the hook
    handle = model.model.get_submodule("gpt_neox.embed_in").register_forward_hook(lambda *_: runs.append(1))
    cache_activations(model, tokens, "resid_post", {layer: tmp_path / str(layer) for layer in range(3)}, "float16", batch_tokens=1000)
    handle.remove()
    assert len(runs) == 3  # one to learn the width, one for each split


def test_a_layer_cached_alone_has_the_bits_of_one_cached_with_others(model, tokens, tmp_path):
    cache_activations(model, tokens, "resid_post", {1: tmp_path / "alone"}, "float16")
    cache_activations(model, tokens, "resid_post", {0: tmp_path / "0", 1: tmp_path / "together", 2: tmp_path / "2"}, "float16")
    alone, together = (torch.cat(list(ActivationStore(tmp_path / name).chunks("train"))) for name in ("alone", "together"))
    assert torch.equal(alone, together)


def test_hooks_are_cached_with_their_own_width(model, tokens, tmp_path):
    cache_activations(model, tokens, "gpt_neox.layers.{layer}.mlp.dense_h_to_4h", {1: tmp_path / "a"}, "float16")
    assert ActivationStore(tmp_path / "a").d_in == 32


def test_progress_counts_rows_of_both_splits(model, tokens, tmp_path):
    seen: list[tuple[int, int]] = []
    cache_activations(
        model, tokens, "resid_post", {0: tmp_path / "a"}, "float16", batch_tokens=32, report=lambda *progress: seen.append(progress)
    )
    assert seen[-1] == (110, 110)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_overflow_in_float16_names_layer_and_largest_value(model, tokens, tmp_path):
    handle = model.model.get_submodule("gpt_neox.layers.1").register_forward_hook(lambda module, args, output: output * 0 + 1e5)
    try:
        with pytest.raises(SaeensError, match=r"resid_post of layer 1 has values up to 100,000.*bfloat16"):
            cache_activations(model, tokens, "resid_post", {0: tmp_path / "0", 1: tmp_path / "1"}, "float16")
    finally:
        handle.remove()


def test_free_disk_is_checked_for_all_layers_together(model, tokens, tmp_path, monkeypatch):
    one_layer = 110 * (D_MODEL * 2 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**6, 0, one_layer + 1))
    with pytest.raises(SaeensError, match=f"layers 0, 1 needs {2 * one_layer:,} bytes"):
        cache_activations(model, tokens, "resid_post", {0: tmp_path / "0", 1: tmp_path / "1"}, "float16")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_the_model_lacks_is_refused_before_anything_is_written(model, tokens, tmp_path):
    with pytest.raises(ConfigurationError, match="layers 0 to 2"):
        cache_activations(model, tokens, "resid_post", {7: Path(tmp_path / "7")}, "float16")
    assert list(tmp_path.iterdir()) == []
