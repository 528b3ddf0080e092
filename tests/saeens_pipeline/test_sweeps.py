"""Sweeps: one experiment per value, with the recipes of the written-out experiment; and their comparison."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from privileges import read_only
from tiny_experiment import EXPERIMENT, LAYER, NAME, SEEDS, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_pipeline import cli
from saeens_pipeline.assets.baselines.registry import methods as registered_methods
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.experiments import experiment_ops
from saeens_pipeline.assets.registry import columns_of, table_frame
from saeens_pipeline.assets.tables.pareto import PARETO, PICTURE_FILE, TABLE_FILE, notes, pareto_rows
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.orchestration.garbage import declared, find_garbage
from saeens_pipeline.orchestration.metadata import describe_artefact
from saeens_pipeline.report import methods
from saeens_pipeline.report.pictures import sweep_picture
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Recipe

SWEEP = "swept"
SAE = {"architecture": "topk", "expansion": 2}


def _experiments(**changes: Any) -> list[ExperimentSettings]:
    return ExperimentSettings.model_validate(experiment_settings(name=SWEEP, **changes)).experiments


# one experiment per value


@pytest.mark.parametrize(
    ("sae", "sweep", "names", "values"),
    [
        (SAE, {"k": [4, 8, 16]}, ["k_4", "k_8", "k_16"], [4, 8, 16]),
        (SAE | {"k": 3}, {"k": [8]}, ["k_8"], [8]),
        (SAE | {"k": 3}, {"expansion": [2, 4]}, ["expansion_2", "expansion_4"], [2, 4]),
        ({"architecture": "topk", "k": 3}, {"d_sae": [32, 64]}, ["d_sae_32", "d_sae_64"], [32, 64]),
        ({"architecture": "standard", "expansion": 2}, {"l1_coefficient": [0.75, 2]}, ["l1_0p75", "l1_2"], [0.75, 2]),
        (
            {"architecture": "jumprelu", "expansion": 2},
            {"l0_coefficient": [1.0e-5, 0.5, 1.0]},
            ["l0_1em05", "l0_0p5", "l0_1"],
            [1e-5, 0.5, 1],
        ),
        (SAE | {"k": 3}, {"aux_loss_coefficient": [0.25]}, ["aux_loss_0p25"], [0.25]),
    ],
)
def test_a_sweep_has_one_experiment_per_value(sae: dict[str, Any], sweep: dict[str, Any], names: list[str], values: list[float]):
    made = _experiments(sae=sae, sweep=sweep, baselines=["expanded"])
    (field,) = sweep
    assert [each.name for each in made] == [f"{SWEEP}__{name}" for name in names]
    assert [each.sae.model_dump(exclude_unset=True) for each in made] == [sae | {field: value} for value in values]
    assert [each.sweep for each in made] == [None] * len(values)


def test_experiments_of_a_sweep_equal_those_written_out():
    (first, second) = _experiments(sae=SAE, sweep={"k": [4, 8]}, expanded_sizes="all", evaluations=["cost"])
    for made, k in ((first, 4), (second, 8)):
        changes = {"sae": SAE | {"k": k}, "expanded_sizes": "all", "evaluations": ["cost"]}
        written = ExperimentSettings.model_validate(experiment_settings(name=f"{SWEEP}__k_{k}", **changes))
        assert made == written
        assert made.model_fields_set == written.model_fields_set
        ops, expected = ([output for op in experiment_ops(each) for output in op.outputs] for each in (made, written))
        assert [(each.address, each.code_version) for each in ops] == [(each.address, each.code_version) for each in expected]


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """Nothing is declared."""
    laboratory = Laboratory(tmp_path / "model", tmp_path / "defs", tmp_path / "data")
    laboratory.activate(monkeypatch)
    return laboratory


def _text(*others: dict[str, Any], **experiment: Any) -> str:
    settings = [experiment_settings(name=SWEEP, source=SWEEP, **experiment), *others]
    documents = [("EnsembleExperiment", each) for each in settings]
    return experiment_file(("ActivationSource", source_settings("some/model", name=SWEEP)), *documents)


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    # settings, the beginning of the line, the field, and what is said
    ({"sweep": {"kk": [1]}}, "kk:", "sweep.kk", "unknown field of sae; one of: expansion, d_sae, "),
    ({"sweep": {"init_seed": [1]}}, "init_seed:", "sweep.init_seed", "unknown field of sae"),
    ({"sweep": {"architecture": ["topk"]}}, "sweep:", "sweep", "architecture: 'topk' is not a number"),
    ({"sweep": {"k": [4, 8, 4]}}, "sweep:", "sweep", "k: 4 is given twice"),
    ({"sweep": {"k": [4, 4.0]}}, "sweep:", "sweep", "k: 4.0 is given twice"),
    ({"sweep": {"k": []}}, "sweep:", "sweep", "k needs a list of values, such as {k: [4, 8, 16, 32]}"),
    ({"sweep": {"k": 4}}, "sweep:", "sweep", "k needs a list of values"),
    ({"sweep": {"k": [4], "expansion": [2]}}, "sweep:", "sweep", "name exactly one field of sae, with its values"),
    ({"sweep": {}}, "sweep:", "sweep", "name exactly one field of sae"),
    ({"sweep": [4]}, "sweep:", "sweep", "name exactly one field of sae"),
    ({"sweep": {"k": ["1e-5"]}}, "sweep:", "sweep", "k: '1e-5' is not a number: YAML reads 1e-5 as text, and 1.0e-5 as a number"),
    ({"sweep": {"k": [True]}}, "sweep:", "sweep", "k: True is not a number"),
    ({"sweep": {"k": [4, 0]}}, "- 0", "sweep.k.1", "has to be greater than 0 (found: 0)"),
    ({"sweep": {"expansion": [2, 0.5]}}, "- 0.5", "sweep.expansion.1", "expansion is a positive whole number, not 0.5"),
    ({"sweep": {"d_sae": [64]}}, "- 64", "sweep.d_sae.0", "give either expansion (d_sae = expansion * d_in) or d_sae"),
    ({"sae": {"architecture": "topk"}, "sweep": {"k": [4]}}, "sae:", "sae", "give either expansion"),
    ({"sae": SAE | {"kk": 4}, "sweep": {"k": [4]}}, "kk:", "sae.kk", "unknown key; one of: architecture, expansion, d_sae, "),
    ({"sae": {"architecture": "top", "expansion": 2}, "sweep": {"k": [4]}}, "architecture:", "sae.architecture", "'top' is unknown"),
]


@pytest.mark.parametrize(("changes", "line", "field", "said"), WRONG)
def test_errors_of_a_sweep_are_reported_with_line_and_field(
    laboratory: Laboratory, changes: dict[str, Any], line: str, field: str, said: str
):
    text = _text(**changes)
    file = laboratory.write(text)
    catalogue = laboratory.catalogue
    assert catalogue.experiments == catalogue.sweeps == {}
    (message,) = catalogue.broken.values()
    number = max(i for i, each in enumerate(text.splitlines(), start=1) if each.strip().startswith(line))
    assert message.startswith(f"{file}:{number}: attributes.{field}: {said}")


def test_an_experiment_name_of_a_sweep_that_exists_is_refused(laboratory: Laboratory):
    other = experiment_settings(name=f"{SWEEP}__k_8", source=SWEEP)
    file = laboratory.write(_text(sweep={"k": [4, 8]}), "second")
    laboratory.write(experiment_file(("EnsembleExperiment", other)), "first")
    (message,) = laboratory.catalogue.broken.values()
    line = file.read_text().splitlines().index("  sweep:") + 1
    assert message == f"{file}:{line}: attributes.sweep: there already is an experiment called '{SWEEP}__k_8'"
    assert sorted(laboratory.catalogue.experiments) == [f"{SWEEP}__k_8"]


def test_a_sweep_and_an_experiment_do_not_share_a_name(laboratory: Laboratory):
    laboratory.write(_text(experiment_settings(name=SWEEP, source=SWEEP), sweep={"k": [4]}))
    (message,) = laboratory.catalogue.broken.values()
    assert f"there already is an experiment called '{SWEEP}'" in message


def test_a_sweep_without_its_source_is_left_out(laboratory: Laboratory):
    laboratory.write(experiment_file(("EnsembleExperiment", experiment_settings(name=SWEEP, source="nowhere", sweep={"k": [4, 8]}))))
    catalogue = laboratory.catalogue
    assert catalogue.experiments == catalogue.sweeps == {}
    (message,) = catalogue.broken.values()
    assert "attributes.source: there is no source 'nowhere'" in message


def test_the_sweep_itself_is_no_experiment(laboratory: Laboratory):
    laboratory.write(_text(sweep={"k": [4, 8]}))
    catalogue = laboratory.catalogue
    with pytest.raises(ConfigurationError, match=f"'{SWEEP}' is a sweep: name one of its experiments, {SWEEP}__k_4, {SWEEP}__k_8"):
        catalogue.experiment(SWEEP)
    assert [each.name for each in catalogue.named(SWEEP)] == [f"{SWEEP}__k_4", f"{SWEEP}__k_8"]
    assert catalogue.named(f"{SWEEP}__k_4") == [catalogue.experiment(f"{SWEEP}__k_4")]
    with pytest.raises(ConfigurationError, match=f"there is no sweep 'x'; sweeps are: {SWEEP}"):
        catalogue.sweep("x")


def test_the_plan_of_a_sweep_has_every_experiment(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    laboratory.write(_text(sweep={"k": [4, 8]}))
    planned: dict[str, list[dict[str, Any]]] = {}
    monkeypatch.setattr("sys.argv", ["saeens", "plan", SWEEP, "--format", "json"])
    with pytest.raises(SystemExit):
        cli.main()
    for row in json.loads(capsys.readouterr().out):
        planned.setdefault(row.pop("experiment"), []).append(row)
    assert list(planned) == [f"{SWEEP}__k_4", f"{SWEEP}__k_8"]
    assert all({"model", "disk", "computation"} <= {row["section"] for row in rows} for rows in planned.values())


@pytest.mark.filterwarnings("ignore")  # what is beta or deprecated inside Dagster
def test_dagsters_component_loader_builds_the_assets_of_a_sweep(laboratory: Laboratory):
    import importlib

    from saeens_pipeline import defs

    laboratory.write(_text(sweep={"k": [4, 8]}), SWEEP)
    tree = dg.ComponentTree.from_module(importlib.import_module(f"{defs.__name__}.{SWEEP}"), laboratory.folder)
    made = {key for assets in tree.build_defs().assets or [] if isinstance(assets, dg.AssetsDefinition) for key in assets.keys}
    of_all = {dg.AssetKey("leaderboard"), dg.AssetKey(["leaderboard", "report"])}
    assert made == set(laboratory.catalogue.definitions().resolve_all_asset_keys()) - of_all
    assert dg.AssetKey([SWEEP, "pareto"]) in made


# the comparison


POINTS = {  # by k and method: L0, bits and explained variance of the two seeds
    (4, "single"): [(4.0, 40.0, 0.50), (4.0, 42.0, 0.54)],
    (4, "boosting"): [(8.0, None, 0.70), (8.5, None, 0.80)],
    (8, "single"): [(8.0, 80.0, 0.60), (9.0, 90.0, 0.70)],
    (8, "boosting"): [(16.0, 100.0, 0.90), (16.0, 110.0, 0.94)],
}


def _declare(laboratory: Laboratory, values: Sequence[int] = (4, 8, 16)) -> None:
    settings = experiment_settings(name=SWEEP, source=NAME, sae=SAE, sweep={"k": list(values)})
    laboratory.write(experiment_file(("EnsembleExperiment", settings)), SWEEP)


def _write(laboratory: Laboratory, k: int, table: str, seed: int, rows: Sequence[dict[str, Any]]) -> None:
    name = f"{SWEEP}__k_{k}"
    contents = table_frame(table, [{"experiment": name, "layer": LAYER, "seed": seed, "language_model": "trained", **row} for row in rows])
    laboratory.store.write_table(Address(name, "eval", table), Partition(LAYER, seed), Recipe("test", 1, {"seed": seed}), {}, contents)


def _write_points(laboratory: Laboratory) -> None:
    """Tables as evaluation would have written them; the prefix of one member does not count, nor do SAEs without variance to explain."""
    for k in (4, 8):
        for i, seed in enumerate(SEEDS):
            rows = []
            for method, n in (("single", 1), ("boosting", 2)):
                l0, bits, gain = POINTS[k, method][i]
                rows.append({"method": method, "n_members": n, "n_features": 10 * n, "l0": l0, "description_length_bits": bits})
                rows[-1] |= {
                    "explained_variance": gain,
                    "ce_loss_recovered": None if k == 8 else 1 - gain,
                    "sae_data_versions": f"{method}-{k}-{seed}",
                }
            _write(laboratory, k, "reconstruction", seed, [*rows, rows[-1] | {"n_members": 1, "explained_variance": 2.0}])
            if k == 8:
                _write(
                    laboratory,
                    k,
                    "cost",
                    seed,
                    [{"method": "single", "n_members": 1, "train_flops": 90.0 * (i + 1), "residual_flops": 10.0 * (i + 1)}],
                )


def _rows(laboratory: Laboratory) -> tuple[pl.DataFrame, Declaration]:
    (declaration,) = laboratory.catalogue.pareto(SWEEP).outputs
    return pareto_rows(laboratory.store, declaration), declaration


def test_rows_of_a_sweep_are_means_and_points_of_the_existing_tables(empty: Laboratory):
    _declare(empty)
    _write_points(empty)
    table, pareto = _rows(empty)
    assert table.columns == [column.name for column in columns_of(PARETO)]
    assert table.select("method", "value", "n_members").rows() == [
        ("single", 4.0, 1),
        ("single", 8.0, 1),
        ("boosting", 4.0, 2),
        ("boosting", 8.0, 2),
    ]
    for row in table.iter_rows(named=True):
        points = np.array(POINTS[int(row["value"]), row["method"]], dtype=float)
        assert row["l0"] == pytest.approx(points[:, 0].mean())
        assert row["explained_variance"] == pytest.approx(points[:, 2].mean())
        assert row["description_length_bits"] == (None if np.isnan(points[0, 1]) else pytest.approx(points[:, 1].mean()))
        assert [float(each) for each in row["explained_variance_by_seed"].split(",")] == points[:, 2].tolist()
        assert row["experiment"] == f"{SWEEP}__k_{row['value']:.0f}"
        assert (row["sweep"], row["field"], row["n_seeds"], row["seeds"]) == (SWEEP, "k", 2, "1,2")
        assert row["sae_data_versions"] == f"{row['method']}-{row['value']:.0f}-1;{row['method']}-{row['value']:.0f}-2"
    assert table["total_flops"].to_list() == [None, 150.0, None, None]
    # by L0: 4.0 -> 0.52, 8.5 -> 0.65, 8.25 -> 0.75, 16 -> 0.92; by bits: 41 -> 0.52, 85 -> 0.65, 105 -> 0.92
    assert table["on_l0_front"].to_list() == [1, 0, 1, 1]
    assert table["on_bits_front"].to_list() == [1, 1, None, 1]
    # recovered loss of k = 4 alone: 4.0 -> 0.48, 8.25 -> 0.25
    assert table["ce_loss_recovered"].to_list() == [pytest.approx(0.48), None, pytest.approx(0.25), None]
    assert table["on_l0_front_by_ce"].to_list() == [1, None, 0, None]
    assert table["on_bits_front_by_ce"].to_list() == [1, None, None, None]
    assert list(notes(table, pareto)) == [
        f"{SWEEP}__k_16 is not evaluated yet: run `saeens run {SWEEP}__k_16`",
        f"{SWEEP}__k_4: no description length was measured; left out of that picture",
    ]


def test_a_sweep_without_results_has_an_empty_table_and_a_picture(empty: Laboratory):
    _declare(empty)
    table, pareto = _rows(empty)
    assert table.is_empty()
    assert len(list(notes(table, pareto))) == 3
    assert _size(sweep_picture(table, pareto)) == _size(sweep_picture(table, pareto))


def _size(png: bytes) -> tuple[int, int]:
    """Width and height, from a PNG's header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_every_method_has_its_own_colour_and_marker_and_every_layer_its_axes(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    styles = [methods.method(name) for name in registered_methods()]
    assert len({each.colour for each in styles}) == len({each.marker for each in styles}) == len(registered_methods())
    _declare(empty)
    _write_points(empty)
    table, pareto = _rows(empty)
    monkeypatch.undo()  # pictures are no longer blank
    two_layers = pl.concat([table, table.with_columns(layer=pl.lit(7, pl.Int64))])
    width, height = _size(sweep_picture(table, pareto))
    assert _size(sweep_picture(two_layers, pareto)) == (width, 2 * height)
    without_loss = table.with_columns(ce_loss_recovered=pl.lit(None, pl.Float64))
    assert _size(sweep_picture(without_loss, pareto)) == (width, height // 2), "loss has a row of its own"
    assert sweep_picture(table, pareto) == sweep_picture(table, pareto)
    assert sweep_picture(table, pareto) != sweep_picture(table.filter(method="single"), pareto)


@pytest.fixture
def swept(finished: Laboratory) -> Laboratory:
    """A sweep on the finished source, one of whose two values is that of the experiment that was run."""
    settings = experiment_settings(name=SWEEP, baselines=["expanded"], sae=SAE, sweep={"k": [EXPERIMENT["sae"]["k"], 2]})
    finished.write(experiment_file(("EnsembleExperiment", settings)), SWEEP)
    return finished


Command = Callable[..., tuple[str, str]]


@pytest.fixture
def saeens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["saeens", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None)
        printed = capsys.readouterr()
        return printed.out, " ".join(printed.err.split())

    return call


def test_a_sweep_runs_all_experiments_and_shares_existing_artefacts(swept: Laboratory, saeens: Command, tmp_path: Path):
    out, _ = saeens("run", SWEEP)
    assert out.count("artefacts to compute") == 2
    same = swept.store.require(Address(f"{SWEEP}__k_4", "boosting", "round_3"), Partition(LAYER, SEEDS[0]))
    assert same.provenance["same_as"] == f"{NAME}/boosting/round_3"
    made = swept.store.require(Address(f"{SWEEP}__k_2", "bagging", "member_1"), Partition(LAYER, SEEDS[0]))
    assert json.loads((made.path / "cfg.json").read_text())["k"] == 2

    csv, noted = saeens("pareto", SWEEP, "--format", "csv", "--picture", tmp_path / "pareto.png")
    table = pl.read_csv(io.StringIO(csv))
    assert table["method"].unique(maintain_order=True).to_list() == ["single", "bagging", "boosting", "expanded"]
    assert table.filter(method="single")["value"].to_list() == [2.0, 4.0]
    assert table.filter(method="single")["l0"].to_list() == pytest.approx([2.0, 4.0], rel=0.1)
    assert "was not evaluated" not in noted
    _size((tmp_path / "pareto.png").read_bytes())
    shown, _ = saeens("pareto", SWEEP)
    assert f"{SWEEP}, layer {LAYER}" in shown

    shutil.rmtree(swept.root / "reports" / SWEEP)
    with read_only(swept.root):
        again, noted = saeens("pareto", SWEEP, "--format", "csv", "--picture", tmp_path / "again.png")
    assert again == csv
    assert "the table is printed and not stored" in noted
    assert _size((tmp_path / "again.png").read_bytes()) == _size((tmp_path / "pareto.png").read_bytes())
    assert not (swept.root / "reports" / SWEEP).exists()
    saeens("pareto", SWEEP)

    job = swept.catalogue.definitions().resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey([SWEEP, "pareto"])])
    (event,) = result.get_asset_materialization_events()
    metadata = event.step_materialization_data.materialization.metadata
    assert str(metadata["picture"].value).startswith("![explained variance and recovered loss by L0 and by bits](data:image/png;base64,")
    assert metadata["dagster/row_count"].value == len(table)
    artefact = swept.store.require(Address(SWEEP, "report", "pareto"), Partition())
    assert pl.read_parquet(artefact.path / TABLE_FILE)["explained_variance"].to_list() == table["explained_variance"].to_list()
    assert _size((artefact.path / PICTURE_FILE).read_bytes()) == _size((tmp_path / "pareto.png").read_bytes())
    assert find_garbage(swept.root, declared(Catalogue.load())).garbage == []
    out, _ = saeens("status", SWEEP, "--format", "json")
    listed = [(row["asset"], row["layer"], row["seed"]) for row in json.loads(out)]
    assert len(listed) == len(set(listed)), "artefacts of the source are listed once"
    assert {asset.split("/")[0] for asset, *_ in listed} == {NAME, f"{SWEEP}__k_4", f"{SWEEP}__k_2"}
    assert {row["state"] for row in json.loads(out)} == {"fresh"}
    out, _ = saeens("lineage", f"{SWEEP}/pareto")
    assert f"{SWEEP}__k_2/eval/reconstruction" in out


def test_the_picture_of_a_sweep_names_missing_evaluations(swept: Laboratory):
    (declaration,) = swept.catalogue.pareto(SWEEP).outputs
    job = swept.catalogue.definitions().resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey([SWEEP, "pareto"])])
    artefact = swept.store.require(Address(SWEEP, "report", "pareto"), Partition())
    described = describe_artefact(swept.store, declaration, Partition(), artefact, is_hit=True)
    assert described["not evaluated yet"] == f"{SWEEP}__k_4, {SWEEP}__k_2"
