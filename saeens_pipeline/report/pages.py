"""Writes the pages: an experiment's report for one layer, and the leaderboard. Each is a folder that needs nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.tables.autointerp_outcome import outcome
from saeens_pipeline.report import figures
from saeens_pipeline.report.control import compare
from saeens_pipeline.report.feature_browser import COLUMNS, PAGE, FeatureBrowser
from saeens_pipeline.report.lineage_diagram import diagram
from saeens_pipeline.report.main_table import METRICS, N_MEMBERS, Cell, Metric, cell_of, main_table, metrics_of, seeds_in_words, why_empty
from saeens_pipeline.report.methods import in_order, listed, method
from saeens_pipeline.report.published import PAPER, setting_of
from saeens_pipeline.report.record import UI, Record
from saeens_pipeline.report.results import Results
from saeens_pipeline.report.words import choices, does_not_say, says
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import TABLES, layers_with_tables, with_totals

if TYPE_CHECKING:
    import polars as pl
    from jinja2 import Environment
    from markupsafe import Markup

    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.settings import ExperimentSettings

INDEX = "index.html"
PICTURES = "pictures"
_HERE = Path(__file__).parent
_WEIGHTS = {"random": "untrained (control)"}
_RANK = "the place by explained variance among all rows of the same source and layer"
_SEEDS = "from how many seeds the numbers are; pointed at, a number of the column says which"
_IN_PAGE = (  # tables that the page shows something of
    *("reconstruction", "coactivation", "stability", "cost", "marginal_gain", "members", "training_curves", "features"),
    *("concept_detection", "spurious_correlation"),
)


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, heading, one line of what it is about, and its plots."""

    anchor: str
    title: str
    about: str
    figures: Sequence[figures.Figure]
    link: tuple[str, str] | None = None
    """a page of its own, and what it has"""
    note: str = ""
    """what has to be said of its tables; code stands in backticks"""


@dataclass(frozen=True)
class Missing:
    """Tables that are not there, each with the question that it answers, and what makes them."""

    how: str
    tables: Sequence[tuple[str, str]]


def write_report(folder: Path, store: Store, catalogue: Catalogue, experiment: ExperimentSettings, layer: int) -> None:
    """Write the report of one layer into an empty folder, from the tables that are there."""
    from saeens_pipeline.report.pictures import report_pictures

    results = Results.read(store.root, experiment.name, layer, experiment.ensemble.seeds)
    record = Record.read(store, experiment.name, experiment.source, layer)
    is_control = catalogue.sources[experiment.source].weights == "random"
    controls = catalogue.controls
    control = catalogue.experiments.get(controls.get(experiment.name, ""))
    controlled = [name for name, other in controls.items() if other == experiment.name]
    untrained = Results.read(store.root, control.name, layer, control.ensemble.seeds) if control else None
    comparisons = list(compare(results, untrained)) if untrained else []
    setting = setting_of(record.language_model, str(record.setting("hook")), layer, str(record.setting("weights")))
    train_tokens = record.setting("train_tokens")
    browser = FeatureBrowser.read(store, results, experiment.ensemble.seeds)
    explained = outcome(store, experiment.name, experiment.ensemble.seeds, layer)
    sections = list(_sections(results, browser, explained))
    metrics = metrics_of(results)
    page = {
        "experiment": experiment.name,
        "layer": layer,
        "layers": layers_with_tables(store.root, experiment.name),
        "is_control": is_control,
        "control_of": {name: layer in layers_with_tables(store.root, name) for name in controlled},
        "seeds": results.seeds,
        "results": results,
        "record": record,
        "facts": list(record.facts()),
        "choices": list(choices(results)),
        "metrics": metrics,
        "n_members": N_MEMBERS,
        "rows": (rows := main_table(results, record)),
        "empty": _reasons(metrics, [row.cells for row in rows]),
        "says": list(says(results)),
        "does_not_say": list(does_not_say(results, comparisons, "" if is_control else _control_hint(record, control, untrained))),
        "comparisons": comparisons,
        "compared": [method(name) for name in in_order(row[0].name for each in comparisons for row in each.rows)],
        "control": control.name if control else "",
        "paper": PAPER,
        "setting": setting,
        "deviations": setting.deviations(experiment.saes[0], experiment.ensemble.members, len(results.seeds), train_tokens)
        if setting
        else [],
        "sections": sections,
        "browser": browser,
        "diagram": diagram(record),
        "missing": _missing(results, experiment),
        "could_be": _could_be(results, experiment),
        "outdated_features": _what_makes("features", experiment, "was made by an earlier version")
        if "features" in results.tables and not browser
        else "",
        "seeds_in_words": seeds_in_words,
        "ui": UI,
        "methods": [method(name) for name in results.methods],
    }
    _write(folder, "report.html", page, [figure for section in sections for figure in section.figures])
    if browser:
        missing = "" if browser.contexts is not None else what_makes_contexts(experiment, catalogue)
        _write_features(folder, browser, store, record, missing)
    for name, png in report_pictures(results):
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / PICTURES / f"{name}.png").write_bytes(png)


