"""The embedded language model: its loss on held-out text, and the command that trains such a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeens_pipeline.language_models import installed_packages as corpora
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.reference_model import ReferenceModelRecipe, train_reference_model
from tests.saeens_pipeline.tiny_models import ListedCorpus

TINY = ReferenceModelRecipe(
    vocab_size=300, context_length=16, d_model=12, n_layers=2, n_heads=2, train_tokens=16 * 4 * 60, batch_windows=4, warmup_steps=5
)


@pytest.fixture(scope="module")
def small_corpus() -> ListedCorpus:
    lines = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(200)]
    return ListedCorpus(
        train=["".join(lines[i : i + 30]) for i in range(0, 150, 5)],
        test=["".join(lines[i : i + 30]) for i in range(160, 170, 5)],
    )


def test_the_shipped_model_has_the_recorded_loss_on_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PACKAGES", ("networkx", "sqlalchemy", "rich"))
    description = describe_language_model(REFERENCE_MODEL)
    record = json.loads((description.path / "training.json").read_text())
    model = load_language_model(description, "trained")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(description.path / "tokenizer.json"))
    nats, n_bytes = 0.0, 0
    for document in list(InstalledPackages().documents("test"))[:24]:
        windows = torch.tensor(tokenizer.encode(document.text).ids[: 128 * 4])
        windows = windows[: len(windows) // 128 * 128].view(-1, 128)
        if len(windows):
            with torch.no_grad():
                logits = model.model(windows).logits[:, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"))
            n_bytes += sum(len(tokenizer.decode(window[1:].tolist()).encode()) for window in windows)
    bits_per_byte = nats / math.log(2) / n_bytes
    # another sample of held-out documents than the record's: equal within what documents differ
    assert bits_per_byte == pytest.approx(record["log"][-1]["bits_per_byte"], rel=0.2)


def test_shipped_model_is_described_by_its_recipe() -> None:
    description = describe_language_model(REFERENCE_MODEL)
    recipe = json.loads((description.path / "training.json").read_text())["recipe"]
    assert (description.d_model, description.n_layers, description.context_length) == (
        recipe["d_model"],
        recipe["n_layers"],
        recipe["context_length"],
    )
    assert (description.model_type, description.vocab_size) == ("gpt_neox", recipe["vocab_size"])


def test_training_learns_and_writes_a_model_that_loads(tmp_path: Path, small_corpus: ListedCorpus) -> None:
    log = train_reference_model(tmp_path, TINY, small_corpus)
    measured = [status.bits_per_byte for status in log if status.bits_per_byte is not None]
    assert measured[-1] < 0.9 * measured[0]
    description = describe_language_model(str(tmp_path))
    activations = load_language_model(description, "trained").activations(torch.zeros(1, 8, dtype=torch.int64), "resid_post", [1])
    assert activations[1].shape == (1, 8, TINY.d_model)
    assert json.loads((tmp_path / "training.json").read_text())["log"][-1]["tokens"] == TINY.train_tokens


def test_training_twice_gives_the_same_weights(tmp_path: Path, small_corpus: ListedCorpus) -> None:
    short = replace(TINY, train_tokens=16 * 4 * 5)
    for name in ("once", "again"):
        train_reference_model(tmp_path / name, short, small_corpus)
    assert (tmp_path / "once/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
