"""Controls: experiments that differ in `weights: random` alone, and the display of both sets of numbers."""

from __future__ import annotations

import io
from typing import Any

import polars as pl
import pytest
from rich.console import Console
from tiny_experiment import (
    EXPERIMENT,
    LAYER,
    MEMBERS,
    NAME,
    SEEDS,
    Laboratory,
    experiment_file,
    experiment_settings,
    run_and_print,
    source_settings,
)

from saeens_pipeline.assets.tables.leaderboard import for_reading, standings
from saeens_pipeline.orchestration.metadata import describe_artefact
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

CONTROL = "untrained"
METHODS = ["single", "bagging", "boosting", "expanded", "expanded_l0_matched"]


def _declare_control(laboratory: Laboratory, source: dict[str, Any] | None = None, /, name: str = CONTROL, **experiment: Any) -> None:
    own_source = source_settings(laboratory.model, **({"name": name, "weights": "random"} | (source or {})))
    own_experiment = experiment_settings(**({"name": name, "source": name} | experiment))
    laboratory.write(experiment_file(("ActivationSource", own_source), ("EnsembleExperiment", own_experiment)), name)


def test_the_same_experiment_on_random_weights_is_the_control(empty: Laboratory):
    assert empty.catalogue.controls == {}
    _declare_control(empty)
    catalogue = empty.catalogue
    assert catalogue.controls == {NAME: CONTROL}
    assert (catalogue.counterpart(NAME), catalogue.counterpart(CONTROL)) == (CONTROL, NAME)


@pytest.mark.parametrize(
    ("source", "experiment"),
    [
        ({"layers": [0]}, {}),
        ({}, {"baselines": ["expanded"], "evaluations": ["reconstruction"], "keep_residuals": "none"}),
        ({}, {"automation": "on", "schedule": "0 0 * * *", "checks": {"max_dead_features": 0.5}}),
    ],
)
def test_a_control_can_have_other_layers_tables_and_baselines(empty: Laboratory, source: dict[str, Any], experiment: dict[str, Any]):
    _declare_control(empty, source, **experiment)
    assert empty.catalogue.controls == {NAME: CONTROL}


@pytest.mark.parametrize(
    ("source", "experiment"),
    [
        ({"weights": "trained"}, {}),
        ({"hook": "mlp_out"}, {}),
        ({"train_tokens": 500}, {}),
        ({}, {"sae": EXPERIMENT["sae"] | {"k": 3}}),
        ({}, {"training": EXPERIMENT["training"] | {"batch_tokens": 32}}),
        ({}, {"ensemble": {"members": 2, "seeds": list(SEEDS)}}),
        ({}, {"ensemble": {"members": MEMBERS, "seeds": [1]}}),
    ],
)
def test_an_experiment_that_differs_otherwise_is_no_control(empty: Laboratory, source: dict[str, Any], experiment: dict[str, Any]):
    _declare_control(empty, source, **experiment)
    assert empty.catalogue.controls == {}
    assert empty.catalogue.counterpart(CONTROL) is None


def test_the_shipped_quickstart_has_its_control():
    from saeens_pipeline.orchestration.catalogue import Catalogue

    controls = Catalogue.load().controls
    assert (controls["quickstart"], controls["smollm2"]) == ("quickstart_random", "smollm2_random")
    assert "quickstart_full" not in controls  # of eight members, where the control has four


def test_a_run_of_the_control_adds_it_to_the_report(empty: Laboratory):
    page = empty.root / "reports" / NAME / f"layer={LAYER}" / "index.html"
    few = {"evaluations": ["reconstruction"], "baselines": []}
    empty.declare(**few)
    _declare_control(empty, **few)
    assert "Reports that show this control" not in _run(NAME)
    assert 'id="control-table"' not in page.read_text()
    assert str(page) in _run(CONTROL).partition("Reports that show this control, written again:")[2]
    assert 'id="control-table"' in page.read_text()
    assert "Reports that show this control" not in _run(CONTROL)


def _run(name: str) -> str:
    printed = io.StringIO()
    run_and_print(name, console=Console(file=printed, width=300))
    return printed.getvalue()


def _mean(laboratory: Laboratory, experiment: str, table: str, method: str) -> float:
    rows = read_table(laboratory.root, experiment, table).filter(method=method)
    column = "explained_variance" if table == "reconstruction" else "stability"
    return rows.filter(pl.col("n_members") == rows["n_members"].max())[column].to_numpy().mean()


def test_numbers_of_the_control_are_shown_with_those_of_the_experiment(finished: Laboratory):
    _declare_control(finished)
    assert "random" not in _run(NAME).split("nothing to do")[1]
    board = finished.catalogue.leaderboard()
    (leaderboard,) = board.outputs
    before = standings(finished.store, leaderboard)
    assert set(before["control"]) == {CONTROL}
    assert before["control_explained_variance"].null_count() == len(before)
    assert "EV untrained" not in for_reading(before).columns

    of_control, of_trained = _run(CONTROL), _run(NAME)
    assert f"random: {CONTROL}, the same experiment with random weights" in of_trained
    assert f"trained: {NAME}, the same experiment with trained weights" in of_control
    for printed, other, word in ((of_trained, CONTROL, "random"), (of_control, NAME, "trained")):
        (header,) = (line for line in printed.splitlines() if line.startswith("method "))
        assert header.rstrip().endswith(f"EV, {word}  stability, {word}")
        for method in METHODS:
            (line,) = (line for line in printed.splitlines() if line.startswith(f"{method} "))
            shown = [float(value) for value in line.split()[-2:]]
            assert shown == pytest.approx([_mean(finished, other, table, method) for table in ("reconstruction", "stability")], abs=5.1e-5)

    table = standings(finished.store, leaderboard)
    assert set(table.filter(experiment=CONTROL)["control"]) == {None}
    for row in table.filter(experiment=NAME).iter_rows(named=True):
        assert row["control"] == CONTROL
        assert row["control_explained_variance"] == pytest.approx(_mean(finished, CONTROL, "reconstruction", row["method"]), rel=1e-12)
        assert row["control_stability"] == pytest.approx(_mean(finished, CONTROL, "stability", row["method"]), rel=1e-12)
    shown = for_reading(table.filter(experiment=NAME))
    assert shown["EV untrained"].to_list() == table.filter(experiment=NAME)["control_explained_variance"].to_list()


def test_the_leaderboard_in_the_ui_has_the_explained_variance_of_the_control(finished: Laboratory):
    from saeens_pipeline.assets.registry import table_frame
    from saeens_pipeline.storage.names import LEADERBOARD_ADDRESS
    from saeens_pipeline.storage.recipes import Recipe

    row = {"rank": 1, "experiment": NAME, "source": NAME, "layer": LAYER, "method": "boosting", "explained_variance": 0.9}
    table = table_frame("leaderboard", [row | {"control": CONTROL, "control_explained_variance": 0.8125}])
    provenance = {"device": "cpu", "versions": {}}
    finished.store.write_table(LEADERBOARD_ADDRESS, Partition(), Recipe("test", 1, {}), provenance, table)
    (declaration,) = finished.catalogue.leaderboard().outputs
    artefact = finished.store.require(LEADERBOARD_ADDRESS, Partition())
    best = describe_artefact(finished.store, declaration, Partition(), artefact, is_hit=False)["best"].md_str
    assert "| EV | EV of the control, untrained |" in best
    assert f"| {NAME} | boosting | 0.9000 | 0.8125 |" in best
