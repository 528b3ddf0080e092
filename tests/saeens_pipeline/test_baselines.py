"""Baselines that are methods of their own: one SAE with the compute of all members, and one that pursues."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_experiment import MEMBERS, NAME, SEEDS, Laboratory
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_pipeline.assets.saes import init_seed
from saeens_pipeline.runs import experiment_status
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore
from saeens_pipeline.storage.checkpoints import SECONDS_VARIABLE
from saeens_pipeline.storage.tables import read_table

ROWS, BATCH_TOKENS, SEED = 600, 64, SEEDS[0]
BASELINES = ["compute_matched", "matching_pursuit"]
SLOWER: dict[str, Any] = {"matching_pursuit": {"batch_tokens": 128}}


class PowerCutError(Exception):
    """What stands for the end of a process where the test itself has to live on."""


@pytest.fixture(scope="module")
def made(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The finished experiment with two baselines more; for reading only."""
    home = tmp_path_factory.mktemp("baselines")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    shutil.copytree(finished_laboratory.root, laboratory.root, ignore=shutil.ignore_patterns("dagster"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(baselines=["expanded", *BASELINES], baseline_training=SLOWER)
        laboratory.run()
    return laboratory


def _training(laboratory: Laboratory, total_tokens: int, batch_tokens: int) -> sm.TrainingConfig:
    statistics = ActivationStore(laboratory.artefact("activations").path).statistics("train")
    return sm.TrainingConfig(
        learning_rate=0.01,
        batch_tokens=batch_tokens,
        normalize_activations="expected_average_only_in",
        total_tokens=total_tokens,
        input_mean=tuple(statistics.mean.tolist()),
        input_scale=D_MODEL**0.5 / statistics.mean_norm,
    )


def _assert_has_the_weights_of(laboratory: Laboratory, key: str, sae: sm.SAE, tmp_path: Path) -> None:
    sm.save_sae(sae, tmp_path)
    found, expected = (load_file(folder / "sae_weights.safetensors") for folder in (laboratory.artefact(key, SEED).path, tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compute_matched_is_a_member_trained_on_a_stream_of_so_many_epochs(made: Laboratory, tmp_path: Path):
    reader = ActivationStore(made.artefact("activations").path)
    rows = torch.cat(list(reader.batches("train", BATCH_TOKENS, seed=SEED, epochs=MEMBERS)))
    assert len(rows) == MEMBERS * ROWS
    epochs = [{row.numpy().tobytes() for row in epoch} for epoch in rows.split(ROWS)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert not torch.equal(rows[:ROWS], rows[ROWS : 2 * ROWS])
    config = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=2 * D_MODEL, k=4, init_seed=init_seed(SEED, 1))
    (sae,) = sm.train([config], rows.split(BATCH_TOKENS), _training(made, MEMBERS * ROWS, BATCH_TOKENS))
    _assert_has_the_weights_of(made, "baseline/compute_matched", sae, tmp_path)


def test_matching_pursuit_has_the_features_and_the_l0_of_all_members(made: Laboratory, tmp_path: Path):
    batches = ActivationStore(made.artefact("activations").path).batches("train", 128, seed=SEED)
    config = sm.SAEConfig(
        architecture="matching_pursuit",
        d_in=D_MODEL,
        d_sae=MEMBERS * 2 * D_MODEL,
        max_iterations=MEMBERS * 4,
        init_seed=init_seed(SEED, 0),
    )
    (sae,) = sm.train([config], batches, _training(made, ROWS, 128))
    _assert_has_the_weights_of(made, "baseline/matching_pursuit", sae, tmp_path)
    test = torch.cat(list(ActivationStore(made.artefact("activations").path).chunks("test")))
    l0 = (sae.encode(test) != 0).sum(dim=1).float().mean().item()
    (row,) = read_table(made.root, NAME, "reconstruction").filter(method="matching_pursuit", seed=SEED).to_dicts()
    assert row["l0"] == pytest.approx(l0, rel=0.01)
    assert (row["n_members"], row["n_features"]) == (1, MEMBERS * 2 * D_MODEL)
    assert l0 <= MEMBERS * 4


def test_the_cost_of_baselines_is_counted_in_full(made: Laboratory):
    cost = {(row["method"], row["n_members"]): row for row in read_table(made.root, NAME, "cost").filter(seed=SEED).to_dicts()}
    matched, bagging, pursuit = cost["compute_matched", 1], cost["bagging", MEMBERS], cost["matching_pursuit", 1]
    assert (matched["train_tokens"], matched["train_flops"]) == (bagging["train_tokens"], bagging["train_flops"])
    assert matched["inference_flops_per_token"] == cost["single", 1]["inference_flops_per_token"]
    iterations, products = MEMBERS * 4, 2 * D_MODEL * MEMBERS * 2 * D_MODEL
    assert pursuit["inference_flops_per_token"] == iterations * (products + 2 * D_MODEL)
    assert pursuit["train_flops"] == ROWS * iterations * (products + 12 * D_MODEL)
    assert all(row["train_seconds"] > 0 and row["peak_memory_bytes"] > 0 for row in (matched, pursuit))


def test_further_baselines_leave_the_saes_that_are_there_fresh(finished: Laboratory):
    finished.declare(baselines=["expanded", "expanded_l0_matched", *BASELINES], baseline_training=SLOWER)
    states = {str(status.declaration.address): status.state for status in experiment_status(NAME)}
    kept = [key for key in states if "/member_" in key or "/round_" in key or "/expanded" in key]
    assert len(kept) == 2 * MEMBERS + 2
    assert {states[key] for key in kept} == {"fresh"}
    assert {states[f"{NAME}/baseline/{name}"] for name in BASELINES} == {"missing"}


def test_of_one_member_compute_matched_is_that_member(finished: Laboratory):
    finished.declare(baselines=["compute_matched"], ensemble={"members": 1, "seeds": [SEED]})
    finished.run(select=["baseline/compute_matched"])
    assert finished.artefact("baseline/compute_matched", SEED).provenance["same_as"] == f"{NAME}/bagging/member_1"


@pytest.mark.parametrize("batch", [5, 9, 10, 19], ids=["first epoch", "end of an epoch", "across", "third epoch"])
def test_training_goes_on_over_the_border_of_an_epoch(made: Laboratory, finished: Laboratory, batch: int, monkeypatch: pytest.MonkeyPatch):
    finished.declare(baselines=["compute_matched"])
    monkeypatch.setenv(SECONDS_VARIABLE, "0")
    batches = ActivationReader.batches

    def interrupted(self: ActivationReader, *arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for i, each in enumerate(batches(self, *arguments, **options)):
            if i == batch:
                raise PowerCutError
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(ActivationReader, "batches", interrupted)
        with pytest.raises(PowerCutError):
            finished.run(seeds=[SEED], select=["baseline/compute_matched"])
    finished.run(seeds=[SEED], select=["baseline/compute_matched"])
    found, expected = (each.artefact("baseline/compute_matched", SEED) for each in (finished, made))
    assert found.provenance["resumed_at_tokens"] == [batch * BATCH_TOKENS]
    assert found.data_version == expected.data_version


LISTED = [{"architecture": "topk", "expansion": expansion, "k": k} for expansion, k in ((2, 4), (4, 3), (3, 6))]
JUMPRELU = {"architecture": "jumprelu", "expansion": 2}


def test_matching_pursuit_adds_up_members_that_differ(empty: Laboratory):
    empty.declare(sae=LISTED, baselines=["matching_pursuit"])
    sae = empty.declarations()[f"{NAME}/baseline/matching_pursuit"].settings["sae"]
    assert (sae["expansion"], sae["max_iterations"]) == (9, 13)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"baselines": ["matching_pursuit"], "sae": JUMPRELU}, "baselines.0", "architecture 'jumprelu' sets its L0 through"),
        ({"baselines": ["expanded", "compute_matched"], "sae": LISTED}, "baselines.1", "not defined where sae is a list"),
        (
            {
                "baselines": ["compute_matched"],
                "ensemble": {"members": 2, "seeds": [1], "specialised": [{"member": 2, "documents": {"language": ["python"]}}]},
            },
            "baselines.0",
            "specialised members with documents see fewer",
        ),
        ({"baselines": ["expanded"], "baseline_training": SLOWER}, "baseline_training.matching_pursuit", "not among the baselines"),
        (
            {"baselines": ["expanded"], "baseline_training": {"expanded": {"batch_token": 1}}},
            "baseline_training.expanded",
            "batch_token",
        ),
    ],
)
def test_what_is_not_defined_is_refused_with_line_and_field(empty: Laboratory, changes: dict[str, Any], field: str, words: str):
    file = empty.declare(**changes)
    (message,) = empty.catalogue.broken.values()
    assert message.startswith(f"{file}:")
    assert field in message
    assert words in message
