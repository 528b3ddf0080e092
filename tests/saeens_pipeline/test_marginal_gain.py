"""`eval/marginal_gain`: the gain of each further member or round, from the tables and the dictionaries on disk."""

from __future__ import annotations

import re
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file
from sklearn.metrics.pairwise import cosine_similarity
from test_automation import AUTOMATED, CHAIN, Daemon
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of

from saeens_pipeline.assets.lineage import lineage
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.orchestration.metadata import column_lineage
from saeens_pipeline.storage.tables import read_table

METHODS = {"bagging": "bagging/member", "boosting": "boosting/round"}


def _values(laboratory: Laboratory, table: str, column: str, method: str) -> np.ndarray:
    """`[seeds, members]`, of the ensembles of 1 .. J members."""
    rows = read_table(laboratory.root, NAME, table).filter(method=method).sort("seed", "n_members")
    return rows[column].to_numpy().reshape(-1, MEMBERS)


def _enough(gains: list[np.ndarray], lows: list[np.ndarray], highs: list[np.ndarray], remaining: list[np.ndarray]) -> int | None:
    """The rule once more, `[seeds, members - 1]` each: whole intervals above or below 5 % of what remains, in every seed."""
    above = [(low > 0.05 * left.clip(0)).all(0) for low, left in zip(lows, remaining, strict=True)]
    below = [(high <= 0.05 * left.clip(0)).all(0) for high, left in zip(highs, remaining, strict=True)]
    yes, no = np.stack(above).any(0), np.stack(below).all(0)
    last = max([1, *(np.flatnonzero(yes) + 2).tolist()])
    return last if np.logical_or(yes, no)[last - 1 :].all() else None


@pytest.mark.parametrize("method", METHODS)
def test_gains_are_differences_between_sizes_with_the_intervals_of_the_table_differences(finished_laboratory: Laboratory, method: str):
    variance = _values(finished_laboratory, "reconstruction", "explained_variance", method)
    added = _values(finished_laboratory, "reconstruction", "ce_loss_added_nats", method)
    gain = _values(finished_laboratory, "marginal_gain", "explained_variance_gain", method)
    np.testing.assert_allclose(gain, np.diff(variance, axis=1, prepend=0), atol=1e-12)
    loss_gain = _values(finished_laboratory, "marginal_gain", "ce_loss_gain", method)
    np.testing.assert_allclose(loss_gain[:, 1:].astype(float), -np.diff(added, axis=1), atol=1e-12)
    ends: dict[str, list[np.ndarray]] = {"low": [], "high": []}
    differences = (
        read_table(finished_laboratory.root, NAME, "differences").filter(method=method, other_method=method).sort("seed", "n_members")
    )
    for metric, column, turned in (("explained_variance", "explained_variance_gain", False), ("ce_loss_added_nats", "ce_loss_gain", True)):
        for end, opposite in (("low", "high"), ("high", "low")):
            found = _values(finished_laboratory, "marginal_gain", f"{column}_{end}", method)[:, 1:].astype(float)
            measured = differences.filter(metric=metric)[opposite if turned else end].to_numpy().reshape(-1, MEMBERS - 1)
            np.testing.assert_array_equal(found, -measured if turned else measured)
            ends[end].append(found)
    suggested = _values(finished_laboratory, "marginal_gain", "suggested", method)
    (size,) = set(suggested.flat)
    enough = _enough([gain, loss_gain], ends["low"], ends["high"], [1 - variance[:, :-1], added[:, :-1]])
    assert (None if size is None or np.isnan(size) else size) == enough
    reason = finished_laboratory.artefact("eval/marginal_gain").provenance.get("cannot_tell", {}).get(method, "")
    assert bool(reason) == (enough is None)


@pytest.mark.parametrize("method", METHODS)
def test_new_features_differ_from_those_of_all_earlier_members(finished_laboratory: Laboratory, method: str):
    found = _values(finished_laboratory, "marginal_gain", "new_features", method)
    for row, seed in zip(found, SEEDS, strict=True):
        paths = [finished_laboratory.artefact(f"{METHODS[method]}_{j}", seed).path for j in range(1, MEMBERS + 1)]
        W_decs = [load_file(path / "sae_weights.safetensors")["W_dec"] for path in paths]
        assert row[0] == len(W_decs[0])
        for j in (1, 2):
            assert row[j] == (cosine_similarity(W_decs[j], np.concatenate(W_decs[:j])).max(axis=1) < 0.7).sum()


def test_rows_cover_both_ensembles_and_reference_their_saes(finished_laboratory: Laboratory):
    table = read_table(finished_laboratory.root, NAME, "marginal_gain")
    assert sorted(table.select("seed", "method", "n_members").iter_rows()) == sorted(
        (seed, method, n) for seed in SEEDS for method in METHODS for n in range(1, MEMBERS + 1)
    )
    reconstruction = read_table(finished_laboratory.root, NAME, "reconstruction")
    same = table.join(reconstruction, on=["experiment", "layer", "seed", "method", "n_members", "language_model", "sae_data_versions"])
    assert len(same) == len(table)


