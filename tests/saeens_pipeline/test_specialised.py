"""Members of a bag that are trained on a part of the corpus, or start from another member's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_automation import AUTOMATED, CHAIN, Daemon
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_pipeline.assets.lineage import lineage
from saeens_pipeline.assets.saes import init_seed
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationStore, StoredDtype
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.selection import SelectedDocuments
from saeens_pipeline.storage.tables import read_table

TRAIN = 600
SPECIALISED = [{"member": 2, "documents": {"language": ["python"]}}, {"member": 3, "documents": {"language": ["prose"]}, "start_from": 2}]


def _ensemble(*specialised: Mapping[str, Any]) -> dict[str, Any]:
    return EXPERIMENT["ensemble"] | {"specialised": [dict(each) for each in specialised]}


# Rows of some documents


def _store(path: Path, documents: np.ndarray, dtype: StoredDtype = "float32", chunk_rows: int = 4) -> ActivationStore:
    rows = torch.randn(len(documents), 3, generator=torch.Generator().manual_seed(0))
    with ActivationWriter(path, 3, dtype, {"train": len(rows), "test": 1}, name="rows", chunk_rows=chunk_rows) as writer:
        writer.append("train", rows, torch.from_numpy(documents), torch.zeros(len(rows)))
        writer.append("test", rows[:1], torch.zeros(1), torch.zeros(1))
    return ActivationStore(path)


def _all_rows(store: ActivationStore) -> torch.Tensor:
    return torch.cat([store.read_chunk("train", index) for index in range(store.n_chunks("train"))])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), data=st.data())
def test_rows_of_selected_documents_are_in_storage_order(tmp_path_factory, lengths: list[int], data: st.DataObject):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    chosen = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))
    store = _store(tmp_path_factory.mktemp("rows") / "a.zarr", documents, data.draw(st.sampled_from(["float32", "bfloat16"])))
    selected = SelectedDocuments(store, "train", np.array(sorted(chosen), np.int32))
    expected = _all_rows(store)[torch.from_numpy(np.isin(documents, list(chosen)))]
    assert selected.n_rows("train") == len(expected)
    chunks = [selected.stored_chunk("train", index) for index in range(selected.n_chunks("train"))]
    assert {len(chunk) for chunk in chunks[:-1]} <= {4}
    assert torch.equal(torch.cat(chunks), expected)
    assert selected.dtype == store.dtype == str(chunks[0].dtype).removeprefix("torch.")
    statistics = selected.statistics("train")
    assert statistics.rows == len(expected)
    assert statistics.mean == pytest.approx(expected.double().mean(dim=0).numpy(), abs=1e-12)
    assert statistics.mean_norm == pytest.approx(float(expected.double().norm(dim=1).mean()))


def test_shuffled_batches_hold_every_row_of_the_documents_once(tmp_path: Path):
    documents = np.repeat(np.arange(30), 7)
    store = _store(tmp_path / "a.zarr", documents)
    selected = SelectedDocuments(store, "train", np.arange(0, 30, 2))
    batches = torch.cat(list(selected.batches("train", 8, seed=3, mixing_chunks=5)))
    expected = _all_rows(store)[torch.from_numpy(documents % 2 == 0)]
    assert sorted(batches.tolist()) == sorted(expected.tolist())
    assert not torch.equal(batches, expected)


def test_only_chunks_with_rows_of_the_documents_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = _store(tmp_path / "a.zarr", np.repeat(np.arange(10), 8))  # two chunks each
    read: list[int] = []
    stored_chunk = store.stored_chunk
    monkeypatch.setattr(store, "stored_chunk", lambda split, index: read.append(index) or stored_chunk(split, index))
    list(SelectedDocuments(store, "train", np.array([2, 7])).chunks("train"))
    assert sorted(set(read)) == [4, 5, 14, 15]


def test_documents_without_rows_and_unknown_splits_are_refused(tmp_path: Path):
    store = _store(tmp_path / "a.zarr", np.repeat(np.arange(3), 5))
    with pytest.raises(SaeensError, match="no train rows of the 2 selected documents"):
        SelectedDocuments(store, "train", np.array([7, 9]))
    with pytest.raises(SaeensError, match="selected from the train split"):
        SelectedDocuments(store, "train", np.array([1])).n_rows("test")


# A whole experiment


@pytest.fixture(scope="module")
def laboratory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """Member 2 on Python alone, member 3 on prose, from the weights of member 2; for reading only."""
    home = tmp_path_factory.mktemp("specialised")
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(ensemble=_ensemble(*SPECIALISED))
        laboratory.run()
    return laboratory


def _rows_of(laboratory: Laboratory, language: str) -> torch.Tensor:
    """The training rows of a language, found by way of the documents' names: every second text of the corpus is Python."""
    documents = pl.read_parquet(laboratory.artefact("tokens", layer=None).path / "documents.parquet").filter(split="train")
    wanted = [
        number for number, name in documents.select("document", "name").iter_rows() if int(name.split("-")[1]) % 2 == (language == "python")
    ]
    train = zarr.open_group(laboratory.artefact("activations").path, mode="r")["train"]
    kept = np.isin(train["document"][:], wanted)  # pyright: ignore
    assert 0 < kept.sum() < TRAIN
    return torch.from_numpy(train["activations"][:][kept])  # pyright: ignore


