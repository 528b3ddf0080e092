"""The report: its numbers equal the tables', foreign text is escaped, missing tables are named, and no external resource is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import scipy.stats
from tiny_experiment import (
    LAYER,
    MEMBERS,
    NAME,
    SEEDS,
    Laboratory,
    experiment_file,
    experiment_settings,
    remake_reports,
    source_settings,
    write_rows,
)

from saeens_models import SAESettings
from saeens_pipeline import cli
from saeens_pipeline.assets.over_seeds import Spread, written
from saeens_pipeline.assets.registry import TABLES, table_frame
from saeens_pipeline.assets.tables.cost import TOTALS
from saeens_pipeline.assets.tables.leaderboard import for_reading, standings
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.orchestration.runs import make_reports
from saeens_pipeline.report.charts import Chart, as_plotly
from saeens_pipeline.report.figures import by_members, downstream, features, layer_profile, marginal_gain, trade_offs, training
from saeens_pipeline.report.main_table import main_table
from saeens_pipeline.report.methods import in_order, method
from saeens_pipeline.report.metrics import METRICS
from saeens_pipeline.report.pages import write_leaderboard
from saeens_pipeline.report.published import SETTINGS, setting_of
from saeens_pipeline.report.record import Record
from saeens_pipeline.report.results import Comparison, Results, Size, compare
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import digest, read_artefact
from saeens_pipeline.storage.tables import read_table

METHODS = ["single", "bagging", "boosting", "expanded", "expanded_l0_matched"]
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """A page: its text, elements, and cells by row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[dict[str, Any]] = []  # of the main table
        self._method: str | None = None
        self._in_script = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._in_script = tag == "script"
        if tag == "tbody":
            self._method = attributes.get("data-method")
        if tag == "td" and "data-metric" in attributes:
            self.cells.append(
                {"method": self._method, "metric": attributes["data-metric"], "value": float(attributes["data-value"] or "nan")}
            )

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in_script else data

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(re.search(r'<script type="application/json" id="figure-data">(.*?)</script>', self.source, re.DOTALL)[1])  # pyright: ignore[reportOptionalSubscript]


def _page(laboratory: Laboratory) -> Page:
    return Page(laboratory.root / "reports" / NAME / f"layer={LAYER}" / "index.html")


def _results(laboratory: Laboratory) -> Results:
    return Results.read(laboratory.root, NAME, LAYER, SEEDS)


def _table(laboratory: Laboratory, name: str) -> pl.DataFrame:
    parts = sorted((laboratory.root / "tables" / NAME / name).rglob("part.parquet"))
    return pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts])


def _synthetic(table: str, rows: list[dict[str, Any]]) -> Results:
    subject = {"experiment": "e", "layer": 0, "language_model": "trained", "sae_data_versions": "v"}
    return Results("e", 0, {table: table_frame(table, [subject | row for row in rows])})


def _of(figures: list[Chart], name: str) -> Any:
    return _drawn(next(each for each in figures if each.name == name))


def _drawn(figure: Chart) -> Any:
    """A figure as plotly reads it, which takes no key or value that it does not know."""
    return go.Figure(as_plotly(figure))


def test_a_run_writes_a_report_and_prints_its_path(finished: Laboratory):
    assert str(finished.root / "reports" / NAME / f"layer={LAYER}" / "index.html") in finished.run()


def test_numbers_of_the_main_table_equal_those_of_the_tables(finished: Laboratory):
    cells = _page(finished).cells
    assert {cell["method"] for cell in cells} == set(METHODS)
    shown = {metric.column: metric.table for metric in METRICS}
    for cell in cells:
        rows = _table(finished, shown[cell["metric"]]).filter(method=cell["method"])
        largest = rows.filter(pl.col("n_members") == rows["n_members"].to_numpy().max())
        parts = TOTALS.get(cell["metric"], (cell["metric"],))
        assert cell["value"] == pytest.approx(np.mean(sum(largest[part].to_numpy() for part in parts)), rel=1e-12), cell
        assert len(largest) == len(SEEDS)
    assert {cell["metric"] for cell in cells} >= {"explained_variance", "mse", "l0", "stability", "connectivity", "total_flops"}


def test_training_cost_includes_passes_over_residuals_everywhere(finished: Laboratory):
    cost = _table(finished, "cost").filter(method="boosting", n_members=MEMBERS)
    expected = np.mean(cost["train_flops"].to_numpy() + cost["residual_flops"].to_numpy())
    assert expected > np.mean(cost["train_flops"].to_numpy()) > 0
    (cell,) = (cell for cell in _page(finished).cells if (cell["method"], cell["metric"]) == ("boosting", "total_flops"))
    assert cell["value"] == pytest.approx(expected, rel=1e-12)
    plot = _of(list(trade_offs(_results(finished))), "explained_variance_for_total_flops")
    (line,) = (trace for trace in plot.data if trace.name == "boosting")
    assert line.x[-1] == pytest.approx(expected, rel=1e-12)
    make_reports(Catalogue.load(), None, [])
    board = (finished.root / "reports" / "leaderboard" / "index.html").read_text()
    shown = re.search(r'<tr[^>]* data-method="boosting".*?data-metric="total_flops" data-value="([^"]+)"', board, re.DOTALL)
    assert shown and float(shown[1]) == pytest.approx(expected, rel=1e-12)
    (declaration,) = finished.catalogue.leaderboard().outputs
    printed = for_reading(standings(finished.store, declaration)).filter(method="boosting")
    assert printed["FLOPs"].item() == pytest.approx(expected, rel=1e-12)
    assert printed["seconds"].item() == pytest.approx(np.mean((cost["train_seconds"] + cost["residual_seconds"]).to_numpy()), rel=1e-12)