def write_leaderboard(folder: Path, board: pl.DataFrame, reports: Mapping[tuple[str, int], str]) -> None:
    """Write the page over all experiments from the leaderboard's rows; `reports`: links to the reports that there are."""
    board = with_totals(board)
    metrics = [metric for metric in METRICS if metric.column in board.columns and board[metric.column].null_count() < len(board)]
    profiles = [figure for name in sorted(set(board["experiment"])) for figure in figures.layer_profile(board, name)]
    rows = [
        row
        | {"about": method(row["method"]), "report": reports.get((row["experiment"], row["layer"]), "")}
        | {"cells": [_cell_of_board(row, metric) for metric in metrics]}
        for row in board.to_dicts()
    ]
    filters = ["experiment", "source", "layer"]
    if board["source"].n_unique() == board["experiment"].n_unique():  # one says the other
        filters.remove("source")
    page = {
        "rows": rows,
        "metrics": metrics,
        "empty": _reasons(metrics, [row["cells"] for row in rows]),
        "columns": {name: [(value, value) for value in sorted(set(board[name]))] for name in filters}
        | {"language_model": [(value, _WEIGHTS.get(value, value)) for value in sorted(set(board["language_model"]))]}
        | {"method": [(name, method(name).label) for name in in_order(board["method"])]},
        "others": {"n": N_MEMBERS, "rank": _RANK, "seeds": _SEEDS},
        "profiles": profiles,
        "methods": [method(name) for name in in_order(board["method"])],
    }
    _write(folder, "leaderboard.html", page, profiles)


def _cell_of_board(row: Mapping[str, Any], metric: Metric) -> Cell:
    """A mean of the leaderboard, with its interval or points where it has the seeds'."""
    if row[metric.column] is None:
        return Cell(why=why_empty(metric, row["experiment"], row["n_seeds"]))
    if f"{metric.column}_by_seed" in row:
        return cell_of(figures.from_board(row, metric.column), metric)
    return Cell(metric.written(row[metric.column]), row[metric.column])


def _reasons(metrics: Sequence[Metric], rows: Sequence[Sequence[Cell]]) -> list[tuple[str, str]]:
    """Why cells are empty, each reason once, after the columns that it is about."""
    columns: dict[str, list[str]] = {}
    for cells in rows:
        for metric, cell in zip(metrics, cells, strict=True):
            if cell.why and metric.title not in columns.setdefault(cell.why, []):
                columns[cell.why].append(metric.title)
    return [(listed(titles), why) for why, titles in columns.items()]


def _write_features(folder: Path, browser: FeatureBrowser, store: Store, record: Record, missing_contexts: str) -> None:
    """The page of all features, and the files that it reads."""
    page = {
        "experiment": record.experiment,
        "layer": record.layer,
        "browser": browser,
        "methods": [method(name) for name in in_order(browser.rows["method"].unique())],
        "columns": [column for column in COLUMNS if column.key in browser.columns],
        "shared": figures.NEAR_DUPLICATE,
        "missing_contexts": missing_contexts,
        "figure_data": "{}",
    }
    (folder / PAGE).write_text(_environment().get_template(PAGE).render(page))
    browser.write(folder, store, record, missing_contexts)


def _sections(results: Results, browser: FeatureBrowser | None, explained: str) -> Iterable[Section]:
    parts = (
        (
            "members",
            "More members",
            "What each further member or round changes. Dotted levels are single SAEs, to compare with.",
            figures.by_members,
        ),
        (
            "trade-offs",
            "Trade-offs",
            "Every method at every size; large symbols are whole ensembles. The dotted line joins those that none is better than in both.",
            figures.trade_offs,
        ),
        (
            "gain",
            "How many are enough",
            "What one more member adds. A number of members is enough where each further one closes less than 5% of the gap that explained "
            "variance and stability still have to 1.",
            figures.marginal_gain,
        ),
        ("training", "Training and rounds", "How training went, and what rounds do.", figures.training),
        ("features", "Features", "How often features fire, and whether they come back.", figures.features),
        ("downstream", "Downstream", "What features are good for.", figures.downstream),
    )
    for anchor, title, about, draw in parts:
        section = Section(anchor, title, about, list(draw(results)))
        if anchor == "features" and browser:
            what = f"All {len(browser.rows):,} features of both ensembles, seed {browser.seed}"
            section = replace(section, link=(PAGE, f"{what}: in a table, on a map, and each by itself"))
        if anchor == "downstream" and explained:
            section = replace(section, note=f"Explanations by a language model. {explained}")
        if section.figures or section.link or section.note:
            yield section


