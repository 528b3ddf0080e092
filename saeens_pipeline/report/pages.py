"""The pages: an experiment's report for one layer, and the leaderboard. Each is a folder that needs no other file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import polars as pl
from markupsafe import Markup

from saeens_pipeline.assets.massive_activations import cautions
from saeens_pipeline.assets.over_seeds import written
from saeens_pipeline.assets.registry import TABLES, Headline, fills
from saeens_pipeline.assets.tables.autointerp import outcome
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.assets.tables.leaderboard import unequal_tokens
from saeens_pipeline.report import figures, published
from saeens_pipeline.report.charts import Chart, as_plotly
from saeens_pipeline.report.feature_browser import NEAR_DUPLICATE, PAGE, FeatureBrowser
from saeens_pipeline.report.main_table import N_MEMBERS, Cell, cell_of, main_table, why_empty
from saeens_pipeline.report.methods import in_order, listed, method
from saeens_pipeline.report.metrics import METRICS
from saeens_pipeline.report.new_features import LISTED, NewFeatures
from saeens_pipeline.report.pictures import report_pictures
from saeens_pipeline.report.record import UI, Record, diagram
from saeens_pipeline.report.results import Results, compare, spread_of_row
from saeens_pipeline.storage.names import INDEX_FILE, PICTURES_FOLDER
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import layers_with_tables

if TYPE_CHECKING:
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.settings import ExperimentSettings

_HERE = Path(__file__).parent
_WEIGHTS = {"random": "untrained (control)"}
_COLUMNS = {  # of the leaderboard's page, in addition to the metrics
    "n": N_MEMBERS,
    "rank": "place by explained variance among all rows of the same source and layer. Tie: the held-out documents do not tell it apart "
    "from the best in every seed",
    "seeds": "number of seeds behind the means",
}
_SECTIONS = (
    ("members", "More members", "Each metric against the number of members or rounds. Dotted: single SAEs."),
    ("trade-offs", "Trade-offs",
     "Every method at every size; large symbols are whole ensembles. The dotted line is the front: no point is better in both."),
    ("gain", "Marginal gain",
     "Gain of one more member. A number of members is enough where each further one closes less than 5% of the gap that explained variance "
     "has to 1, and the next-token loss to that of the activations, for every training of a first member that it costs in FLOPs; where the "
     "intervals over documents do not decide, no number is marked."),
    ("training", "Training and rounds", "Training curves, and each SAE on its own input."),
    ("features", "Features", "How often features fire, and whether they come back."),
    ("downstream", "Downstream", "Uses of features: probes, and explanations by a language model."),
)  # fmt: skip


def write_report(folder: Path, store: Store, catalogue: Experiments, experiment: ExperimentSettings, layer: int) -> None:
    """Write the report of one layer into an empty folder, from the tables on disk."""
    results = Results.read(store.root, experiment.name, layer, experiment.ensemble.seeds)
    record = Record.read(store, experiment.name, experiment.source, layer)
    is_control = catalogue.sources[experiment.source].weights == "random"
    control = catalogue.experiments.get(catalogue.controls.get(experiment.name, ""))
    controlled = [name for name, other in catalogue.controls.items() if other == experiment.name]
    untrained = Results.read(store.root, control.name, layer, control.ensemble.seeds) if control else None
    comparisons = list(compare(results, untrained)) if untrained else []
    setting = published.setting_of(record.language_model, str(record.setting("hook")), layer, str(record.setting("weights")))
    trained = (experiment.ensemble.members, len(results.seeds), record.setting("train_tokens"))
    browser = FeatureBrowser.read(store, results, experiment.ensemble.seeds)
    missing_contexts = what_makes_contexts(experiment, catalogue) if browser and browser.contexts is None else ""
    explained = outcome(store, experiment.name, experiment.ensemble.seeds, layer)
    notes = {"downstream": f"Explanations by a language model. {explained}" if explained else ""}
    if "features" in results.tables and not browser:
        notes["features"] = f"The table features is of an earlier version: `saeens run {experiment.name}` computes it again."
    charts = figures.all_charts(results)
    sections = [
        {"anchor": anchor, "title": title, "about": about, "charts": charts[anchor], "note": notes.get(anchor, "")}
        for anchor, title, about in _SECTIONS
    ]
    sections = [section for section in sections if section["charts"] or section["note"]]
    metrics = [metric for metric in METRICS if results.full(metric)]
    rows = main_table(results, record, metrics)
    page = {
        "experiment": experiment.name,
        "layer": layer,
        "layers": layers_with_tables(store.root, experiment.name),
        "is_control": is_control,
        "is_synthetic": catalogue.sources[experiment.source].synthetic is not None,
        "control_of": {name: layer in layers_with_tables(store.root, name) for name in controlled},
        "control_hint": "" if is_control or comparisons else _control_hint(layer, control, untrained),
        "control": control.name if control else "",
        "comparisons": comparisons,
        "compared": [method(name) for name in in_order(row[0].name for each in comparisons for row in each.rows)],
        "results": results,
        "seeds": results.seeds,
        "record": record,
        "metrics": metrics,
        "n_members": N_MEMBERS,
        "rows": rows,
        "empty": _reasons(metrics, [row.cells for row in rows]),
        "paper": published,
        "setting": setting,
        "deviations": setting.deviations(experiment.saes[0], *trained) if setting and experiment.saes else [],
        "sections": sections,
        "browser": browser,
        "new": NewFeatures.read(results, untrained, browser),
        "listed_features": LISTED,
        "shared": NEAR_DUPLICATE,
        "missing_contexts": missing_contexts,
        "diagram": diagram(record),
        "tables": [(name, TABLES[name].question, len(table)) for name, table in results.tables.items()],
        "missing": [(name, TABLES[name].question) for name in results.missing if fills(experiment, name)],
        "could_be": [(name, TABLES[name].question) for name in results.missing if not fills(experiment, name)],
        "ui": UI,
        "methods": [method(name) for name in results.methods],
    }
    _write(folder, "report.html", page, [chart for section in sections for chart in section["charts"]])
    if browser:
        _write_features(folder, browser, missing_contexts)
    for name, png in report_pictures(results):
        (folder / PICTURES_FOLDER).mkdir(exist_ok=True)
        (folder / PICTURES_FOLDER / f"{name}.png").write_bytes(png)


def write_leaderboard(folder: Path, board: pl.DataFrame, reports: Mapping[tuple[str, int], str]) -> None:
    """Write the page over all experiments from the leaderboard's rows; `reports` are links to the reports on disk."""
    board = with_totals(board)
    metrics = [metric for metric in METRICS if metric.column in board.columns and board[metric.column].null_count() < len(board)]
    profiles = [chart for name in sorted(set(board["experiment"])) for chart in figures.layer_profile(board, name)]
    rows = board.to_dicts()
    for row in rows:
        row |= {"about": method(row["method"]), "report": reports.get((row["experiment"], row["layer"]), "")}
        row["cells"] = [_cell_of_board(row, metric) for metric in metrics]
    one_says_the_other = board["source"].n_unique() == board["experiment"].n_unique()
    filters = ["experiment", "layer"] if one_says_the_other else ["experiment", "source", "layer"]
    methods = [method(name) for name in in_order(board["method"])]
    page = {
        "rows": rows,
        "metrics": metrics,
        "empty": _reasons(metrics, [row["cells"] for row in rows]),
        "columns": {name: [(value, value) for value in sorted(set(board[name]))] for name in filters}
        | {"language_model": [(value, _WEIGHTS.get(value, value)) for value in sorted(set(board["language_model"]))]}
        | {"method": [(about.name, about.label) for about in methods]},
        "others": _COLUMNS,
        "cautions": [*cautions(board), *unequal_tokens(board)],
        "profiles": profiles,
        "methods": methods,
    }
    _write(folder, "leaderboard.html", page, profiles)