def test_every_plot_is_valid_for_plotly(finished: Laboratory):
    figures = _page(finished).figures
    assert len(figures) > 10
    for name, figure in figures.items():
        read = json.loads(go.Figure(figure).to_json() or "")
        assert read["data"] == figure["data"], name
        assert figure["layout"].items() <= read["layout"].items(), name


def test_a_report_reads_layers_from_dagster_only_if_more_exist_than_in_the_file(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    def recorded(source: Any) -> Any:
        raise LookupError(source.name)

    monkeypatch.setattr("saeens_pipeline.orchestration.runs.recorded_layers", recorded)
    page, _ = make_reports(Catalogue.load(), NAME, [])
    assert page.parent.name == f"layer={LAYER}"
    with pytest.raises(LookupError):
        make_reports(Catalogue.load(), NAME, [LAYER + 1])
    added = finished.root / "tables" / NAME / "cost" / f"layer={LAYER + 1}"
    added.mkdir()
    try:
        with pytest.raises(LookupError):
            remake_reports(finished)
    finally:
        added.rmdir()


def test_linked_saes_are_counted_once(finished: Laboratory):
    def training() -> str:
        record = Record.read(finished.store, NAME, NAME, LAYER)
        return next(fact.value for _, facts in record.facts() for fact in facts if fact.name == "training in all")

    files = sorted((finished.root / "experiments" / NAME).rglob("recipe.json"))
    made = {read_artefact(file.parent).data_version: read_artefact(file.parent) for file in files}
    saes = [each for each in made.values() if each.recipe["builder"] == "sae"]
    residuals = [each for each in made.values() if each.recipe["builder"] == "residual"]
    assert any(read_artefact(file.parent).provenance.get("same_as") for file in files)  # round 1 is member 1
    n = (2 * MEMBERS - 1 + 2) * len(SEEDS)
    assert (len(saes), len(residuals)) == (n, (MEMBERS - 1) * len(SEEDS))
    flops = sum(each.provenance["train_flops"] for each in saes) + sum(each.provenance["flops"] for each in residuals)
    assert re.fullmatch(rf"{n} SAEs: .* s, {re.escape(written(flops, '.3g'))} FLOPs, with the passes that compute residuals", training())
    for file in files:  # as if another experiment had made all that the baselines are
        record = json.loads(file.read_text())
        if file.parent.parent.name == "baseline":
            del record["record_digest"]
            record["provenance"]["same_as"] = "other/baseline/expanded"
            file.write_text(json.dumps(record | {"record_digest": digest(record)}))
    assert re.match(
        rf"{n} SAEs, {2 * len(SEEDS)} of them linked from another experiment: .* {re.escape(written(flops, '.3g'))} FLOPs", training()
    )


def test_every_number_links_to_its_saes(finished: Laboratory):
    page = _page(finished)
    versions = [read_artefact(path.parent).data_version for path in (finished.root / "experiments" / NAME).rglob("member_*/recipe.json")]
    assert len(versions) == MEMBERS * len(SEEDS)
    assert all(f"<code>{version}</code>" in page.source for version in versions)
    folders = re.findall(r'<code class="folder"[^>]*>(.*?)</code>', page.source)
    assert len(folders) > 2 * len(versions) and all((finished.root / folder).exists() for folder in folders)
    assert f"{method('expanded_l0_matched').label}</a>" in page.source  # not the name of its folder


def test_a_copied_report_is_complete(finished: Laboratory, tmp_path: Path):
    copied = tmp_path / "elsewhere" / "copied"
    shutil.copytree(finished.root / "reports" / NAME / f"layer={LAYER}", copied)
    page = Page(copied / "index.html")
    links = [a for tag, a in page.elements if tag == "a" and "://" not in str(a["href"])]
    dead = [a for a in links if not (str(a["href"]).startswith("#") or (copied / str(a["href"]).partition("#")[0]).is_file())]
    assert {a.get("class") for a in dead} == {"apart"}  # the way to all experiments
    ids = {a["id"] for _, a in page.elements if a.get("id")}
    assert {str(a["href"])[1:] for a in links if str(a["href"]).startswith("#")} <= ids


def test_plotted_means_and_seeds_equal_those_of_the_tables(finished: Laboratory):
    figure = _of(list(by_members(_results(finished))), "explained_variance_by_members")
    line = next(trace for trace in figure.data if trace.name == "boosting")
    rows = _table(finished, "reconstruction").filter(method="boosting").sort("n_members", "seed")
    points = rows["explained_variance"].to_numpy().reshape(MEMBERS, len(SEEDS))
    assert list(line.x) == [1, 2, 3]
    level = next(trace for trace in figure.data if trace.name == method("expanded").label)
    assert (list(level.x), level.mode) == ([1, 2, 3], "lines")  # one SAE: to compare with at every size
    assert len(set(level.y)) == 1 and f"one SAE with as many features as {MEMBERS} members" in level.hovertemplate
    assert list(line.y) == pytest.approx(points.mean(1))
    assert list(line.error_y.array) == pytest.approx(points.max(1) - points.mean(1))  # two seeds: from one point to the other
    assert list(line.error_y.arrayminus) == pytest.approx(points.mean(1) - points.min(1))


def test_stability_is_drawn_with_its_reference_and_chance_levels(finished: Laboratory):
    figure = _of(list(by_members(_results(finished))), "stability_by_members")
    rows = _table(finished, "stability").filter(method="bagging").sort("n_members", "seed")
    lines = {trace.name: list(trace.y) for trace in figure.data}
    expected = {
        "one SAE, as many features": "stability_reference",
        "chance: random": "stability_chance_isotropic",
        "chance: random, same covariance": "stability_chance_covariance",
        "bagging, equal candidates": "stability_equal_candidates",
    }
    for label, column in expected.items():
        assert lines[label] == pytest.approx(rows[column].to_numpy().reshape(MEMBERS, len(SEEDS)).mean(1))
    named = {each.text.replace("<br>", " "): each.y for each in figure.layout.annotations}
    assert named["chance: random"] == lines["chance: random"][-1], "the legend does not list it"


def test_recovery_is_drawn_with_equal_rows_and_chance():
    size = {"n_rows": 8, "recovered_fraction_chance": 0.01}
    rows = [
        {"method": "bagging", "n_members": n, "seed": seed, "recovered_fraction": 0.2 * n, "recovered_fraction_equal_rows": 0.2 + 0.01 * n}
        | size for n in (1, 2) for seed in (1, 2)
    ]  # fmt: skip
    figure = _of(list(by_members(_synthetic("recovery", rows))), "recovered_fraction_by_members")
    lines = {trace.name: list(trace.y) for trace in figure.data}
    assert lines["bagging"] == pytest.approx([0.2, 0.4])
    assert lines["bagging, equal rows"] == pytest.approx([0.21, 0.22])
    assert lines["chance: random"] == pytest.approx([0.01, 0.01])


def test_a_larger_stability_is_not_called_better_and_stability_at_equal_candidates_is(finished: Laboratory):
    rows = main_table(_results(finished), Record.read(finished.store, NAME, NAME, LAYER), METRICS)
    bold = {metric.column for row in rows for metric, cell in zip(METRICS, row.cells, strict=True) if cell.best}
    assert "stability" not in bold and "recovered_fraction" not in bold
    assert {"explained_variance", "stability_equal_candidates"} <= bold


def test_a_histogram_shows_in_how_many_seeds_features_are_found():
    rows = [{"seed": seed, "method": "single", "n_members": 1, "n_runs": 3, "n_found": n} for seed in (1, 2, 3) for n in (0, 1, 2, 2)]
    (figure,) = features(_synthetic("feature_stability", rows))
    (trace,) = _drawn(figure).data
    assert list(trace.y)[:-1] == [0.25, 0.25, 0.5]


def test_symbols_of_equal_levels_are_drawn_next_to_each_other():
    diversity = [("single", 1, 10), ("bagging", 1, 10), ("bagging", 2, 12), ("boosting", 2, 80), ("expanded", 2, 80)]
    diversity += [("compute_matched", 1, 11), ("matching_pursuit", 1, 81), ("expanded_l0_matched", 2, 40)]
    rows = [{"seed": 1, "method": name, "n_members": n, "diversity": value} for name, n, value in diversity]
    (figure,) = by_members(_synthetic("coactivation", rows))
    symbols = {trace.name: trace.x[-1] for trace in _drawn(figure).data if trace.mode == "markers"}
    place = {name: symbols[method(name).label] for name, _, _ in diversity if method(name).label in symbols}
    assert place["expanded_l0_matched"] == 2
    assert 1 < place["compute_matched"] < place["single"] < 2  # bagging ends as high
    assert 1 < place["matching_pursuit"] < place["expanded"] < 2  # boosting does


def test_every_plot_of_the_page_has_a_place_and_every_place_a_plot(finished: Laboratory):
    page = _page(finished)
    places = [str(attributes["data-figure"]) for _, attributes in page.elements if "data-figure" in attributes]
    assert sorted(places) == sorted(page.figures)
    assert {"explained_variance_by_members", "explained_variance_for_l0", "residual_norm", "training_loss", "new_features"} <= set(places)


def test_reports_load_no_external_resources(finished: Laboratory):
    for file in (finished.root / "reports").rglob("*.html"):
        page = Page(file)
        loaded = [
            a.get("src") or a.get("href")
            for tag, a in page.elements
            if tag in ("script", "link", "img", "iframe") and ("src" in a or "href" in a)
        ]
        assert loaded
        assert all(str(each).startswith(("static/", "data:")) for each in loaded)
        assert all((file.parent / str(each)).is_file() for each in loaded if not str(each).startswith("data:"))
        assert {str(a["href"]).split("/assets/")[0] for _, a in page.elements if "://" in str(a.get("href"))} <= {"http://127.0.0.1:3000"}
    styles = (finished.root / "reports" / NAME / f"layer={LAYER}" / "static" / "style.css").read_text()
    assert "url(" not in styles and "@import" not in styles


def test_hostile_names_in_a_report_stay_text(finished: Laboratory):
    for part in (finished.root / "tables" / NAME).rglob("part.parquet"):
        rows = pl.read_parquet(part, hive_partitioning=False)
        hostile = rows.with_columns(pl.col("method").replace("expanded", HOSTILE), sae_data_versions=pl.lit(HOSTILE))
        write_rows(finished.store, part, hostile)
    remake_reports(finished)
    page = _page(finished)
    assert "alert" not in "".join(re.findall(r"<script(?! type)[^>]*>(.*?)</script>", page.source, re.DOTALL))
    assert HOSTILE not in page.source
    assert HOSTILE in page.text
    assert any(trace.get("name") == HOSTILE for figure in page.figures.values() for trace in figure["data"])


@pytest.mark.parametrize("table", ["reconstruction", "stability", "coactivation", "cost", "training_curves", "members", "marginal_gain"])
def test_a_missing_table_is_named_with_the_command_that_computes_it(finished: Laboratory, table: str):
    for part in (finished.root / "tables" / NAME / table).rglob("part.parquet"):
        part.unlink()
    remake_reports(finished)
    page = _page(finished)
    assert f"saeens run {NAME} computes these missing tables:" in page.text
    assert page.source.count(f"<li><code>{table}</code>") == 1


def test_an_undeclared_table_is_named_with_the_field_that_adds_it(finished: Laboratory):
    page = _page(finished)
    assert f"can be added to evaluations in the experiment file; then saeens run {NAME} computes them:" in page.text
    assert page.source.count("<li><code>features</code>") == 1


def test_a_report_becomes_stale_when_tables_are_added(finished: Laboratory):
    (part,) = (finished.root / "tables" / NAME / "stability").rglob("part.parquet")
    kept = part.read_bytes()
    part.unlink()
    remake_reports(finished)
    part.write_bytes(kept)
    printed = finished.run()
    assert "1 artefact to compute" in printed
    assert "<li><code>stability</code>" not in _page(finished).source


def test_every_table_is_listed_with_its_question_and_rows(finished: Laboratory):
    source = _page(finished).source
    listed = re.findall(r'<tr><th scope="row"><code>(\w+)</code></th><td>(.*?)</td><td class="number">([\d,]+)</td></tr>', source)
    there = {path.name for path in (finished.root / "tables" / NAME).iterdir()}
    assert {name for name, _, _ in listed} == there
    for name, question, rows in listed:
        assert question == TABLES[name].question
        assert int(rows.replace(",", "")) == len(_table(finished, name))


def test_a_report_without_any_table_is_refused(empty: Laboratory):
    with pytest.raises(SaeensError, match=f"saeens run {NAME}"):
        make_reports(Catalogue.load(), NAME, [])


def test_the_report_command_writes_reports_and_prints_their_paths(
    finished: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["saeens", "report", NAME])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    pages = capsys.readouterr().out.split()
    assert [Path(page).relative_to(finished.root).as_posix() for page in pages] == [
        f"reports/{NAME}/layer={LAYER}/index.html",
        "reports/leaderboard/index.html",
    ]


def test_pictures_are_png_and_in_the_metadata_of_the_assets(finished: Laboratory):
    pictures = sorted((finished.root / "reports" / NAME / f"layer={LAYER}" / "pictures").glob("*.png"))
    assert [picture.stem for picture in pictures] == [
        "explained_variance_by_members", "explained_variance_for_l0", "explained_variance_for_stability_equal_candidates",
        "stability_by_members",
    ]  # fmt: skip
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    made = finished.materialise([f"{NAME}/eval/stability", f"{NAME}/report"], Partition(LAYER))
    assert "data:image/png;base64," in made[f"{NAME}/eval/stability"].metadata["plot"].value  # pyright: ignore[reportOperatorIssue]
    report = made[f"{NAME}/report"].metadata
    assert "data:image/png;base64," in report["explained variance for l0"].value  # pyright: ignore[reportOperatorIssue]
    assert str(report["file"].value).endswith("index.html")


def test_the_control_is_the_same_experiment_on_random_weights(finished: Laboratory):
    source = source_settings(finished.model, name="untrained", weights="random")
    alike = experiment_settings(name="control", source="untrained", evaluations=["reconstruction"])
    other = experiment_settings(name="another", source="untrained", sae={"architecture": "topk", "expansion": 2, "k": 5})
    documents = (("ActivationSource", source), ("EnsembleExperiment", other), ("EnsembleExperiment", alike))
    finished.write(experiment_file(*documents), "untrained")
    remake_reports(finished)
    assert "saeens run control computes them" in _page(finished).text
    for table in ("reconstruction", "stability"):
        for part in sorted((finished.root / "tables" / NAME / table).rglob("part.parquet")):
            rows = pl.read_parquet(part, hive_partitioning=False).with_columns(experiment=pl.lit("control"))
            target = finished.root / "tables" / "control" / part.relative_to(finished.root / "tables" / NAME)
            target.parent.mkdir(parents=True)
            write_rows(finished.store, target, rows, like=part)
    remake_reports(finished)
    page = _page(finished)
    beside = re.search('<table id="control-table".*?</table>', page.source, re.DOTALL)
    assert beside and beside[0].count(">the same</td>") == beside[0].count('scope="colgroup"') >= 2
    assert "saeens run control computes them" not in page.text
    (link,) = (a for tag, a in page.elements if tag == "a" and "/control/" in str(a["href"]))
    assert "copied alone" in str(link["title"])
    assert "is-control" not in page.source
    remake_reports(finished, "control")
    control = Page(finished.root / "reports" / "control" / f"layer={LAYER}" / "index.html")
    text = " ".join(control.text.split())
    assert "This is a control. The weights of its language model are random: it has learnt nothing." in text
    assert "All other settings are those of " in text
    assert f"{NAME}, on the trained language model" in text
    assert "on an untrained language model" in text
    assert f"../../{NAME}/layer={LAYER}/index.html" in {a.get("href") for _, a in control.elements}


def test_the_order_of_methods_is_compared_with_the_control_by_means():
    def row(name: str, trained: float, untrained: float) -> tuple[Any, Spread, Spread]:
        return method(name), Spread.of([trained]), Spread.of([untrained])

    assert Comparison("EV", [row("single", 0.7, 0.8), row("boosting", 0.9, 0.95)]).same_order
    assert not Comparison("EV", [row("single", 0.7, 0.99), row("boosting", 0.9, 0.95)]).same_order


def test_spreads_are_students_t_intervals_and_the_points_for_two_seeds():
    values = [0.5, 0.7, 0.6, 0.8]
    spread = Spread.of(values)
    expected = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert spread.bar == pytest.approx(expected)
    assert Spread.of([0.7, 0.5]).bar == (0.5, 0.7)
    compared = Spread.of(values, compares_seeds=True)
    assert (compared.low, compared.bar, compared.around(".1f")) == (None, (0.5, 0.8), "0.5, 0.7, 0.6, 0.8")


def test_a_report_of_two_seeds_says_how_far_their_interval_would_reach(finished: Laboratory):
    _, high = scipy.stats.t.interval(0.95, 1, loc=0, scale=1)  # of two, in standard errors from the middle
    assert f"would reach {high:.1f} standard errors to each side" in " ".join(_page(finished).text.split())


def _reconstruction(values: Mapping[str, tuple[float, float, int]]) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "method": name, "n_members": n, "explained_variance": ev, "l0": l0, "n_features": 10}
        for name, (ev, l0, n) in values.items()
        for seed in (1, 2)
    ]