def _trained_anew(
    laboratory: Laboratory, rows: torch.Tensor, folder: Path, *, seed: int, index: int, initial: sm.SAE | None = None
) -> sm.SAE:
    """By `sm.train` on a store that holds these rows and no others."""
    chunk_rows = ActivationStore(laboratory.artefact("activations").path).chunk_rows
    with ActivationWriter(
        folder, D_MODEL, "float16", {"train": len(rows)}, name="rows", with_origin=False, chunk_rows=chunk_rows
    ) as writer:
        writer.append("train", rows)
    norm = rows.double().norm(dim=1).mean().item()
    training = sm.TrainingConfig(
        **EXPERIMENT["training"],
        total_tokens=len(rows),
        input_mean=tuple(rows.double().mean(dim=0).tolist()),
        input_scale=D_MODEL**0.5 / norm,
    )
    config = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=2 * D_MODEL, k=4, init_seed=init_seed(seed, index))
    return sm.train([config], ActivationStore(folder).batches("train", 64, seed=seed), training, initial=[initial])[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_specialised_member_is_trained_on_the_rows_of_its_documents_alone(laboratory: Laboratory, tmp_path: Path, seed: int):
    rows = _rows_of(laboratory, "python")
    expected = _trained_anew(laboratory, rows, tmp_path / "rows.zarr", seed=seed, index=2)
    member = laboratory.artefact("bagging/member_2", seed)
    for name, weight in load_file(member.path / "sae_weights.safetensors").items():
        torch.testing.assert_close(weight, expected.state_dict()[name].contiguous(), rtol=1e-4, atol=1e-5)
    assert member.provenance["train_tokens"] == len(rows)
    assert member.provenance["train_flops"] == len(rows) * expected.config.train_flops_per_token
    assert json.loads((member.path / "cfg.json").read_text())["metadata"]["documents"] == {"language": ["python"]}


def test_a_member_starts_from_the_weights_of_another(laboratory: Laboratory, tmp_path: Path):
    rows = _rows_of(laboratory, "prose")
    start = sm.load_sae(laboratory.artefact("bagging/member_2", 1).path)
    expected = _trained_anew(laboratory, rows, tmp_path / "rows.zarr", seed=1, index=3, initial=start)
    member = laboratory.artefact("bagging/member_3", 1)
    for name, weight in load_file(member.path / "sae_weights.safetensors").items():
        torch.testing.assert_close(weight, expected.state_dict()[name].contiguous(), rtol=1e-4, atol=1e-5)
    assert member.recipe["inputs"]["initial weights"] == laboratory.artefact("bagging/member_2", 1).data_version


def test_cost_counts_the_rows_that_each_member_saw(laboratory: Laboratory):
    python, prose = (len(_rows_of(laboratory, language)) for language in ("python", "prose"))
    assert python + prose == TRAIN
    config = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=2 * D_MODEL, k=4)
    cost = read_table(laboratory.root, NAME, "cost").filter(method="bagging", seed=1).sort("n_members")
    assert cost["train_tokens"].to_list() == [TRAIN, TRAIN + python, 2 * TRAIN]
    assert cost["train_flops"].to_list() == [config.train_flops_per_token * tokens for tokens in (TRAIN, TRAIN + python, 2 * TRAIN)]
    peaks = [laboratory.artefact(f"bagging/member_{j}", 1).provenance["peak_memory_bytes"] for j in (1, 2, 3)]
    assert cost["peak_memory_bytes"].to_list() == [max(peaks[:n]) for n in (1, 2, 3)]  # one after the other


