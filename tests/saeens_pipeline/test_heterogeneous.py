"""Ensembles whose members have configurations of their own: `sae` as a list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from safetensors.numpy import load_file
from sklearn.metrics.pairwise import cosine_similarity
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_pipeline.assets.health import warnings_of
from saeens_pipeline.assets.memory import portion_within
from saeens_pipeline.assets.tables.leaderboard import standings
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

TOPK = [{"architecture": "topk", "expansion": expansion, "k": k} for expansion, k in ((2, 4), (4, 3), (3, 6))]
MIXED = [
    {"architecture": "standard", "d_sae": 24, "l1_coefficient": 0.1},
    {"architecture": "topk", "d_sae": 40, "k": 5},
    {"architecture": "jumprelu", "d_sae": 32, "l0_coefficient": 0.01, "init_threshold": 0.01},
]
TRAIN, TEST = 600, 200


def _made(tiny_model: Path, home: Path, **experiment: Any) -> Laboratory:
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(**experiment)
        laboratory.run()
    return laboratory


@pytest.fixture(scope="module")
def topk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """Three TopK members of different widths and k, with every expanded size; for reading only."""
    return _made(tiny_model, tmp_path_factory.mktemp("topk"), sae=TOPK, expanded_sizes="all")


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """Members of three architectures, boosted concurrently; for reading only."""
    return _made(
        tiny_model,
        tmp_path_factory.mktemp("mixed"),
        sae=MIXED,
        baselines=["expanded"],
        ensemble=EXPERIMENT["ensemble"] | {"boosting": "concurrent"},
    )


# Tables against a dense computation in float64, from the files


class Plain:
    """An SAE from its SAELens files, its activation function written out for each architecture."""

    def __init__(self, laboratory: Laboratory, key: str, seed: int) -> None:
        artefact = laboratory.artefact(key, seed)
        self.weights = {name: values.astype(np.float64) for name, values in load_file(artefact.path / "sae_weights.safetensors").items()}
        self.W_dec, self.settings = self.weights["W_dec"], artefact.recipe["settings"]["sae"]

    def encode(self, x: np.ndarray) -> np.ndarray:
        pre = (x - self.weights["b_dec"]) @ self.weights["W_enc"] + self.weights["b_enc"]
        match self.settings["architecture"]:
            case "topk":
                return np.where(pre >= np.sort(pre, axis=1)[:, -self.settings["k"]][:, None], np.maximum(pre, 0), 0)
            case "jumprelu":
                return np.where(pre > self.weights["threshold"], pre, 0)
            case _:
                return np.maximum(pre, 0)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return z @ self.W_dec + self.weights["b_dec"]


def _ensemble(saes: list[Plain], method: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruction and concatenated code."""
    codes, of_members, given = [], [], x
    for sae in saes:
        codes.append(sae.encode(given))
        of_members.append(sae.decode(codes[-1]))
        given = given - of_members[-1] if method == "boosting" else x
    combined = np.sum(of_members, axis=0) if method == "boosting" else np.mean(of_members, axis=0)
    return combined, np.concatenate(codes, axis=1)