def test_the_lineage_example_names_an_existing_row(finished: Laboratory):
    asked = re.search(rf"saeens lineage {NAME}/(\w+):layer={LAYER},seed=(\d+),method=(\w+),n_members=(\d+)", _page(finished).text)
    assert asked
    assert len(_table(finished, asked[1]).filter(seed=int(asked[2]), method=asked[3], n_members=int(asked[4]))) == 1


def test_a_report_of_one_seed_has_no_words_about_several(finished: Laboratory):
    finished.declare(ensemble={"members": MEMBERS, "seeds": [SEEDS[0]]})
    remake_reports(finished)
    text = " ".join(_page(finished).text.split())
    assert f"those of one seed ({SEEDS[0]})" in text
    assert "double-click to zoom out" in text
    assert "from one seed to the other" not in text and "Small figures" not in text


def test_a_report_of_training_curves_alone_has_no_empty_parts(finished: Laboratory):
    for part in (finished.root / "tables" / NAME).rglob("part.parquet"):
        if "training_curves" not in part.parts:
            part.unlink()
    remake_reports(finished)
    page = _page(finished)
    assert not page.cells
    assert "The numbers" not in re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)
    assert "Numbers are" not in page.text and "<dl></dl>" not in page.source
    assert f"saeens table {NAME} training_curves" in page.text
    assert page.source.count("<li><code>reconstruction</code>") == 1