def test_rounds_and_baselines_are_trained_on_all_rows(laboratory: Laboratory):
    for key in ("boosting/round_1", "boosting/round_2", "boosting/round_3", "baseline/expanded"):
        artefact = laboratory.artefact(key, 1)
        assert artefact.provenance["train_tokens"] == TRAIN
        assert "documents" not in artefact.recipe["settings"]
    assert laboratory.artefact("boosting/round_1", 1).provenance["same_as"] == f"{NAME}/bagging/member_1"


def test_lineage_shows_labels_tokens_and_the_initial_sae(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    laboratory.activate(monkeypatch)
    found = lineage(laboratory.store, laboratory.declarations().values(), f"{NAME}/bagging/member_3:layer={LAYER},seed=1")
    parents = {parent.role: parent.title for parent in found.parents}
    assert parents == {
        "activations": f"{NAME}/activations, layer {LAYER}",
        "tokens": f"{NAME}/tokens",
        "initial weights": f"{NAME}/bagging/member_2, layer {LAYER}, seed 1",
    }
    assert not list(found.problems())


# What recipes say


def _states(state: str) -> set[str]:
    return {"/".join(s.declaration.address.key[1:]) for s in status_of(NAME) if s.state == state}


def test_specialising_a_member_changes_no_other(finished: Laboratory):
    finished.declare(ensemble=_ensemble({"member": 3, "documents": {"language": ["python"]}}))
    saes_and_residuals = {key for key in _states("stale") if not key.startswith(("eval/", "report"))}
    assert saes_and_residuals == {"bagging/member_3", "bagging/bagging_ensemble"}
    assert {"bagging/member_1", "bagging/member_2", "boosting/round_1", "boosting/round_3", "baseline/expanded"} <= _states("fresh")


def test_a_specialised_member_depends_on_its_initial_sae_and_its_labels(finished: Laboratory):
    finished.declare(ensemble=_ensemble({"member": 3, "documents": {"language": ["python"]}, "start_from": 1}))
    finished.run()
    assert _states("fresh") == {"/".join(s.declaration.address.key[1:]) for s in status_of(NAME)}
    finished.declare(ensemble=_ensemble({"member": 3, "documents": {"language": ["prose"]}, "start_from": 1}))
    reasons = {"/".join(s.declaration.address.key[1:]): s.reason for s in status_of(NAME) if s.state == "stale"}
    assert reasons["bagging/member_3"] == 'setting documents.language: ["python"] -> ["prose"]'
    assert "bagging/member_1" not in reasons
    finished.declare(ensemble=_ensemble({"member": 3, "documents": {"language": ["python"]}, "start_from": 2}))
    reasons = {"/".join(s.declaration.address.key[1:]): s.reason for s in status_of(NAME) if s.state == "stale"}
    assert reasons["bagging/member_3"].startswith("input tiny/bagging/member_2, layer 1, seed ")
    shutil.rmtree(finished.artefact("bagging/member_2", 1).path)
    assert "follows from tiny/bagging/member_2" in next(
        s.reason for s in status_of(NAME) if s.declaration.address.name == "member_3" and s.partition == Partition(LAYER, 1)
    )


def test_with_a_specialised_first_member_round_1_is_trained_separately(finished: Laboratory):
    finished.declare(ensemble=_ensemble({"member": 1, "documents": {"language": ["python"]}}))
    before = finished.artefact("boosting/round_1", 1).data_version
    printed = finished.run()
    assert f"{NAME}/bagging/member_1" in printed
    assert f"{NAME}/boosting/round_1," not in printed  # its recipe is what it was
    assert finished.artefact("boosting/round_1", 1).data_version == before != finished.artefact("bagging/member_1", 1).data_version


def test_the_automation_requests_specialised_members_with_the_others_and_after_new_tokens(empty: Laboratory):
    automated: dict[str, Any] = AUTOMATED | {"ensemble": _ensemble(*SPECIALISED)}
    empty.declare(**automated)
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        daemon = Daemon(empty, instance)
        assert daemon.work() == CHAIN
        empty.declare(source={"train_tokens": 500}, **automated)
        assert daemon.work() == CHAIN


# Bad input


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"language": ["python", "rust"]}, r"no train document has language 'rust'; documents by language: prose \(6\), python \(6\)"),
        ({"author": ["me"]}, "documents have no label 'author'; they have: language"),
    ],
    ids=["value", "field"],
)
def test_an_absent_label_is_refused_with_the_existing_ones_before_training(
    empty: Laboratory, monkeypatch: pytest.MonkeyPatch, documents: dict[str, list[str]], message: str
):
    monkeypatch.setattr(sm, "train", lambda *_, **__: pytest.fail("nothing is to be trained"))
    empty.declare(ensemble=_ensemble({"member": 3, "documents": documents}))
    with pytest.raises(ConfigurationError, match=f"tiny: ensemble.specialised, member 3, documents: {message}"):
        empty.run()
    assert not (empty.root / "experiments").exists()


