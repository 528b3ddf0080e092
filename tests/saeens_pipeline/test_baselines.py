"""The baselines that match compute and L0, against computations written out; and SAEs of equal recipe in several experiments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from safetensors.numpy import load_file
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, experiment_file, experiment_settings, run_and_print
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_pipeline.assets import training
from saeens_pipeline.assets.saes import init_seed
from saeens_pipeline.storage import residuals
from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics
from saeens_pipeline.storage.checkpoints import SECONDS_VARIABLE
from saeens_pipeline.storage.names import CURVE_FILE, Address, Partition
from saeens_pipeline.storage.tables import read_table

K, D_SAE, ROWS, BATCH = 4, 2 * D_MODEL, 600, 64
SEED = SEEDS[0]
BASELINES = ["compute_matched", "matching_pursuit"]
FROZEN = {"decoder_frozen": "decoder", "decoder_soft_frozen": "decoder_soft", "encoder_frozen": "encoder"}
OTHER = "other"


@pytest.fixture(scope="module")
def compared(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment with these baselines, run on what the finished one has made; for reading only."""
    home = tmp_path_factory.mktemp("compared")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    shutil.copytree(finished_laboratory.root, laboratory.root, ignore=shutil.ignore_patterns("dagster"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        own = {"matching_pursuit": {"batch_tokens": 200}, "decoder_soft_frozen": {"learning_rate": 0.1}}  # the latter reaches its limit
        laboratory.declare(baselines=[*BASELINES, *FROZEN], baseline_training=own)
        laboratory.run()
    return laboratory


def _array(laboratory: Laboratory, split: str) -> np.ndarray:
    return np.asarray(zarr.open_group(laboratory.artefact("activations").path, mode="r")[f"{split}/activations"][:])  # pyright: ignore


def _weights(laboratory: Laboratory, key: str, seed: int = SEED) -> dict[str, np.ndarray]:
    return load_file(laboratory.artefact(key, seed).path / "sae_weights.safetensors")


def _row(laboratory: Laboratory, table: str, **wanted: Any) -> dict[str, Any]:
    (row,) = read_table(laboratory.root, NAME, table).filter(layer=LAYER, **wanted).iter_rows(named=True)
    return row


def _settings(laboratory: Laboratory, key: str) -> dict[str, Any]:
    return laboratory.artefact(key, SEED).recipe["settings"]


def test_recipes_of_baselines_differ_from_members_in_their_own_settings_only(compared: Laboratory, finished_laboratory: Laboratory):
    member = _settings(finished_laboratory, "bagging/member_1")
    expanded = _settings(finished_laboratory, "baseline/expanded")
    assert set(member) == {"sae", "training", "init_seed", "data_seed"}
    assert expanded == member | {"sae": member["sae"] | {"expansion": MEMBERS * 2}, "init_seed": init_seed(SEED, 0)}
    assert _settings(compared, "baseline/compute_matched") == member | {"epochs": MEMBERS}
    pursuit = {
        "architecture": "matching_pursuit",
        "max_iterations": MEMBERS * K,
        "residual_threshold": 0.01,
        "stop_on_duplicate_support": True,
    }
    pursuit |= {"apply_b_dec_to_input": True, "decoder_init_norm": 1.0, "expansion": MEMBERS * 2}
    assert _settings(compared, "baseline/matching_pursuit") == expanded | {
        "sae": pursuit,
        "training": member["training"] | {"batch_tokens": 200},
    }


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_baselines_are_member_1_with_weights_that_stay(compared: Laboratory, finished_laboratory: Laboratory, name: str):
    member = _settings(finished_laboratory, "bagging/member_1")
    changed = {"frozen": FROZEN[name]} | ({"learning_rate": 0.1} if name == "decoder_soft_frozen" else {})
    assert _settings(compared, f"baseline/{name}") == member | {"training": member["training"] | changed}
    config = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=D_SAE, k=K, init_seed=init_seed(SEED, 1))
    initial = {key: weight.detach().numpy() for key, weight in sm.build_sae(config).named_parameters()}
    frozen, free = _weights(compared, f"baseline/{name}"), _weights(finished_laboratory, "bagging/member_1")
    for each in (initial, frozen, free):
        each["rows"] = each["W_dec"] / np.linalg.norm(each["W_dec"], axis=1, keepdims=True)
    if name == "encoder_frozen":
        assert np.array_equal(frozen["W_enc"], initial["W_enc"])
        assert not np.allclose(frozen["rows"], initial["rows"], atol=1e-3)
        return
    cosines = (frozen["rows"] * initial["rows"]).sum(axis=1)
    assert cosines.min() == pytest.approx(1 if name == "decoder_frozen" else 0.8, abs=1e-6)
    assert not np.allclose(frozen["W_enc"], initial["W_enc"], atol=1e-3)
    assert not np.allclose(frozen["rows"], free["rows"], atol=1e-3)


def test_frozen_baselines_are_in_the_tables(compared: Laboratory):
    for name in FROZEN:
        row = _row(compared, "reconstruction", method=name, seed=SEED)
        assert (row["n_members"], row["n_features"]) == (1, D_SAE)


@pytest.mark.parametrize("seed", SEEDS)
def test_compute_matched_trains_on_one_permutation_of_the_rows_per_epoch(compared: Laboratory, seed: int):
    x = torch.from_numpy(_array(compared, "train")).float()
    orders = []
    for epoch in range(MEMBERS):
        generator = np.random.default_rng([seed, epoch])
        generator.permutation(1)  # of chunks: all rows are in one
        orders.append(generator.permutation(ROWS))
    stream = x[np.concatenate(orders)]
    statistics = ActivationStatistics.from_json(compared.artefact("activations").provenance["statistics"]["train"])
    training = sm.TrainingConfig(
        **EXPERIMENT["training"],
        total_tokens=MEMBERS * ROWS,
        input_mean=tuple(statistics.mean.tolist()),
        input_scale=D_MODEL**0.5 / statistics.mean_norm,
    )
    config = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=D_SAE, k=K, init_seed=init_seed(seed, 1))
    (expected,) = sm.train([config], stream.split(BATCH), training)
    made = _weights(compared, "baseline/compute_matched", seed)
    for name, tensor in expected.state_dict().items():
        assert np.array_equal(made[name], tensor.numpy()), name