def test_unknown_methods_have_a_place_and_a_colour():
    assert in_order(["zeta", "boosting", "alpha", "single", "boosting"]) == ["single", "boosting", "alpha", "zeta"]
    assert re.fullmatch("#[0-9a-f]{6}", method("alpha").colour)
    known = [method(name) for name in (*METHODS, "compute_matched", "matching_pursuit", "raw")]
    assert len({each.colour for each in known}) == len({each.glyph for each in known}) == len(known)


def test_density_histograms_count_every_feature_that_fires():
    densities = [0.0, 0.001, 0.001, 0.01, 0.1, 1.0]
    rows = [{"seed": 1, "method": "bagging", "n_members": 2, "member": 1, "index": i, "density": d} for i, d in enumerate(densities)]
    figures_ = list(features(_synthetic("features", rows)))
    (trace,) = _of(figures_, "density").data
    assert sum(trace.y[:-1]) == pytest.approx(5 / 6, abs=1e-3)
    assert (trace.x[-1], trace.y[-1]) == (1.0, pytest.approx(1 / 6, abs=1e-3))  # the last bin is drawn up to its right edge
    assert "never fire (dead) are left out" in next(each.caption for each in figures_ if each.name == "density")


def test_the_histogram_of_features_that_fire_on_every_token_has_an_axis():
    rows = [{"seed": 1, "method": "bagging", "n_members": 2, "member": 1, "index": i, "density": 1.0} for i in range(3)]
    density = _of(list(features(_synthetic("features", rows))), "density")
    assert (density.data[0].y[-1], density.layout.xaxis.range[1]) == (1.0, 0.0) and len(density.layout.xaxis.tickvals) >= 3