def test_a_run_prints_the_suggested_sizes_in_one_line(finished: Laboratory):
    table = read_table(finished.root, NAME, "marginal_gain").group_by("method").agg(pl.col("suggested").first())
    sizes = dict(table.iter_rows())
    (line,) = [line for line in finished.run().splitlines() if line.startswith("suggested ensemble size")]
    for method, size in sizes.items():
        said = "cannot tell" if size is None else f"{size} or more" if size == MEMBERS else str(size)
        assert re.search(rf"{method} {said}[, ]", line), (line, sizes)


def test_without_intervals_there_is_no_suggestion_and_the_record_says_why(empty: Laboratory):
    empty.declare(baselines=[], evaluations=["reconstruction", "marginal_gain"])
    printed = empty.run()
    table = read_table(empty.root, NAME, "marginal_gain")
    assert table.select("suggested", "explained_variance_gain_low").null_count().row(0) == (len(table), len(table))
    assert set(table.filter(pl.col("n_members") > 1)["worthwhile"]) == {"cannot tell"}
    assert "bagging cannot tell, boosting cannot tell" in printed
    reasons = empty.artefact("eval/marginal_gain").provenance["cannot_tell"]
    assert "the table differences" in reasons["bagging"]


def test_an_ensemble_of_one_has_its_own_gain_only(empty: Laboratory):
    empty.declare(baselines=[], ensemble={"members": 1, "seeds": list(SEEDS)})
    printed = empty.run()
    table = read_table(empty.root, NAME, "marginal_gain")
    assert table.select("n_members", "suggested").unique().rows() == [(1, 1)]
    assert (
        table["explained_variance_gain"].to_list()
        == read_table(empty.root, NAME, "reconstruction")
        .filter(pl.col("method").is_in(METHODS))
        .sort("layer", "seed", "method")["explained_variance"]
        .to_list()
    )
    assert "suggested ensemble size: bagging 1 or more, boosting 1 or more" in printed


def test_marginal_gain_without_the_table_of_reconstruction_is_refused(empty: Laboratory):
    empty.declare(evaluations=["differences", "marginal_gain"])
    assert "attributes.evaluations.1: marginal_gain is computed from the table reconstruction" in "".join(empty.catalogue.broken.values())


def test_removing_marginal_gain_makes_only_the_report_stale(finished: Laboratory):
    others = ["reconstruction", "differences", "members", "coactivation", "token_curves", "stability", "cost", "training_curves"]
    finished.declare(evaluations=others)
    assert {str(s.declaration.address) for s in status_of(NAME) if s.state != "fresh"} == {f"{NAME}/report"}
    assert "suggested" not in finished.run()


def test_column_lineage_of_marginal_gain_points_to_its_input_columns(empty: Laboratory):
    lineage_of = column_lineage(empty.declarations()[f"{NAME}/eval/marginal_gain"])
    deps = {column: {(dep.asset_key.path[-1], dep.column_name) for dep in each} for column, each in lineage_of.deps_by_column.items()}
    assert deps["explained_variance_gain"] == {("reconstruction", "explained_variance")}
    assert deps["ce_loss_gain_low"] == {("differences", "low")}
    assert deps["suggested"] == {("reconstruction", "explained_variance"), ("differences", "low")}
    assert deps["new_features"] == {("bagging_ensemble", "weights"), ("boosting_ensemble", "weights")}


def test_lineage_of_a_marginal_gain_row_shows_its_saes(finished: Laboratory):
    found = lineage(finished.store, finished.declarations().values(), f"marginal_gain:layer={LAYER},seed=2,method=boosting,n_members=2")
    assert [parent.title for parent in found.parents if parent.role.startswith("SAE")] == [
        f"{NAME}/boosting/round_{j}, layer {LAYER}, seed 2" for j in (1, 2)
    ]
    assert not list(found.problems())


def test_the_automation_requests_marginal_gain_once_together_with_stability(empty: Laboratory):
    automated: dict[str, Any] = AUTOMATED | {"evaluations": [*AUTOMATED["evaluations"], "marginal_gain"]}
    empty.declare(**automated)
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        daemon = Daemon(empty, instance)
        across_seeds = {str(LAYER): {f"{NAME}/eval/stability", f"{NAME}/eval/marginal_gain", f"{NAME}/report"}}
        assert daemon.work() == [*CHAIN[:3], across_seeds]
        empty.declare(**automated, sae=EXPERIMENT["sae"] | {"k": 5})
        assert daemon.work() == [CHAIN[2], across_seeds]
