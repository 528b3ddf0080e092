"""`--format json` and `csv` of commands that print tables and facts, and `--sort`."""

from __future__ import annotations

import csv
import io
import json

import polars as pl
import pytest
from command_line import Saeens
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory

from saeens_pipeline.storage.tables import read_table


def test_experiments_for_programs(empty: Laboratory, saeens: Saeens):
    (row,) = json.loads(saeens("experiments", "--format", "json").out)
    assert row["SAE"].startswith("topk, expansion 2, k 4")
    del row["SAE"]
    expected = {"experiment": NAME, "source": NAME, "language_model": str(empty.model), "layers": [LAYER], "members": MEMBERS}
    assert row == expected | {"seeds": list(SEEDS)}
    (in_csv,) = csv.DictReader(io.StringIO(saeens("experiments", "--format", "csv").out))
    assert (in_csv["layers"], in_csv["seeds"], in_csv["members"]) == (str(LAYER), "1, 2", str(MEMBERS))


def test_tables_for_programs(empty: Laboratory, saeens: Saeens):
    rows = json.loads(saeens("tables", "--format", "json").out)
    cost = next(row for row in rows if row["table"] == "cost")
    assert (cost["default"], bool(cost["question"])) == (True, True)
    assert saeens("tables", "--format", "csv").out.startswith("table,default,question\n")


def test_lineage_for_programs(finished: Laboratory, saeens: Saeens):
    member = finished.artefact("bagging/member_1", SEEDS[0])
    found = json.loads(saeens("lineage", member.data_version, "--format", "json").out)
    assert (found["data_version"], found["parents"][0]["role"]) == (member.data_version, "activations")
    rows = list(csv.DictReader(io.StringIO(saeens("lineage", member.data_version, "--format", "csv").out)))
    assert [row["depth"] for row in rows[:3]] == ["0", "1", "2"]
    assert {row["data_version"] for row in rows} >= {
        finished.artefact(name, layer=layer).data_version for name, layer in (("tokens", None),)
    }


def test_garbage_for_programs(finished: Laboratory, saeens: Saeens):
    assert json.loads(saeens("gc", "--format", "json").out) == []
    stray = finished.root / "experiments" / "gone" / "layer=1" / "seed=1" / "bagging"
    stray.mkdir(parents=True)
    member = finished.artefact("bagging/member_1", SEEDS[0]).path
    member.rename(stray / "member_1")
    outcome = saeens("gc", "--format", "json")
    (row,) = json.loads(outcome.out)
    assert row["path"].startswith("experiments/gone")
    assert (row["state"], row["bytes"] > 0) == ("unused", True)
    assert "would be freed by `saeens gc --delete`" in outcome.err


def test_findings_of_the_doctor_for_programs(finished: Laboratory, saeens: Saeens):
    rows = json.loads(saeens("doctor", "--format", "json").out)
    assert {"subject": "data root", "detail": str(finished.root), "ok": True} in rows
    finished.write("type: nothing\n", "broken")
    outcome = saeens("doctor", "--format", "json")
    assert outcome.code == 1
    assert [row["subject"] for row in json.loads(outcome.out) if not row["ok"]] == ["broken"]


def test_the_outcome_of_a_run_for_programs(finished: Laboratory, saeens: Saeens):
    outcome = saeens("run", NAME, "--format", "json")
    (document,) = json.loads(outcome.out)
    assert outcome.code == 0
    assert "nothing to do" in outcome.err
    assert document["experiment"] == NAME
    assert {each["state"] for each in document["artefacts"]} == {"fresh"}
    (report,) = document["reports"]
    assert report == str(finished.root / "reports" / NAME / f"layer={LAYER}" / "index.html")
    table = read_table(finished.root, NAME, "reconstruction").filter(method="boosting", n_members=MEMBERS)
    (row,) = [each for each in document["metrics"] if (each["method"], each["n_members"]) == ("boosting", MEMBERS)]
    assert row["explained_variance"] == pytest.approx(table["explained_variance"].mean())
    rows = list(csv.DictReader(io.StringIO(saeens("run", NAME, "--format", "csv").out)))
    assert [row["state"] for row in rows] == ["fresh"] * len(document["artefacts"])


@pytest.mark.parametrize("heading", ["EV", "ev", "EV (!)", "explained_variance", "Explained variance"])
def test_a_table_is_sorted_by_name_or_heading(finished: Laboratory, saeens: Saeens, heading: str):
    rows = pl.read_csv(io.StringIO(saeens("table", NAME, "reconstruction", "--sort", heading, "--format", "csv").out))
    values = rows["explained_variance"].to_list()
    assert values == sorted(values, reverse=True)
    assert len(rows) == len(read_table(finished.root, NAME, "reconstruction"))


@pytest.mark.parametrize(("column", "descending"), [("mse", False), ("seed", False), ("method", False), ("l0", False)])
def test_the_better_end_of_a_table_comes_first(finished: Laboratory, saeens: Saeens, column: str, descending: bool):
    rows = pl.read_csv(io.StringIO(saeens("table", NAME, "reconstruction", "--sort", column, "--format", "csv").out))
    assert rows[column].to_list() == sorted(rows[column].to_list(), reverse=descending)


def test_the_leaderboard_is_sorted_by_its_heading(finished: Laboratory, saeens: Saeens):
    by_name, by_heading = (saeens("leaderboard", "--sort", name, "--format", "csv").out for name in ("l0", "L0"))
    assert by_name == by_heading
    assert pl.read_csv(io.StringIO(by_name))["l0"].is_sorted()


@pytest.mark.parametrize("command", [["table", NAME, "reconstruction"], ["leaderboard"]])
def test_an_unknown_column_is_answered_with_the_columns(finished: Laboratory, saeens: Saeens, command: list[str]):
    outcome = saeens(*command, "--sort", "colour")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--sort colour: " in outcome.message
    assert "explained_variance (EV)" in outcome.message
