"""Data sets of the hub: streams at one commit, and errors of unreadable ones."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from fake_hub import UNREACHABLE, FakeHub, reach
from tiny_experiment import Laboratory

from saeens_pipeline.assets import sources
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import corpora
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.hub_datasets import HubCorpus
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.settings.corpora import HubDataset

NAME = "some-lab/pile"
SPLITS: tuple[Split, ...] = ("train", "test")
TEXTS = {split: [f"{split} text number {i}, which is about {i * 7 % 13}." for i in range(60)] for split in SPLITS}
SHARDS = 6


@pytest.fixture
def needs_datasets() -> None:
    pytest.importorskip("datasets", reason="the optional extra hub is not installed")


@pytest.fixture
def hub(needs_datasets: None, fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with a data set as monology/pile-uncopyrighted is laid out: a folder of shards, and a file for the other split."""
    folder = tmp_path / "dataset"
    (folder / "train").mkdir(parents=True)
    (folder / "README.md").write_text("A card.")
    for shard in range(SHARDS):
        of_shard = TEXTS["train"][shard * 10 : shard * 10 + 10]
        (folder / "train" / f"{shard:02}.jsonl").write_text(_lines(of_shard))
    (folder / "test.jsonl").write_text(_lines(TEXTS["test"]))
    fake_hub.repositories[f"datasets/{NAME}"] = folder
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    reach(monkeypatch, fake_hub.url)
    return fake_hub


def _lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "meta": {"pile_set_name": text[:5]}}) + "\n" for text in texts)


def _corpus(**fields: Any) -> HubCorpus:
    return HubCorpus(HubDataset(**{"name": NAME, "test_split": "test", **fields}))


def test_splits_have_the_documents_of_the_data_set_in_order_with_labels(hub: FakeHub):
    corpus = _corpus(label_fields=["meta.pile_set_name"])
    corpus.require_readable()
    for split in SPLITS:
        documents = list(corpus.documents(split))
        assert [document.text for document in documents] == TEXTS[split]
        assert documents[2].name == f"{NAME}/{split}:3"
        assert {document.labels["meta.pile_set_name"] for document in documents} == {"train" if split == "train" else "test "}


def test_without_a_test_split_documents_are_held_out_by_index(hub: FakeHub):
    corpus = _corpus(test_split=None, test_share=0.3)
    train, test = ([document.text for document in corpus.documents(split)] for split in SPLITS)
    assert sorted(train + test) == sorted(TEXTS["train"])
    assert 5 < len(test) < 30


def test_unread_files_are_not_downloaded(hub: FakeHub):
    assert [document.text for document in islice(_corpus().documents("train"), 12)] == TEXTS["train"][:12]
    assert {"00.jsonl", "01.jsonl"} <= hub.downloaded()
    assert not hub.downloaded() & {f"{shard:02}.jsonl" for shard in range(3, SHARDS)}


def test_identity_is_the_commit_and_the_settings_and_is_cached(fake_hub: FakeHub, tmp_path: Path, monkeypatch):
    (tmp_path / "dataset").mkdir()
    fake_hub.repositories[f"datasets/{NAME}"] = tmp_path / "dataset"
    identity = _corpus().identity
    assert identity["revision"] == fake_hub.commit(f"datasets/{NAME}")
    assert _corpus(revision=identity["revision"]).identity == identity
    assert _corpus(split="validation").identity != identity
    assert _corpus(text_field="body").identity != identity
    reach(monkeypatch, UNREACHABLE)
    assert _corpus().identity == identity


def test_a_missing_data_set_split_or_field_is_reported(hub: FakeHub):
    with pytest.raises(ConfigurationError, match=r"data set 'some-lab/other': .* no such data set on the hub"):
        _corpus(name="some-lab/other").require_readable()
    with pytest.raises(ConfigurationError, match=r"data set 'some-lab/pile': .*validation.*train"):
        _corpus(split="validation").require_readable()
    with pytest.raises(SaeensError, match=r"data set some-lab/pile, train, record 1: there is no field 'body'; there are: meta, text"):
        _corpus(text_field="body").require_readable()


def test_a_gated_data_set_gives_the_hubs_reason_and_the_command(hub: FakeHub):
    hub.gated.add(f"datasets/{NAME}")
    with pytest.raises(ConfigurationError, match=r"data set 'some-lab/pile' is gated: .*authorized list\. .*log in with `hf auth login`"):
        _corpus().require_readable()


def test_without_the_hub_the_error_of_a_data_set_gives_a_remedy(needs_datasets: None, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    reach(monkeypatch, UNREACHABLE)
    with pytest.raises(SaeensError, match=r"data set 'some-lab/pile': .*hub cannot be reached.*give them as `corpus: \{files: ...\}`"):
        _corpus().require_readable()


def test_without_datasets_the_extra_is_named(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"install them with `pip install .*\[hub\]'`"):
        _corpus().require_readable()


def test_an_experiment_runs_on_a_data_set(hub: FakeHub, empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    empty.declare({"corpus": {"name": NAME, "test_split": "test", "label_fields": ["meta.pile_set_name"]}})
    empty.run(select=["bagging_ensemble"])
    assert open_tokens(empty.artefact("tokens", layer=None).path).documents("train")["name"][0] == f"{NAME}/train:1"
    assert empty.artefact("tokens", layer=None).recipe["settings"]["corpus"]["revision"] == hub.commit(f"datasets/{NAME}")
    reach(monkeypatch, UNREACHABLE)
    empty.run(layers=[0], select=["bagging_ensemble"])  # the tokens are there: no text is read