def test_combinations_of_labels_without_documents_are_refused(finished: Laboratory):
    from saeens_pipeline.language_models.tokens import open_tokens

    tokens = open_tokens(finished.artefact("tokens", layer=None).path)
    documents = pl.read_parquet(tokens.path / "documents.parquet")
    documents.with_columns(size=pl.when(pl.col("language") == "python").then(1).otherwise(2)).write_parquet(
        tokens.path / "documents.parquet"
    )
    chosen = tokens.documents_with("train", {"language": ["python", "prose"], "size": ["2"]})
    assert chosen.tolist() == documents.filter(split="train", language="prose")["document"].to_list()
    with pytest.raises(ConfigurationError, match="no train document has all of language: "):
        tokens.documents_with("train", {"language": ["python"], "size": ["2"]})


def test_labels_cannot_filter_activations_of_earlier_tokens(finished: Laboratory):
    finished.declare(source={"train_tokens": 500}, ensemble=_ensemble({"member": 3, "documents": {"language": ["python"]}}))
    finished.materialise([f"{NAME}/tokens"], Partition())
    with pytest.raises(SaeensError, match="computed from tokens of tiny that have changed since"):
        finished.materialise([f"{NAME}/bagging/member_3"], Partition(LAYER, 1))


WRONG = {
    "no such member": ({"member": 4, "start_from": 1}, "0.member", "there is no member 4: the ensemble has 3"),
    "itself": ({"member": 2, "start_from": 2}, "0.start_from", "a member before it, not from 2"),
    "nothing special": ({"member": 2}, "0", "give documents, start_from, or both"),
    "no values": ({"member": 2, "documents": {"language": []}}, "0.documents.language", "expected entries, at least 1"),
    "unknown key": ({"member": 2, "corpus": "x"}, "0.corpus", "one of: member, documents, start_from"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_specialisation_is_reported_with_its_line_and_field(empty: Laboratory, case: str):
    entry, field, message = WRONG[case]
    file = empty.declare(ensemble=_ensemble(entry))
    (complaint,) = empty.catalogue.broken.values()
    where, _, rest = complaint.partition(": ")
    assert rest.startswith(f"attributes.ensemble.specialised.{field}: ")
    assert message in rest
    path, _, line = where.rpartition(":")
    lines = file.read_text().splitlines()
    assert path == str(file)
    assert int(line) > lines.index("  ensemble:")


def test_a_member_specialised_twice_is_refused(empty: Laboratory):
    empty.declare(ensemble=_ensemble({"member": 2, "start_from": 1}, {"member": 2, "documents": {"language": ["python"]}}))
    assert "attributes.ensemble.specialised.1.member: member 2 is named twice" in "".join(empty.catalogue.broken.values())


def test_an_initial_sae_of_another_shape_is_refused(empty: Laboratory):
    wider = EXPERIMENT["sae"] | {"expansion": 3}
    empty.declare(sae=[EXPERIMENT["sae"], wider, wider], ensemble=_ensemble({"member": 2, "start_from": 1}))
    complaint = "".join(empty.catalogue.broken.values())
    assert "specialised.0.start_from: member 2 (topk, expansion 3) cannot start from member 1 (topk, expansion 2)" in complaint


def test_all_members_can_be_specialised(empty: Laboratory):
    everyone = [{"member": j, "documents": {"language": [("python", "prose")[j % 2]]}} for j in range(1, MEMBERS + 1)]
    empty.declare(ensemble=_ensemble(*everyone) | {"seeds": [1]}, baselines=[])
    empty.run()
    rows = read_table(empty.root, NAME, "reconstruction").filter(method="bagging")
    assert rows["n_members"].to_list() == [1, 2, 3]