def _missing(results: Results, experiment: ExperimentSettings) -> Missing | None:
    """Tables that the experiment asks for and that are not there."""
    names = [name for name in _IN_PAGE if name in results.missing and name in experiment.evaluations]
    return _named(f"`saeens run {experiment.name}` makes these tables, which are not there:", names)


def _could_be(results: Results, experiment: ExperimentSettings) -> Missing | None:
    """Tables that the experiment does not ask for."""
    names = [name for name in _IN_PAGE if name in results.missing and name not in experiment.evaluations]
    return _named(f"These can be added to `evaluations` in the experiment file; then `saeens run {experiment.name}` makes them:", names)


def _named(how: str, tables: Sequence[str]) -> Missing | None:
    return Missing(how, [(name, TABLES[name].question) for name in tables]) if tables else None


def _what_makes(table: str, experiment: ExperimentSettings, trouble: str = "is not there") -> str:
    run, question = f"saeens run {experiment.name}", TABLES[table].question
    how = f"`{run}` makes it." if table in experiment.evaluations else f"add {table} to `evaluations` in the experiment file, then `{run}`."
    return f"The table {table} ({question[0].lower()}{question[1:].rstrip('?')}) {trouble}: {how}"


def what_makes_contexts(experiment: ExperimentSettings, catalogue: Catalogue) -> str:
    """How to have contexts where there are none: by this experiment, or by another that asks for them and has the same SAEs, or more."""
    members = experiment.ensemble.members

    def saes(of: ExperimentSettings) -> tuple[object, ...]:
        return of.source, of.saes[:members], of.training, of.ensemble.model_copy(update={"members": members})

    run = f"saeens run {experiment.name}"
    if "contexts" in experiment.evaluations:
        return f"Contexts are not there: `{run}` makes them."
    how = f"add contexts to `evaluations` in the experiment file, then `{run}`"
    for other in catalogue.experiments.values():
        if "contexts" in other.evaluations and other.ensemble.members >= members and saes(other) == saes(experiment):
            more = " and more" if other.ensemble.members > members else ""
            how = f"`saeens run {other.name}` makes them of the same SAEs{more}; or {how}"
            break
    return f"Contexts are not there: {how}."


def _control_hint(record: Record, control: ExperimentSettings | None, untrained: Results | None) -> str:
    """What to run for the control where there are no numbers of it."""
    if control and untrained and list(compare(untrained, untrained)):
        return ""  # it is this experiment that has nothing to compare
    if control:
        return (
            f"The control on an untrained language model, {control.name}, has no numbers for layer {record.layer}: "
            f"`saeens run {control.name}` makes them and shows them here. Until then, nothing says that the order of methods has to do "
            "with what the language model learnt."
        )
    return (
        "There is no control. A source that is the same but for `weights: random`, with the same experiment on it, shows what would "
        "come out of an untrained language model; until then, nothing says that the order of methods has to do with what it learnt."
    )


def _write(folder: Path, template: str, page: Mapping[str, Any], drawn: Sequence[figures.Figure]) -> None:
    from markupsafe import Markup

    data = json.dumps({figure.name: _finite(figure.figure) for figure in drawn}, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # inside a script element nothing else could end it
        data = data.replace(character, f"\\u{ord(character):04x}")
    (folder / INDEX).write_text(_environment().get_template(template).render(page, figure_data=Markup(data)))
    static = folder / "static"
    static.mkdir()
    for file in sorted((_HERE / "static").iterdir()):
        shutil.copyfile(file, static / file.name)
    if drawn:
        (static / "plotly.min.js").write_bytes(files("plotly").joinpath("package_data", "plotly.min.js").read_bytes())


def _finite(value: Any) -> Any:
    """A plot with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> Environment:
    """Everything is escaped, and a name that a template misspells is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    return environment


def _prose(sentence: str) -> Markup:
    """A sentence, escaped, with what stands between backticks set as code."""
    from markupsafe import Markup

    parts = sentence.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))