def what_makes_contexts(experiment: ExperimentSettings, catalogue: Experiments) -> str:
    """Return a hint how to compute missing contexts: in this experiment, or in another one that has the same SAEs and the table."""
    members = experiment.ensemble.members

    def saes(of: ExperimentSettings) -> tuple[object, ...]:
        return of.source, of.saes[:members], of.training, of.ensemble.model_copy(update={"members": members})

    run = f"saeens run {experiment.name}"
    if fills(experiment, "contexts"):
        return f"Contexts are missing: `{run}` computes them."
    how = f"add contexts to `evaluations` in the experiment file, then `{run}`"
    for other in catalogue.experiments.values():
        if fills(other, "contexts") and other.ensemble.members >= members and saes(other) == saes(experiment):
            more = " and more" if other.ensemble.members > members else ""
            how = f"`saeens run {other.name}` computes them for the same SAEs{more}; or {how}"
            break
    return f"Contexts are missing: {how}."


def _control_hint(layer: int, control: ExperimentSettings | None, untrained: Results | None) -> str:
    """Return a hint how to compute the control's figures; empty if the control has them."""
    if control and untrained and list(compare(untrained, untrained)):
        return ""  # it is this experiment that has nothing to compare
    if control:
        return f"The control {control.name} has no numbers for layer {layer}: `saeens run {control.name}` computes them."
    return "There is no control: the same experiment on a source that differs by `weights: random` alone. `saeens run` shows it here."