@pytest.mark.parametrize("name", ["topk", "mixed"])
@pytest.mark.parametrize("method", ["bagging", "boosting"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_prefix_agrees_with_a_dense_computation(request: pytest.FixtureRequest, name: str, method: str, n: int):
    laboratory: Laboratory = request.getfixturevalue(name)
    x = np.asarray(zarr.open_group(laboratory.artefact("activations").path, mode="r")["test/activations"][:], np.float64)  # pyright: ignore
    prefix = "boosting/round" if method == "boosting" else "bagging/member"
    for seed in SEEDS:
        saes = [Plain(laboratory, f"{prefix}_{j}", seed) for j in range(1, n + 1)]
        x_hat, z = _ensemble(saes, method, x)
        of_size = pl.col("method") == method, pl.col("n_members") == n, pl.col("seed") == seed
        row = read_table(laboratory.root, NAME, "reconstruction").row(by_predicate=pl.all_horizontal(of_size), named=True)
        assert row["n_features"] == z.shape[1] == sum(len(sae.W_dec) for sae in saes)
        assert row["mse"] == pytest.approx(((x - x_hat) ** 2).sum(axis=1).mean(), rel=1e-4)
        variance = ((x - x.mean(axis=0)) ** 2).sum(axis=0)
        assert row["explained_variance"] == pytest.approx((1 - ((x - x_hat) ** 2).sum(axis=0) / variance).mean(), abs=1e-4)
        assert row["l0"] == pytest.approx(np.count_nonzero(z) / TEST)
        assert row["dead_features"] == pytest.approx((np.count_nonzero(z, axis=0) == 0).mean())
        row = read_table(laboratory.root, NAME, "coactivation").row(by_predicate=pl.all_horizontal(of_size), named=True)
        fires = (z != 0).astype(float)
        assert row["connectivity"] == pytest.approx(1 - np.count_nonzero(fires.T @ fires) / z.shape[1] ** 2)
        cosines = cosine_similarity(np.concatenate([sae.W_dec for sae in saes]))
        np.fill_diagonal(cosines, -1)
        assert row["diversity"] == (cosines.max(axis=1) < 0.7).sum()


@pytest.mark.parametrize("name", ["topk", "mixed"])
@pytest.mark.parametrize("method", ["bagging", "boosting"])
def test_stability_of_different_members_equals_scikit_learn(request: pytest.FixtureRequest, name: str, method: str):
    laboratory: Laboratory = request.getfixturevalue(name)
    prefix = "boosting/round" if method == "boosting" else "bagging/member"
    for n in (1, 2, 3):
        first, second = (np.concatenate([Plain(laboratory, f"{prefix}_{j}", seed).W_dec for j in range(1, n + 1)]) for seed in SEEDS)
        found = read_table(laboratory.root, NAME, "stability").filter(method=method, n_members=n).sort("seed")["stability"].to_list()
        cosines = cosine_similarity(first, second)
        assert found == pytest.approx([np.maximum(cosines.max(axis=axis), 0).mean() for axis in (1, 0)], abs=1e-5)


def test_an_ensemble_of_different_architectures_is_one_sae(mixed: Laboratory):
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0))
    for kind, n in (("bagging", 3), ("boosting", 2)):
        ensemble = sm.load_ensemble(mixed.artefact(f"{kind}/{kind}_ensemble", 1).path)[:n]
        z = ensemble.encode(x)
        assert z.shape == (50, sum(sae["d_sae"] for sae in MIXED[:n]))
        torch.testing.assert_close(z @ ensemble.W_dec + ensemble.b_dec, ensemble(x), rtol=1e-4, atol=1e-4)
        assert ensemble.feature(24 + 3) == (1, 3)


# What is trained


def test_members_and_rounds_use_the_configurations_in_order(topk: Laboratory):
    for j, wanted in enumerate(TOPK, start=1):
        for key in (f"bagging/member_{j}", f"boosting/round_{j}"):
            config = sm.load_sae(topk.artefact(key, 1).path).config
            assert (config.d_sae, config.model_dump()["k"]) == (wanted["expansion"] * D_MODEL, wanted["k"])
    assert topk.artefact("boosting/round_1", 1).provenance["same_as"] == f"{NAME}/bagging/member_1"


def test_expanded_has_the_total_width_of_the_members_and_l0_matched_the_sum_of_their_k(topk: Laboratory):
    for n, suffix in ((1, "_1"), (2, "_2"), (3, "")):
        width = D_MODEL * sum(sae["expansion"] for sae in TOPK[:n])
        expanded, matched = (
            sm.load_sae(topk.artefact(f"baseline/{name}{suffix}", 1).path).config for name in ("expanded", "expanded_l0_matched")
        )
        assert (expanded.d_sae, expanded.model_dump()["k"]) == (width, TOPK[0]["k"])
        assert (matched.d_sae, matched.model_dump()["k"]) == (width, sum(sae["k"] for sae in TOPK[:n]))
    assert "same_as" in topk.artefact("baseline/expanded_l0_matched_1", 1).provenance
    assert "same_as" not in topk.artefact("baseline/expanded_l0_matched_2", 1).provenance