@pytest.mark.parametrize("interrupted_at", [9, 10, 23])  # batch 9, from 0, holds rows of two epochs
def test_a_training_interrupted_between_epochs_resumes_with_the_same_bits(
    compared: Laboratory, finished: Laboratory, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
):
    monkeypatch.setenv(SECONDS_VARIABLE, "0")
    finished.declare(baselines=["compute_matched"])
    batches = ActivationReader.batches

    def interrupted(self: ActivationReader, *arguments: Any, **options: Any) -> Any:
        for i, batch in enumerate(batches(self, *arguments, **options)):
            if i == interrupted_at:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(ActivationReader, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finished.run(seeds=[SEED], select=["baseline/compute_matched"])
    finished.run(seeds=[SEED], select=["baseline/compute_matched"])
    made, expected = (each.artefact("baseline/compute_matched", SEED) for each in (finished, compared))
    assert made.provenance["resumed_at_tokens"] == [interrupted_at * BATCH]
    assert made.data_version == expected.data_version
    curves = [pl.read_parquet(each.path / CURVE_FILE) for each in (made, expected)]
    assert curves[0].equals(curves[1])


def _plain_pursuit(x: np.ndarray, weights: dict[str, np.ndarray], iterations: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruction and code of one token after another, in float64."""
    W_dec, b_dec = (weights[name].astype(np.float64) for name in ("W_dec", "b_dec"))
    code, residuals = np.zeros((len(x), len(W_dec))), x.astype(np.float64) - b_dec
    for z, residual in zip(code, residuals, strict=True):
        for _ in range(iterations):
            correlations = W_dec @ residual
            chosen = int(correlations.argmax())
            value, is_repeated = max(correlations[chosen], 0), z[chosen] != 0
            z[chosen] += value
            residual[:] -= value * W_dec[chosen]
            if is_repeated or value == 0 or np.linalg.norm(residual) < threshold:
                break
    return x - residuals, code


def test_matching_pursuit_has_the_features_and_at_most_the_l0_of_the_ensemble(compared: Laboratory):
    x = _array(compared, "test").astype(np.float64)
    folder = compared.artefact("baseline/matching_pursuit", SEED).path
    threshold = json.loads((folder / "cfg.json").read_text())["residual_threshold"]
    x_hat, z = _plain_pursuit(x, _weights(compared, "baseline/matching_pursuit"), MEMBERS * K, threshold)
    row = _row(compared, "reconstruction", method="matching_pursuit", seed=SEED)
    assert (row["n_members"], row["n_features"]) == (1, MEMBERS * D_SAE)
    assert row["l0"] == pytest.approx(np.count_nonzero(z) / len(z), rel=1e-3)
    assert row["l0"] <= MEMBERS * K
    assert row["mse"] == pytest.approx(((x - x_hat) ** 2).sum(axis=1).mean(), rel=1e-3)


def test_cost_counts_every_pass_and_every_iteration(compared: Laboratory):
    single, matched, pursuit = (_row(compared, "cost", method=method, seed=SEED) for method in ("single", *BASELINES))
    assert single["train_tokens"] == pursuit["train_tokens"] == ROWS
    assert matched["train_tokens"] == MEMBERS * ROWS
    assert matched["train_flops"] == MEMBERS * single["train_flops"] == MEMBERS * ROWS * 10 * D_MODEL * D_SAE
    assert matched["inference_flops_per_token"] == single["inference_flops_per_token"] == 4 * D_MODEL * D_SAE
    iterations, wide = MEMBERS * K, MEMBERS * D_SAE
    encoding = iterations * (2 * D_MODEL * wide + 2 * D_MODEL)
    assert pursuit["inference_flops_per_token"] == encoding
    assert pursuit["train_flops"] == ROWS * (encoding + iterations * 10 * D_MODEL)
    for row in (matched, pursuit):
        assert row["n_members"] == 1
        assert row["train_seconds"] > 0
        assert row["peak_memory_bytes"] > 0


@pytest.mark.parametrize("table", ["reconstruction", "coactivation", "stability", "cost"])
def test_every_table_has_a_row_for_each_baseline(compared: Laboratory, table: str):
    rows = read_table(compared.root, NAME, table).filter(pl.col("method").is_in(BASELINES))
    expected = [(seed, method, 1) for seed in SEEDS for method in BASELINES]
    assert sorted(rows.select("seed", "method", "n_members").rows()) == sorted(expected)
    for row in rows.iter_rows(named=True):
        assert row["sae_data_versions"] == compared.artefact(f"baseline/{row['method']}", row["seed"]).data_version


def test_the_summary_has_a_line_for_each_baseline(compared: Laboratory, monkeypatch: pytest.MonkeyPatch):
    compared.activate(monkeypatch)
    printed = compared.run()
    assert "no training" in printed
    lines = [line.split()[:2] for line in printed.splitlines()]
    assert [line for line in lines if line and line[0] in BASELINES] == [[method, "1"] for method in BASELINES]


# equal recipes


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of what is trained from now on."""
    train, keys = training.train_saes, []

    def counted(workplace: Any, tasks: Any, *others: Any) -> None:
        keys.extend(str(task.declaration.address) for task in tasks)
        train(workplace, tasks, *others)

    monkeypatch.setattr(training, "train_saes", counted)
    return keys


def _run(name: str, **options: Any) -> None:
    import io

    from rich.console import Console

    run_and_print(name, **options, console=Console(file=io.StringIO()))


def test_saes_of_another_experiment_with_the_same_recipe_are_linked(finished: Laboratory, trained: list[str]):
    smaller = experiment_settings(name=OTHER, ensemble={"members": 2, "seeds": list(SEEDS)}, expanded_sizes=[1, 2])
    finished.write(experiment_file(("EnsembleExperiment", smaller)), OTHER)
    _run(OTHER)
    names = ["baseline/expanded", "baseline/expanded_1", "baseline/expanded_l0_matched"]
    assert sorted(trained) == sorted(f"{OTHER}/{name}" for name in names for _ in SEEDS)
    for kind, name in (("bagging", "member_2"), ("boosting", "round_2")):
        mine, theirs = (finished.store.require(Address(owner, kind, name), Partition(LAYER, SEED)) for owner in (OTHER, NAME))  # pyright: ignore[reportArgumentType]
        assert mine.provenance["same_as"] == f"{NAME}/{kind}/{name}"
        assert mine.data_version == theirs.data_version
        assert (mine.path / "sae_weights.safetensors").samefile(theirs.path / "sae_weights.safetensors")
        assert mine.provenance["train_seconds"] == theirs.provenance["train_seconds"]


@pytest.mark.parametrize(("keep", "stored"), [("last", [2]), ("all", [1, 2]), ("none", [])])
def test_residuals_that_another_experiment_has_made_by_the_same_recipe_are_linked(
    finished: Laboratory, keep: str, stored: list[int], monkeypatch: pytest.MonkeyPatch
):
    write, written = residuals.write_residual, []
    monkeypatch.setattr(residuals, "write_residual", lambda *a, name, **o: (written.append(name), write(*a, name=name, **o))[1])
    finished.write(experiment_file(("EnsembleExperiment", experiment_settings(name=OTHER, keep_residuals=keep))), OTHER)
    _run(OTHER, seeds=[SEED], select=["boosting/round_3"])
    assert written == ([f"{OTHER}/boosting/residual_1"] if keep == "all" else [])  # of the other experiment's, these bytes were dropped
    found = {
        j: [finished.store.require(Address(n, "boosting", f"residual_{j}"), Partition(LAYER, SEED)) for n in (OTHER, NAME)] for j in (1, 2)
    }
    for mine, theirs in found.values():
        assert (mine.data_version, mine.provenance["statistics"]) == (theirs.data_version, theirs.provenance["statistics"])
    mine, theirs = found[2]
    assert mine.provenance["same_as"] == f"{NAME}/boosting/residual_2"
    assert [j for j, (mine, _) in found.items() if mine.files] == stored
    assert theirs.verify() == []
    assert all((mine.path / name).samefile(theirs.path / name) for name in mine.files)


def test_a_damaged_sae_of_another_experiment_is_not_linked(finished: Laboratory, trained: list[str]):
    finished.write(experiment_file(("EnsembleExperiment", experiment_settings(name=OTHER))), OTHER)
    weights: Path = finished.artefact("bagging/member_2", SEED).path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    _run(OTHER, seeds=[SEED], select=["bagging/member_2", "bagging/member_3"])
    assert trained == [f"{OTHER}/bagging/member_2"]


def test_compute_matched_of_one_member_equals_that_member(finished: Laboratory):
    finished.declare(baselines=["compute_matched"], ensemble={"members": 1, "seeds": [SEED]})
    finished.run(select=["baseline/compute_matched"])
    assert finished.artefact("baseline/compute_matched", SEED).provenance["same_as"] == f"{NAME}/bagging/member_1"


def test_matching_pursuit_has_the_total_size_of_different_members(empty: Laboratory):
    saes = [{"architecture": "topk", "expansion": expansion, "k": k} for expansion, k in ((2, 4), (4, 3), (3, 6))]
    empty.declare(sae=saes, baselines=["matching_pursuit"])
    sae = empty.declarations()[f"{NAME}/baseline/matching_pursuit"].settings["sae"]
    assert (sae["expansion"], sae["max_iterations"]) == (9, 13)


def test_matching_pursuit_uses_the_mean_l0_of_batches(empty: Laboratory):
    empty.declare(sae={"architecture": "batch_topk", "expansion": 2, "k": 4.5}, baselines=["matching_pursuit"])
    assert empty.declarations()[f"{NAME}/baseline/matching_pursuit"].settings["sae"]["max_iterations"] == 14  # 3 * 4.5, rounded