def _cell_of_board(row: Mapping[str, Any], metric: Headline) -> Cell:
    """Return a cell of the leaderboard page: mean, and the interval or points over seeds if the leaderboard has them."""
    if row[metric.column] is None:
        return Cell(why=why_empty(metric, row["experiment"], row["n_seeds"], lambda other: row[other.column] is not None))
    spread = spread_of_row(row, metric.column)
    return cell_of(spread, metric) if spread else Cell(written(row[metric.column], metric.form), row[metric.column])


def _reasons(metrics: Sequence[Headline], rows: Sequence[Sequence[Cell]]) -> list[tuple[str, str]]:
    """Return the columns that have empty cells for each reason, and the reason."""
    columns: dict[str, dict[str, None]] = {}
    for metric, cell in ((metric, cell) for cells in rows for metric, cell in zip(metrics, cells, strict=True)):
        if cell.why:
            columns.setdefault(cell.why, {})[metric.title] = None
    return [(listed(list(titles)), why) for why, titles in columns.items()]


def _write_features(folder: Path, browser: FeatureBrowser, missing_contexts: str) -> None:
    methods = [method(name) for name in in_order(browser.rows["method"].unique())]
    page = {
        "experiment": browser.experiment,
        "layer": browser.layer,
        "browser": browser,
        "methods": methods,
        "method_choices": [(about.name, about.label) for about in methods],
        "explained_choices": [("yes", "yes"), ("no", "no"), *((status, f"asked: {status}") for status in browser.statuses)],
        "shared": NEAR_DUPLICATE,
        "missing_contexts": missing_contexts,
    }
    _render(folder / PAGE, PAGE, page)
    browser.write(folder, missing_contexts)


def _write(folder: Path, template: str, page: Mapping[str, Any], charts: Sequence[Chart]) -> None:
    _render(folder / INDEX_FILE, template, page, charts)
    static = folder / "static"
    static.mkdir()
    for file in sorted((_HERE / "static").iterdir()):
        shutil.copyfile(file, static / file.name)
    if charts:
        (static / "plotly.min.js").write_bytes(files("plotly").joinpath("package_data", "plotly.min.js").read_bytes())


def _render(file: Path, template: str, page: Mapping[str, Any], charts: Sequence[Chart] = ()) -> None:
    """Write a page. All text is escaped; an unknown name in a template is an error."""
    data = json.dumps({chart.name: as_plotly(chart) for chart in charts}, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # inside a script element nothing else could end it
        data = data.replace(character, f"\\u{ord(character):04x}")
    loader, undefined = jinja2.FileSystemLoader(_HERE / "templates"), jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = _prose
    file.write_text(environment.get_template(template).render(page, figure_data=Markup(data)))


def _prose(sentence: str) -> Markup:
    """Return a sentence, escaped, with the parts between backticks as code."""
    parts = sentence.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))