def test_l0_of_an_ensemble_and_of_its_l0_matched_baseline_is_the_sum_of_k(topk: Laboratory):
    l0 = {(row["method"], row["n_members"]): row["l0"] for row in read_table(topk.root, NAME, "reconstruction").filter(seed=1).to_dicts()}
    for n in (1, 2, 3):
        most = sum(sae["k"] for sae in TOPK[:n])
        assert 0.9 * most < l0["bagging", n] <= most
        assert 0.9 * most < l0["expanded_l0_matched", n] <= most


def test_the_check_of_l0_uses_the_target_of_each_sae(topk: Laboratory, monkeypatch: pytest.MonkeyPatch):
    topk.activate(monkeypatch)
    declarations = topk.declarations()
    for key, k in (("bagging/member_2", 3), ("boosting/round_3", 6), ("baseline/expanded_l0_matched", 13), ("baseline/expanded", 4)):
        artefact = replace(topk.artefact(key, 1), data_version="not evaluated yet")
        artefact.provenance["last_step"]["l0"] = 100.0
        elsewhere = replace(
            artefact, path=topk.root / "nowhere" / artefact.path.relative_to(topk.root)
        )  # without tables of held-out figures
        warnings = " ".join(warnings_of(declarations[f"{NAME}/{key}"], Partition(LAYER, 1), elsewhere, CheckSettings()))
        assert f"the target is {k} " in warnings


def test_cost_adds_up_over_members_of_different_sizes(topk: Laboratory):
    cost = read_table(topk.root, NAME, "cost").filter(seed=1)
    for n in (1, 2, 3):
        configs = [sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=sae["expansion"] * D_MODEL, k=sae["k"]) for sae in TOPK[:n]]
        for method in ("bagging", "boosting"):
            (row,) = cost.filter(method=method, n_members=n).to_dicts()
            assert row["train_tokens"] == n * TRAIN
            assert row["train_flops"] == TRAIN * sum(config.train_flops_per_token for config in configs)
            assert row["inference_flops_per_token"] == sum(config.inference_flops_per_token for config in configs)
        passes = configs[: n - 1]
        assert row["residual_flops"] == TRAIN * sum(config.inference_flops_per_token for config in passes)
        (expanded,) = cost.filter(method="expanded", n_members=n).to_dicts()
        assert expanded["train_flops"] == TRAIN * sum(config.train_flops_per_token for config in configs)


def test_the_leaderboard_shows_the_features_and_l0_of_all_members(topk: Laboratory, monkeypatch: pytest.MonkeyPatch):
    topk.activate(monkeypatch)
    rows = standings(topk.store, topk.catalogue.leaderboard().outputs[0])
    widths = {(row["method"], row["n_members"]): row["n_features"] for row in rows.to_dicts()}
    assert widths["bagging", 3] == widths["boosting", 3] == widths["expanded", 3] == 9 * D_MODEL
    assert widths["single", 1] == widths["expanded", 1] == 2 * D_MODEL


def test_the_widest_sae_decides_how_many_are_trained_together():
    configs = [sm.SAEConfig(architecture="topk", d_in=64, d_sae=d_sae, k=4) for d_sae in (64, 1024, 64)]
    widest = portion_within(0.004, [configs[1]] * 3, 128, "x")
    assert portion_within(0.004, configs, 128, "x") == widest
    assert portion_within(0.004, [configs[0]] * 3, 128, "x").n_saes == 3 > widest.n_saes