def test_cosine_histograms_end_at_one():
    cosines = [0.05, 0.5, 0.99, 1.0]
    subject = {"seed": 1, "method": "bagging", "n_members": 2, "member": 1, "density": 0.5}
    rows = [subject | {"index": i, "nearest_other_seed_cosine": cosine} for i, cosine in enumerate(cosines)]
    figure = _of(list(features(_synthetic("features", rows))), "other_seed_cosine")
    (trace,) = figure.data
    assert (trace.x[0], trace.x[-1]) == (0.0, 1.0)
    assert list(figure.layout.xaxis.range) == [0.0, 1.0]
    assert trace.y[-2:] == (0.5, 0.5)
    assert trace.customdata[-1] == "from 0.97 to 1.00: 50.00% of the features"


def test_the_front_joins_the_pareto_optimal_methods(finished: Laboratory):
    results = _synthetic(
        "reconstruction",
        _reconstruction({"single": (0.7, 8, 1), "boosting": (0.95, 64, 8), "expanded": (0.75, 8, 8), "bagging": (0.8, 64, 8)}),
    )
    figure = _of(list(trade_offs(results)), "explained_variance_for_l0")
    front = next(trace for trace in figure.data if trace.name == "front")
    assert list(zip(front.x, front.y, strict=True)) == [(8, 0.75), (64, 0.95)]


