"""`saeens export --to neuronpedia`: dashboards in the format of SAEDashboard, against the tables, dense codes and the decoder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import WHERE
from test_export import export as export  # noqa: PLC0414  # a fixture
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory
from tiny_models import CONTEXT_LENGTH, D_MODEL

import saeens_models as sm
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.tables import read_table

D_SAE = 2 * D_MODEL
FEATURE = {
    "feature_index",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "n_prompts_total",
    "n_tokens_in_prompt",
    "dataset",
    "decoder_weights_dist",
    "activations",
    "vector",
}
"""Keys of `NeuronpediaDashboardFeature.to_dict` in sae-dashboard."""
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture(scope="module")
def laboratory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment with the two tables; for reading only."""
    home = tmp_path_factory.mktemp("neuronpedia")
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(evaluations=["features", "contexts"], baselines=[])
        laboratory.run()
    return laboratory


@pytest.fixture
def active(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    laboratory.activate(monkeypatch)
    return laboratory


Export = Callable[..., tuple[int, str]]


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    batches = sorted(folder.glob("batch-*.json"), key=lambda file: int(file.stem.partition("-")[2]))
    return [json.loads(file.read_text()) for file in batches], json.loads((folder / "skipped_indexes.json").read_text())


def _codes(laboratory: Laboratory, method: str) -> torch.Tensor:
    store = ActivationStore(laboratory.artefact("activations").path)
    rows = torch.cat([store.read_chunk("test", i) for i in range(store.n_chunks("test"))]).float()
    ensemble = sm.load_ensemble(laboratory.artefact(f"{method}/{method}_ensemble", SEEDS[0]).path)
    with torch.no_grad():
        return torch.cat(list(ensemble.member_codes(rows)), dim=1)


@pytest.mark.parametrize("method", ["bagging", "boosting"])
def test_dashboards_have_the_features_of_the_ensemble(active: Laboratory, export: Export, tmp_path: Path, method: str):
    assert export(f"{NAME}/{method}{WHERE}", tmp_path / "out", "--to", "neuronpedia")[0] == 0
    batches, skipped = _read(tmp_path / "out")
    features = [feature for batch in batches for feature in batch["features"]]
    codes, W_dec = _codes(active, method), sm.load_ensemble(active.artefact(f"{method}/{method}_ensemble", SEEDS[0]).path).W_dec
    fires = (codes > 0).any(0)
    assert [feature["feature_index"] for feature in features] == fires.nonzero().flatten().tolist()
    assert skipped["skipped_indexes"] == (~fires).nonzero().flatten().tolist()
    for batch in batches:
        assert {name: batch[name] for name in ("layer", "sae_set", "sae_id_suffix")} == {
            "layer": LAYER, "sae_set": f"{NAME}-{method}-seed{SEEDS[0]}", "sae_id_suffix": None,
        }  # fmt: skip
    for feature in features:
        assert feature.keys() == FEATURE
        own, direction = codes[:, feature["feature_index"]], W_dec[feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx((own > 0).float().mean().item(), abs=1e-6)
        assert sum(feature["freq_hist_data_bar_heights"]) == (own > 0).sum()
        middles = np.array(feature["freq_hist_data_bar_values"])
        counts, _ = np.histogram(own[own > 0].numpy(), bins=[*(middles - middles[0]), middles[-1] + middles[0]])
        assert feature["freq_hist_data_bar_heights"] == counts.tolist()
        assert feature["neuron_alignment_indices"] == direction.topk(3).indices.tolist()
        assert feature["neuron_alignment_values"] == pytest.approx(direction.topk(3).values.tolist(), abs=1e-5)
        assert len(feature["pos_str"]) == len(feature["pos_values"]) == len(feature["neg_str"]) > 0
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
        for number, activation in enumerate(feature["activations"]):
            assert activation.keys() == ACTIVATION
            assert len(activation["tokens"]) == len(activation["values"])
            highest = activation["values"][activation["qualifying_token_index"]]
            assert highest == max(activation["values"])
            if number == 0:
                assert highest == pytest.approx(own.max().item(), rel=1e-3)
        assert feature["n_tokens_in_prompt"] == CONTEXT_LENGTH
    assert features[0]["n_prompts_total"] == active.artefact("tokens", layer=None).provenance["statistics"]["test"]["windows"]


def test_a_round_has_its_own_features(active: Laboratory, export: Export, tmp_path: Path):
    assert export(f"{NAME}/boosting/round_2{WHERE}", tmp_path / "out", "--to", "neuronpedia")[0] == 0
    batches, skipped = _read(tmp_path / "out")
    rows = read_table(active.root, NAME, "features").filter(method="boosting", seed=SEEDS[0], member=2).sort("index")
    found = {feature["feature_index"]: feature["frac_nonzero"] for batch in batches for feature in batch["features"]}
    assert found == {index: density for index, density in rows.select("index", "density").iter_rows() if density}
    assert len(found) + len(skipped["skipped_indexes"]) == D_SAE
    assert {batch["sae_id_suffix"] for batch in batches} == {"round_2"}


def test_many_features_are_several_files(active: Laboratory, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saeens_pipeline.report.neuronpedia.BATCH_FEATURES", 7)
    assert export(f"{NAME}/bagging{WHERE}", tmp_path / "out", "--to", "neuronpedia")[0] == 0
    batches, skipped = _read(tmp_path / "out")
    assert {len(batch["features"]) for batch in batches[:-1]} == {7}
    indices = [feature["feature_index"] for batch in batches for feature in batch["features"]]
    assert sorted([*indices, *skipped["skipped_indexes"]]) == list(range(MEMBERS * D_SAE))


def test_missing_and_other_tables_are_refused(active: Laboratory, export: Export, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for subject, folder, why in (
        (f"{NAME}/bagging{WHERE}", tmp_path / "full", "is not an empty folder"),
        (f"{NAME}/eval/features:layer={LAYER}", tmp_path / "out", "is no SAE and no ensemble"),
    ):
        code, err = export(subject, folder, "--to", "neuronpedia")
        assert code != 0
        assert why in " ".join(err.split())
    assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["file"]


def test_tables_of_other_saes_are_refused(active: Laboratory, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = Laboratory(active.model, tmp_path / "defs", tmp_path / "data")
    shutil.copytree(active.root, copy.root, ignore=shutil.ignore_patterns("dagster"))
    copy.activate(monkeypatch)
    copy.declare(evaluations=["features", "contexts"], baselines=[], training={"learning_rate": 0.02, "batch_tokens": 64})
    copy.run(select=["bagging/bagging_ensemble"])
    code, err = export(f"{NAME}/bagging{WHERE}", tmp_path / "out", "--to", "neuronpedia")
    assert code != 0
    assert re.search(r"the tables are not of .*bagging_ensemble", " ".join(err.split()))
    shutil.rmtree(copy.root / "tables" / NAME / "contexts")
    code, err = export(f"{NAME}/bagging{WHERE}", tmp_path / "out", "--to", "neuronpedia")
    assert code != 0
    assert "add features and contexts to `evaluations`" in " ".join(err.split())