def test_a_list_is_trained_in_groups_if_memory_is_short(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_MEMORY_GB", "0.0002")
    empty.declare(sae=TOPK, baselines=[], evaluations=["reconstruction"])
    empty.run(seeds=[1])
    together = [empty.artefact(f"bagging/member_{j}", 1).provenance["trained_together"] for j in (1, 2, 3)]
    assert max(together) < MEMBERS
    assert read_table(empty.root, NAME, "reconstruction").filter(method="bagging")["n_features"].to_list() == [32, 96, 144]


def test_concurrent_rounds_depend_on_the_configurations_of_those_before_them(
    mixed: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    mixed.activate(monkeypatch)
    other = Laboratory(mixed.model, tmp_path / "defs", mixed.root)
    other.activate(monkeypatch)
    changes = {"baselines": ["expanded"], "ensemble": EXPERIMENT["ensemble"] | {"boosting": "concurrent"}}
    other.declare(sae=[MIXED[0], MIXED[1] | {"k": 6}, MIXED[2]], **changes)
    stale = {"/".join(s.declaration.address.key[1:]) for s in status_of(NAME) if s.state == "stale"}
    assert {key for key in stale if "member_" in key or "round_" in key} == {"bagging/member_2", "boosting/round_2", "boosting/round_3"}
    other.declare(sae=MIXED, **changes)
    assert {s.state for s in status_of(NAME)} == {"fresh"}


def test_a_list_of_equal_configurations_trains_the_same_members_as_one_configuration(finished: Laboratory):
    finished.declare(sae=[EXPERIMENT["sae"]] * MEMBERS)
    fresh = {"/".join(s.declaration.address.key[1:]) for s in status_of(NAME) if s.state == "fresh"}
    assert {f"bagging/member_{j}" for j in (1, 2, 3)} | {f"boosting/round_{j}" for j in (1, 2, 3)} <= fresh


# Bad input

WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "too few": ({"sae": TOPK[:2]}, "sae", "a list has one entry per member: 2 given, and ensemble.members is 3"),
    "too many": ({"sae": [*TOPK, TOPK[0]]}, "sae", "4 given, and ensemble.members is 3"),
    "none": ({"sae": []}, "sae", "0 given"),
    "a value": ({"sae": [TOPK[0], TOPK[1] | {"k": -1}, TOPK[2]]}, "sae.1.k", "greater than 0 (found: -1)"),
    "unknown key": (
        {"sae": [TOPK[0], TOPK[1], TOPK[2] | {"l1_coefficient": 1}]},
        "sae.2.l1_coefficient",
        "unknown key; one of: architecture, expansion,",
    ),
    "architecture": ({"sae": [TOPK[0], TOPK[1], {"architecture": "relu", "expansion": 2}]}, "sae.2.architecture", "topk"),
    "widths of two kinds": ({"sae": [TOPK[0], TOPK[1], {"architecture": "topk", "d_sae": 9, "k": 1}]}, "sae", "expansion in every entry"),
    "L0 that cannot be added": (
        {"sae": [TOPK[0], TOPK[1], {"architecture": "standard", "expansion": 2}]},
        "baselines.1",
        "expanded_l0_matched has the L0 of all members added up; of member 3, architecture 'standard' sets its L0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_list_is_reported_with_path_line_and_field(empty: Laboratory, case: str):
    experiment, field, message = WRONG[case]
    file = empty.declare(**experiment)
    (complaint,) = empty.catalogue.broken.values()
    where, _, rest = complaint.partition(": ")
    assert rest.startswith(f"attributes.{field}: ")
    assert message in rest
    path, _, line = where.rpartition(":")
    lines = file.read_text().splitlines()
    head = "  baselines:" if field.startswith("baselines") else "  sae:"
    start = next(number for number, text in enumerate(lines, start=1) if text.startswith(head))
    assert path == str(file)
    assert start <= int(line) <= start + 20


def test_an_sae_narrower_than_its_k_is_refused_before_anything_is_computed(empty: Laboratory):
    empty.declare(sae=[TOPK[0], TOPK[1] | {"k": 100}, TOPK[2]])
    with pytest.raises(Exception, match="k = 100 is larger than d_sae = 64"):
        empty.run()
    assert not empty.root.exists()


def test_the_experiments_command_lists_each_configuration_once(topk: Laboratory, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from saeens_pipeline.cli import app

    topk.activate(monkeypatch)
    monkeypatch.setenv("COLUMNS", "250")
    printed = CliRunner().invoke(app, ["experiments"]).output
    assert "topk" in printed
    for sae in TOPK:
        assert f"k {sae['k']}" in " ".join(printed.split())