def test_suggested_sizes_are_marked():
    rows = [
        {"seed": 1, "method": "bagging", "n_members": n, "explained_variance_gain": 1 / n, "new_features": 5, "suggested": 2}
        for n in (1, 2, 3)
    ]
    figure = next(each for each in marginal_gain(_synthetic("marginal_gain", rows)) if each.name == "explained_variance_gain")
    assert [shape["x0"] for shape in _drawn(figure).to_dict()["layout"]["shapes"]] == [2]
    assert "Dotted: a number of members that is enough" in figure.caption


def test_curves_are_thinned_and_keep_their_values():
    rows = [
        {
            "seed": 1,
            "method": "bagging",
            "n_members": 2,
            "member": m,
            "step": s,
            "tokens": s * 10,
            "loss": 1.0 + s,
            "explained_variance": 0.5,
            "dead_features": 0.0,
        }
        for m in (1, 2)
        for s in range(1000)
    ]
    curves = _of(list(training(_synthetic("training_curves", rows))), "training_loss").data
    assert len(curves) == 2
    assert all(20 < len(curve.x) <= 120 for curve in curves)
    assert all((curve.x[0], curve.x[-1]) == (0, 9990) and sum(x < 1000 for x in curve.x) > 40 for curve in curves)  # evenly on the axis
    assert all(y == pytest.approx(1 + x / 10, rel=1e-4) for curve in curves for x, y in zip(curve.x, curve.y, strict=True))


def test_curves_of_trainings_of_different_length_have_a_logarithmic_axis():
    rows = [
        {"seed": 1, "method": name, "n_members": 1, "member": 1, "step": s, "tokens": s * 100, "loss": 1.0, "explained_variance": 0.5}
        for name, steps in (("bagging", 10), ("compute_matched", 80))
        for s in range(1, steps)
    ]
    assert _of(list(training(_synthetic("training_curves", rows))), "training_explained_variance").layout.xaxis.type == "log"


