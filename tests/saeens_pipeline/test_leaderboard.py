"""The leaderboard: all evaluated methods with means and scipy's intervals, rebuilt when a table changes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import dagster as dg
import numpy as np
import polars as pl
import pytest
import scipy.stats
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, experiment_file, experiment_settings

from saeens_pipeline import cli
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.registry import TABLES, columns_of, seed_metrics, table_frame
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.assets.tables.leaderboard import standings
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.names import LEADERBOARD, LEADERBOARD_ADDRESS, Address, Partition
from saeens_pipeline.storage.recipes import Recipe, read_artefact

METHODS = ["boosting", "expanded_l0_matched", "bagging", "expanded", "single"]
OTHER = "other"


def _declaration(laboratory: Laboratory) -> Declaration:
    (declaration,) = laboratory.catalogue.leaderboard().outputs
    return declaration


def _standings(laboratory: Laboratory, **options: Any) -> pl.DataFrame:
    return standings(laboratory.store, _declaration(laboratory), **options)


def _declare_other(laboratory: Laboratory, seeds: Sequence[int] = (1, 2, 3)) -> None:
    """A second experiment on the same source."""
    settings = experiment_settings(name=OTHER, ensemble={"members": 2, "seeds": list(seeds)})
    laboratory.write(experiment_file(("EnsembleExperiment", settings)), OTHER)


def _write(laboratory: Laboratory, table: str, where: tuple[int, int | None], rows: Sequence[dict[str, Any]]) -> None:
    """A table of a single SAE of the other experiment, for a layer and seed, as evaluation would have written it."""
    layer, seed = where
    subject = {"experiment": OTHER, "layer": layer, "seed": seed, "language_model": "trained", "method": "single", "n_members": 1}
    contents = table_frame(table, [subject | {"sae_data_versions": f"sae-{seed}"} | row for row in rows])
    recipe = Recipe("test", 1, {"rows": contents.to_dicts()})
    laboratory.store.write_table(Address(OTHER, "eval", table), Partition(layer, seed), recipe, {}, contents)


def _row(table: pl.DataFrame, **wanted: Any) -> dict[str, Any]:
    return table.row(by_predicate=pl.all_horizontal(pl.col(name) == value for name, value in wanted.items()), named=True)


def _parts(laboratory: Laboratory, table: str) -> pl.DataFrame:
    parts = sorted((laboratory.root / "tables" / NAME / table).rglob("part.parquet"))
    return pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts])


def test_every_method_has_a_row_at_its_full_size_with_the_documented_columns(finished: Laboratory):
    table = _standings(finished)
    assert table.columns == [column.name for column in columns_of(LEADERBOARD)]
    assert {(row["method"], row["n_members"]) for row in table.iter_rows(named=True)} == {
        ("single", 1),
        *((method, MEMBERS) for method in METHODS if method != "single"),
    }
    assert set(table["experiment"]) == set(table["source"]) == {NAME}
    assert set(table["language_model"]) == {"trained"}
    assert set(table["seeds"]) == {",".join(map(str, SEEDS))}


@pytest.mark.parametrize("method", METHODS)
def test_means_points_and_intervals_equal_those_of_the_tables(finished: Laboratory, method: str):
    row = _row(_standings(finished), method=method)
    measured = _measured(finished, method, row["n_members"])
    for name, (table, _) in seed_metrics().items():
        if name == "ce_loss_recovered_from_mean":  # null: without training the mean activation changes the loss by less than 0.05 nats
            assert measured[table][name].null_count() == len(SEEDS)
            assert row[name] is row[f"{name}_by_seed"] is None
            continue
        if table == "recovery":  # only of sources with known features
            assert row[name] is None
            continue
        points = measured[table][name].to_numpy()
        assert row[name] == pytest.approx(points.mean(), rel=1e-12), name
        assert row[f"{name}_low"] is row[f"{name}_high"] is None, "with two seeds the points say more"
        assert [float(point) for point in row[f"{name}_by_seed"].split(",")] == points.tolist(), name
    assert row["n_seeds"] == 2
    assert row["train_seconds"] == pytest.approx(measured["cost"]["train_seconds"].to_numpy().mean(), rel=1e-12)
    assert row["train_tokens"] == measured["cost"]["train_tokens"].to_numpy().mean()
    assert row["n_features"] == measured["reconstruction"]["n_features"][0]
    assert row["sae_data_versions"].split(";") == measured["reconstruction"]["sae_data_versions"].to_list()


def _measured(laboratory: Laboratory, method: str, n: int) -> dict[str, pl.DataFrame]:
    tables = ("reconstruction", "coactivation", "stability", "cost")
    return {name: _parts(laboratory, name).filter(method=method, n_members=n).sort("seed") for name in tables}


def test_the_leaderboard_covers_every_metric_of_every_table():
    """Counts, chance levels, bounds, and a property of the test rows alone are left out."""
    for table in ("reconstruction", "coactivation", "stability"):
        numbers = {column.name for column in TABLES[table].all_columns if column.type == "float" or column.name == "diversity"}
        context = {name for name in numbers if "_chance_" in name or name.endswith("_left_out")} | {
            "top_rows_variance",
            "pw_mcc_bound",
            "l0_error",
            "stability_of_member",
        }
        assert numbers - context == {name for name, (its_table, _) in seed_metrics().items() if its_table == table}


def test_ensembles_of_every_size_have_a_row_on_request(finished: Laboratory):
    table = _standings(finished, sizes="all")
    sizes = {(row["method"], row["n_members"]) for row in table.iter_rows(named=True)}
    assert sizes == {
        ("single", 1),
        *((method, n) for method in ("bagging", "boosting") for n in range(1, MEMBERS + 1)),
        ("expanded", MEMBERS),
        ("expanded_l0_matched", MEMBERS),
    }
    row, measured = _row(table, method="boosting", n_members=2), _measured(finished, "boosting", 2)
    assert row["ce_loss_recovered"] == pytest.approx(measured["reconstruction"]["ce_loss_recovered"].mean())
    assert row["stability"] == pytest.approx(measured["stability"]["stability"].mean())
    assert row["rank"] == (table["explained_variance"] > row["explained_variance"]).sum() + 1


def test_seeds_without_a_value_have_an_empty_point(finished: Laboratory):
    _declare_other(finished)
    for seed, value in ((1, None), (2, 0.25), (3, 0.75)):
        _write(finished, "reconstruction", (LAYER, seed), [{"explained_variance": 0.5, "ce_loss_recovered": value}])
    row = _row(_standings(finished), experiment=OTHER)
    assert (row["ce_loss_recovered"], row["ce_loss_recovered_by_seed"]) == (0.5, ",0.25,0.75")
    assert row["ce_loss_recovered_low"] is row["ce_loss_recovered_high"] is None
    assert row["description_length_bits"] is None
    assert row["description_length_bits_by_seed"] is None


def test_what_compares_seeds_has_a_jackknife_interval_or_none(finished: Laboratory):
    _declare_other(finished)
    for seed in (1, 2, 3):
        _write(finished, "reconstruction", (LAYER, seed), [{"explained_variance": 0.5}])
    pairs = np.array([[0, 0.3, 0.5], [0.3, 0, 0.4], [0.5, 0.4, 0]])  # pw_mcc of each pair
    own, left_out = pairs.sum(1) / 2, [0.4, 0.5, 0.3]
    rows = [{"seed": i + 1, "stability": (6 + i) / 10, "pw_mcc": own[i], "pw_mcc_left_out": left_out[i]} for i in range(3)]
    _write(finished, "stability", (LAYER, None), rows)
    row = _row(_standings(finished), experiment=OTHER)
    assert (row["stability"], row["stability_low"], row["stability_high"]) == (pytest.approx(0.7), None, None)
    assert row["stability_by_seed"] == "0.6,0.7,0.8"
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(2 / 3 * np.var(left_out) * 3)
    assert (row["pw_mcc_low"], row["pw_mcc_high"]) == pytest.approx((0.4 - half, 0.4 + half))


def test_rows_are_ranked_within_source_and_layer(finished: Laboratory):
    _declare_other(finished)
    for seed, value in ((1, 2.0), (2, 2.5), (3, 3.0)):  # better than anything
        _write(finished, "reconstruction", (LAYER, seed), [{"explained_variance": value, "l0": 1.0, "n_features": 4}])
        _write(finished, "reconstruction", (2, seed), [{"explained_variance": value, "l0": 1.0, "n_features": 4}])
    table = _standings(finished)
    assert table["layer"].to_list() == [LAYER] * 6 + [2]
    assert table["rank"].to_list() == [1, 2, 3, 4, 5, 6, 1]
    assert table["experiment"].to_list() == [OTHER] + [NAME] * 5 + [OTHER]
    values = table.filter(layer=LAYER)["explained_variance"].to_list()
    assert values == sorted(values, reverse=True)
    first = table.row(0, named=True)
    low, high = scipy.stats.t.interval(0.95, 2, loc=2.5, scale=0.5 / 3**0.5)
    assert (first["explained_variance_low"], first["explained_variance_high"]) == pytest.approx((low, high), rel=1e-9)
    assert [first[name] for name in ("stability", "connectivity", "train_tokens", "train_seconds")] == [None] * 4


@pytest.mark.parametrize(
    ("column", "descending"),
    [("stability", True), ("ce_loss_recovered", True), ("train_flops", False), ("total_flops", False), ("l0", False), ("mse", False)],
)
def test_rows_rank_by_any_column_with_the_better_end_first(finished: Laboratory, column: str, descending: bool):
    values = with_totals(_standings(finished, sort=column))[column].to_list()
    assert values == sorted(values, reverse=descending)
    assert len(set(values)) > 1


def test_ties_are_all_but_differences_to_the_best_without_zero_in_every_seed(finished: Laboratory):
    table = _standings(finished)
    best = table["method"][0]
    differences = _parts(finished, "differences").filter(metric="explained_variance")
    for method, said in table.select("method", "tied_with_best").iter_rows():
        pair = differences.filter(
            ((pl.col("method") == best) & (pl.col("other_method") == method))
            | ((pl.col("method") == method) & (pl.col("other_method") == best)),
            pl.max_horizontal("n_members", "other_n_members") == MEMBERS,
            (pl.col("n_members") == pl.col("other_n_members")) | pl.any_horizontal(pl.col("method", "other_method") == "single"),
        )
        apart = [not low <= 0 <= high for low, high in pair.select("low", "high").iter_rows()]
        assert len(apart) == (0 if method == best else len(SEEDS))
        assert said == ("best" if method == best else "no" if all(apart) else "tie")
    assert set(_standings(finished, sizes="all").filter(method="bagging", n_members=1)["tied_with_best"]) == {None}


def test_an_unknown_column_is_refused_with_the_known_ones(finished: Laboratory):
    with pytest.raises(ConfigurationError, match=r"--sort colour: .* explained_variance.*train_flops"):
        _standings(finished, sort="colour")


def test_with_one_seed_there_is_no_interval(finished: Laboratory):
    finished.declare(ensemble=EXPERIMENT["ensemble"] | {"seeds": [SEEDS[0]]})
    table = _standings(finished)
    assert set(table["n_seeds"]) == {1}
    assert table["explained_variance_low"].null_count() == table["explained_variance_high"].null_count() == len(table) == 5


def test_non_finite_values_are_left_out(finished: Laboratory):
    _declare_other(finished)
    for seed, value in ((1, float("nan")), (2, None), (3, 0.5)):
        _write(finished, "reconstruction", (LAYER, seed), [{"explained_variance": value}])
    assert _row(_standings(finished), experiment=OTHER)["explained_variance_by_seed"] == "0.5"


def test_removed_experiments_and_damaged_tables_are_left_out(finished: Laboratory):
    _declare_other(finished)
    for seed in (1, 2):
        _write(finished, "reconstruction", (LAYER, seed), [{"explained_variance": 0.5}])
    part = finished.store.path(Address(OTHER, "eval", "reconstruction"), Partition(LAYER, 1))
    part.write_bytes(part.read_bytes()[:100])
    assert _row(_standings(finished), experiment=OTHER)["seeds"] == "2"
    shutil.rmtree(finished.folder / OTHER)
    assert set(_standings(finished)["experiment"]) == {NAME}


# as an asset


def _materialise(laboratory: Laboratory) -> dg.AssetMaterialization:
    with dg.DagsterInstance.ephemeral() as instance:
        result = (
            laboratory.catalogue.definitions()
            .resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey("leaderboard")],
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        )
    (event,) = result.get_asset_materialization_events()
    return event.step_materialization_data.materialization


def test_the_leaderboard_is_one_asset_that_depends_on_the_tables_of_all_experiments(empty: Laboratory):
    _declare_other(empty)
    (spec,) = [s for s in empty.catalogue.definitions().resolve_all_asset_specs() if s.key == dg.AssetKey("leaderboard")]
    assert (spec.group_name, spec.partitions_def) == ("leaderboard", None)
    tables = ("reconstruction", "differences", "coactivation", "stability", "cost")
    assert {d.asset_key.to_user_string() for d in spec.deps} == {f"{e}/eval/{t}" for e in (NAME, OTHER) for t in tables}
    assert [column.name for column in spec.metadata["dagster/column_schema"].columns] == [column.name for column in columns_of(LEADERBOARD)]


def test_the_leaderboard_is_empty_without_evaluated_experiments(empty: Laboratory):
    event = _materialise(empty)
    assert event.metadata["dagster/row_count"].value == 0
    assert pl.read_parquet(empty.root / "tables" / "leaderboard" / "part.parquet").is_empty()


def test_the_leaderboard_is_a_cache_hit_until_a_table_changes(finished: Laboratory):
    part = finished.root / "tables" / "leaderboard" / "part.parquet"

    def materialise() -> tuple[dg.AssetMaterialization, str]:
        """The event, and which run made the table."""
        event = _materialise(finished)
        return event, read_artefact(part).provenance["run_id"]

    _declare_other(finished)
    event, first_run = materialise()
    assert pl.read_parquet(part).equals(_standings(finished))
    assert "boosting" in str(event.metadata["best"].value)
    assert materialise()[1] == first_run
    _write(finished, "reconstruction", (LAYER, 1), [{"explained_variance": 0.5}])
    event, second_run = materialise()
    assert second_run != first_run
    assert event.metadata["dagster/row_count"].value == 6
    table = finished.store.require(Address(OTHER, "eval", "reconstruction"), Partition(LAYER, 1))
    assert read_artefact(part).recipe["inputs"][f"{OTHER}/eval/reconstruction, layer {LAYER}, seed 1"] == table.data_version
    _write(finished, "reconstruction", (LAYER, 9), [{"explained_variance": 0.5}])  # a seed that the experiment does not have
    assert materialise()[1] == second_run


# as a command

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def leaderboard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["saeens", "leaderboard", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_leaderboard_as_csv_or_json_prints_nothing_else(finished: Laboratory, leaderboard: Command):
    expected = _standings(finished)
    code, out, err = leaderboard("--format", "csv")
    assert (code, err) == (0, "")
    assert pl.read_csv(io.StringIO(out), schema=expected.schema).equals(expected)
    code, out, err = leaderboard("--format", "json", "--sort", "stability_equal_candidates")
    assert (code, err) == (0, "")
    code, out, err = leaderboard("--format", "json", "--sort", "stability")
    assert code == 0 and "stability grows with the number of features" in err and "--sort stability_equal_candidates does" in err
    assert [row["method"] for row in json.loads(out)] == _standings(finished, sort="stability")["method"].to_list()


def test_the_leaderboard_command_shows_the_points_of_two_seeds_and_materialises_the_table(finished: Laboratory, leaderboard: Command):
    code, out, err = leaderboard()
    assert (code, err) == (0, "")
    assert f"{NAME}, layer {LAYER}" in out
    row = _row(_standings(finished), method="boosting")
    (line,) = [line for line in out.splitlines() if " boosting " in line]
    points = ", ".join(f"{float(point):.4f}" for point in row["explained_variance_by_seed"].split(","))
    assert f" {points} " in line
    assert finished.store.hit(
        LEADERBOARD_ADDRESS, Partition(), finished.catalogue.leaderboard().outputs[0].recipe(finished.store, Partition())
    )


@pytest.mark.parametrize("metric", ["fvu", "stability"])
def test_the_leaderboard_command_shows_the_interval_of_its_sort_column(finished: Laboratory, leaderboard: Command, metric: str):
    code, out, _ = leaderboard("--sort", metric, "--n", "all")
    assert code == 0
    lines = [line for line in out.splitlines() if " boosting " in line]
    assert len(lines) == MEMBERS
    row = _row(_standings(finished), method="boosting")
    points = [f"{float(point):.4f}" for point in row[f"{metric}_by_seed"].split(",")]
    assert any(", ".join(points) in line for line in lines)


def test_the_leaderboard_command_marks_outdated_numbers(finished: Laboratory, leaderboard: Command):
    finished.declare(training=EXPERIMENT["training"] | {"learning_rate": 0.5})
    code, out, err = leaderboard("--format", "csv")
    assert code == 0
    assert len(out.splitlines()) == 6
    assert f"figures of {NAME} are outdated: see `saeens status {NAME}`" in " ".join(err.split())


def test_an_experiment_with_missing_files_does_not_hide_the_others(
    finished: Laboratory, leaderboard: Command, monkeypatch: pytest.MonkeyPatch
):
    def not_found(*_: object) -> NoReturn:
        raise ConfigurationError("mine: there is no file texts.csv")

    monkeypatch.setattr("saeens_pipeline.orchestration.runs.experiment_status", not_found)
    code, out, err = leaderboard("--format", "csv")
    assert code == 0
    assert len(out.splitlines()) == 6
    assert f"figures of {NAME} may be outdated, which cannot be checked: mine: there is no file texts.csv" in " ".join(err.split())


def test_the_leaderboard_command_reports_missing_evaluations_and_refuses_unknown_columns(
    empty: Laboratory, leaderboard: Command, tmp_path: Path
):
    code, _, err = leaderboard()
    assert code == 0
    assert "nothing is evaluated yet" in err
    code, out, err = leaderboard("--sort", "colour")
    assert (code, out) == (2, "")
    assert "colour" in err
