"""The registry of tables: a registered table appears everywhere without further code."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory, experiment_settings

from saeens_pipeline import cli
from saeens_pipeline.assets.registry import TABLES, Headline, Making, Row, Table, complaint_about, listed, register
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.tables import Column, read_table

TOY = "letters"
REFERENCE = Path(__file__).parents[2] / "docs" / "scripts" / "reference.py"


def _rows(making: Making) -> Iterator[Row]:
    for method, n, _, saes in making.methods():
        yield making.row(method, n, saes) | {"letters": len(method)}


@pytest.fixture
def toy() -> Iterator[Table]:
    """A table of the number of letters in a method's name."""
    table = register(
        Table(
            name=TOY,
            question="How long the names of the methods are",
            columns=(Column("letters", "int", "letters of the method's name"),),
            rows=_rows,
            headlines=(Headline("letters", "letters", ".0f"),),
            seed_metrics=("letters",),
        )
    )
    yield table
    del TABLES[TOY]


def _printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["saeens", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().out


def test_a_registered_table_has_an_asset_a_file_and_an_entry_in_every_list(
    toy: Table, finished: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    finished.declare(evaluations=["reconstruction", TOY])
    (spec,) = [s for s in finished.catalogue.definitions().resolve_all_asset_specs() if s.key == dg.AssetKey([NAME, "eval", TOY])]
    schema = spec.metadata["dagster/column_schema"]
    assert isinstance(schema, dg.TableSchema)
    assert schema.columns[-1].description == "letters of the method's name"
    assert spec.description and spec.description.startswith(toy.question)

    summary = finished.run()
    assert "letters" in summary
    rows = read_table(finished.root, NAME, TOY)
    assert dict(rows.select("method", "letters").iter_rows()) == {method: len(method) for method in rows["method"]}

    assert "letters" in _printed(capsys, monkeypatch, "table", NAME, TOY)
    assert TOY in _printed(capsys, monkeypatch, "table", "--help")
    assert toy.question in _printed(capsys, monkeypatch, "tables")
    assert "letters_by_seed" in _printed(capsys, monkeypatch, "leaderboard", "--format", "csv")

    (page,) = [page for page in runpy.run_path(str(REFERENCE))["write_reference"](tmp_path) if page.name == "tables.md"]
    assert f"## `{TOY}`" in page.read_text()
    assert toy.question in (finished.root / "reports" / NAME / f"layer={LAYER}" / "index.html").read_text()
    assert {row["seed"] for row in rows.iter_rows(named=True)} == set(SEEDS)


def test_a_table_name_can_be_registered_once(toy: Table):
    with pytest.raises(ValueError, match="registered twice"):
        register(toy)


def test_an_unknown_table_is_refused_with_file_line_and_field(empty: Laboratory):
    file = empty.declare(evaluations=["reconstruction", "reconstructions"])
    (complaint,) = empty.catalogue.broken.values()
    assert complaint.startswith(f"{file}:")
    assert "attributes.evaluations.1: there is no table 'reconstructions'; one of: reconstruction, differences, members" in complaint
    with pytest.raises(ConfigurationError, match="no table 'reconstructions'"):
        empty.run()


def test_tables_that_compare_experiments_are_no_evaluations():
    settings = ExperimentSettings.model_validate(experiment_settings(evaluations=["leaderboard"]))
    assert complaint_about(settings) == (
        0,
        f"there is no table 'leaderboard'; one of: {', '.join(t.name for t in listed(over_experiments=False))}",
    )