def test_concept_detection_is_the_mean_over_labels_then_over_data_sets_of_whole_ensembles():
    sizes = (("single", 1, 0.6, "unscaled"), ("bagging", 1, 0.1, "unscaled"), ("bagging", 2, 0.7, "unscaled"), ("bagging", 2, 0.0, "1/J"))
    rows = [
        {"seed": seed, "method": name, "n_members": n, "code_scale": scale, "dataset": data, "label": label}
        | {"n_probe_features": k, "accuracy": accuracy}
        for name, n, base, scale in sizes
        for seed in (1, 2)
        for data, label, accuracy in (("one", "a", base), ("one", "b", base + 0.2), ("other", "a", base))
        for k in (1, 2)
    ]
    (figure,) = downstream(_synthetic("concept_detection", rows))
    assert {trace.name: (list(trace.x), list(trace.y)) for trace in _drawn(figure).data} == {
        "single": ([1, 2], pytest.approx([0.65, 0.65])),
        "bagging": ([1, 2], pytest.approx([0.75, 0.75])),
    }


def test_scr_is_the_mean_over_tasks_of_counted_directions():
    rows = [
        {"seed": 1, "method": "single", "n_members": 1, "task": task, "n_ablated": n, "scr": 9.0, "scr_metric": value}
        for task, n, value in (("a", 0, 0.0), ("a", 2, 0.2), ("b", 2, 0.4), ("c", 2, None), ("a", 5, 0.5))
    ]
    (figure,) = downstream(_synthetic("spurious_correlation", rows))
    (trace,) = _drawn(figure).data
    assert (list(trace.x), list(trace.y)) == ([2, 5], pytest.approx([0.3, 0.5]))


def test_scores_of_explanations_are_means_over_features_shown_with_the_control():
    rows = [
        {"seed": seed, "method": name, "n_members": 2, "detection_score": score, "control_score": control}
        for seed in (1, 2)
        for name, score, control in (("bagging", 0.9, 0.5), ("bagging", 0.7, None), ("bagging", None, None), ("boosting", 0.6, 0.4))
    ]
    (figure,) = downstream(_synthetic("autointerp", rows))
    assert {trace.name: (list(trace.x), list(trace.y)) for trace in _drawn(figure).data} == {
        "bagging": (["own explanation", "another's"], pytest.approx([0.8, 0.5])),
        "boosting": (["own explanation", "another's"], pytest.approx([0.6, 0.4])),
    }
    assert _drawn(figure).to_dict()["layout"]["xaxis"]["type"] == "category"
    unasked = [row | {"detection_score": None} for row in rows[:1]]
    assert not list(downstream(_synthetic("autointerp", unasked)))


def test_the_papers_setting_is_recognised_by_model_hook_layer_and_weights():
    assert setting_of("EleutherAI/pythia-160m", "resid_post", 8, "trained") is SETTINGS[1]
    assert setting_of("google/gemma-2-2b", "resid_post", 12, "trained") is SETTINGS[2]
    assert setting_of("transformer_lens:gelu-1l", "resid_post", 0, "trained") is SETTINGS[0]
    assert setting_of("EleutherAI/pythia-160m", "resid_post", 7, "trained") is None
    assert setting_of("EleutherAI/pythia-160m", "mlp_out", 8, "trained") is None
    assert setting_of("EleutherAI/pythia-160m", "resid_post", 8, "random") is None
    sae = SAESettings(architecture="topk", expansion=21, k=128)
    assert SETTINGS[1].deviations(sae, 8, 4, 800_000_000) == []
    narrower = sae.model_copy(update={"k": 64})
    assert SETTINGS[1].deviations(narrower, 8, 2, 800_000_000) == [
        "k 64 here, 128 in the paper",
        "seeds 2 here, 4 in the paper",
    ]


def test_the_leaderboards_page_has_every_row(finished: Laboratory):
    make_reports(Catalogue.load(), None, [])
    page = Page(finished.root / "reports" / "leaderboard" / "index.html")
    rows = [attributes for tag, attributes in page.elements if tag == "tr" and "data-method" in attributes]
    assert {row["data-method"] for row in rows} == set(METHODS)
    reports = [a["href"] for tag, a in page.elements if tag == "a" and "layer=" in str(a.get("href"))]
    assert len(reports) == len(METHODS)
    assert all((finished.root / "reports" / "leaderboard" / str(each)).is_file() for each in reports)
    boosting = read_table(finished.root, NAME, "reconstruction").filter(method="boosting", n_members=MEMBERS)["explained_variance"]
    assert f'data-value="{np.mean(boosting.to_numpy())}"' in page.source
    points = [f"{point:.4f}" for point in boosting]
    assert f"<small>{points[0] if len(set(points)) == 1 else ', '.join(points)}</small>" in page.source
    assert "untrained (control)" not in page.text


def test_the_leaderboards_page_marks_controls_and_explains_missing_numbers(finished: Laboratory, tmp_path: Path):
    (declaration,) = finished.catalogue.leaderboard().outputs
    board = standings(finished.store, declaration)
    measured = pl.when(pl.col("method") == "single")
    control = board.with_columns(
        experiment=pl.lit("control"),
        language_model=pl.lit("random"),
        ce_loss_recovered=measured.then("ce_loss_recovered"),
        stability=measured.then("stability"),
        n_seeds=pl.lit(1, pl.Int64),
    )
    write_leaderboard(tmp_path, pl.concat([board, control]), {})
    page = Page(tmp_path / "index.html")
    rows = page.source.split("<tr ")[1:]
    assert [row.count('<b class="control"') for row in rows] == [0] * len(METHODS) + [1] * len(METHODS)
    for column, why in (("ce_loss_recovered", "ce_loss_tokens"), ("stability", "there is one seed, and stability compares seeds")):
        empty = [a for tag, a in page.elements if tag == "td" and a.get("data-key") == column and not a["data-value"]]
        assert len(empty) == len(METHODS) - 1
        assert all(why in str(each["title"]) for each in empty)
    assert page.text.count("under CE rec.: not measured") == page.text.count("under stability: there is one seed") == 1


def test_the_leaderboards_page_explains_its_methods_columns_and_better_directions(finished: Laboratory):
    make_reports(Catalogue.load(), None, [])
    page = Page(finished.root / "reports" / "leaderboard" / "index.html")
    titles = re.findall(r'data-sort="([^"]+)"[^>]*>([^<]*)</button>(?:<span class="better" title="(more|less))?', page.source)
    better = {metric.column: metric.better for metric in METRICS}
    assert {column: word for column, _, word in titles} == {column: better.get(column, "") for column, _, _ in titles}
    terms = {re.sub("<.*?>.*?</.*?>", "", term) for term in re.findall("<dt>(.*?)</dt>", page.source)}
    assert terms >= {method(name).label for name in METHODS} | {"n", "rank", "seeds"}
    assert terms >= {metric.title for metric in METRICS if metric.column in {column for column, _, _ in titles}}


def test_sources_are_a_filter_of_the_leaderboards_page_where_experiments_share_one(finished: Laboratory, tmp_path: Path):
    (declaration,) = finished.catalogue.leaderboard().outputs
    board = standings(finished.store, declaration)
    other = board.with_columns(experiment=pl.lit("other"))
    pages: dict[str, set[str]] = {}
    for name, rows in (
        ("of one each", [board, other.with_columns(source=pl.lit("other"))]),
        ("of one", [board, other]),
        ("of two", [board, other, other.with_columns(experiment=pl.lit("third"), source=pl.lit("third"))]),
    ):
        (tmp_path / name).mkdir()
        write_leaderboard(tmp_path / name, pl.concat(rows), {})
        page = Page(tmp_path / name / "index.html")
        pages[name] = {str(a["data-filter"]) for tag, a in page.elements if tag == "select"}
    assert pages == {
        "of one each": {"experiment", "method"},
        "of one": {"experiment", "method"},
        "of two": {"experiment", "method", "source"},
    }


def test_profiles_by_layer_are_drawn_for_several_layers():
    board = pl.DataFrame(
        {
            "experiment": ["e"] * 4, "layer": [0, 0, 1, 1], "method": ["single", "boosting"] * 2, "n_members": [1, 8] * 2,
            "seeds": ["1,2"] * 4, "explained_variance": [0.1, 0.2, 0.3, 0.4], 
            "explained_variance_by_seed": ["0.1,0.1", "0.2,0.2", "0.2,0.4", "0.4,0.4"],
            "stability": [None] * 4, "connectivity": [None] * 4, "ce_loss_recovered": [None] * 4,
        },
        schema_overrides={"stability": pl.Float64, "connectivity": pl.Float64, "ce_loss_recovered": pl.Float64},
    )  # fmt: skip
    (figure,) = layer_profile(board, "e")
    assert {trace.name: (list(trace.x), list(trace.y)) for trace in _drawn(figure).data} == {
        "single": ([0, 1], pytest.approx([0.1, 0.3])), "boosting": ([0, 1], pytest.approx([0.2, 0.4])),
    }  # fmt: skip
    assert list(layer_profile(board.filter(layer=0), "e")) == []


def test_rows_of_undeclared_seeds_are_left_out(finished: Laboratory):
    results = Results.read(finished.root, NAME, LAYER, SEEDS[:1])
    assert results.seeds == [SEEDS[0]]
    spread = results.spreads("reconstruction", "mse")[Size("single", 1)]
    assert spread.points == tuple(_table(finished, "reconstruction").filter(method="single", seed=SEEDS[0])["mse"])


def test_report_pages_are_separate_artefacts(finished: Laboratory):
    folder = finished.root / Address(NAME, "report", "report").path(Partition(LAYER))
    assert (
        read_artefact(folder).recipe["inputs"][f"stability, layer {LAYER}"]
        == read_artefact(finished.root / Address(NAME, "eval", "stability").path(Partition(LAYER))).data_version
    )
    assert compare(_results(finished), _results(finished))
