"""The summary at the end of `saeens run`: metrics of every method, warnings, and paths of the reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import polars as pl
from rich.console import Console

from saeens_pipeline.assets.baselines.registry import BASELINES, methods
from saeens_pipeline.assets.health import warnings_of
from saeens_pipeline.assets.massive_activations import marked
from saeens_pipeline.assets.registry import listed
from saeens_pipeline.assets.staleness import Status
from saeens_pipeline.cli.output import grid
from saeens_pipeline.orchestration.runs import Outcome, print_line
from saeens_pipeline.report.results import Results, Size
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.names import ENSEMBLES
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root
from saeens_pipeline.storage.tables import read_part

SHOWN_WARNINGS = 5


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print metrics, warnings, paths of report pages, and the time."""
    store = Store(data_root())
    _print_metrics(store, outcome, console)
    _print_warnings(store, outcome.experiment, outcome.statuses, console)
    for pages, title in (
        (outcome.reports, "The report, to open in a browser"),
        (outcome.renewed, "Reports that show this control, written again"),
    ):
        if pages:
            print_line(console, "\n" + "\n".join([f"{title}:", *(f"  {page}" for page in pages)]))
    print_line(console, f"\nTook {outcome.seconds:.0f} s. All artefacts are below {store.root}; `saeens ui` opens the Dagster UI.")


def outcome_for_programs(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON values: its artefacts, means over seeds from fresh tables, warnings, paths of report pages, seconds."""
    store, experiment = Store(data_root()), outcome.experiment
    headlines = [each for table in listed(over_experiments=False) for each in table.headlines if each.in_summary]
    metrics: list[dict[str, Any]] = []
    for layer, results in _fresh_tables(store, experiment.name, outcome.statuses, {each.table for each in headlines}).items():
        values = {each.column: results.of(each) for each in headlines}
        for size in (Size(method, n) for method in methods() for n in _sizes(experiment, method)):
            if own := {column: of_column[size].mean for column, of_column in values.items() if size in of_column}:
                metrics.append({"layer": layer, "method": size.method, "n_members": size.n_members, **own})
    return {
        "experiment": experiment.name,
        "seconds": round(outcome.seconds, 1),
        "artefacts": [
            {"asset": str(each.declaration.address), **each.partition._asdict(), "state": each.state, "why": each.reason}
            for each in outcome.statuses
        ],
        "metrics": metrics,
        "warnings": _warnings(store, experiment, outcome.statuses),
        "reports": [str(page) for page in (*outcome.reports, *outcome.renewed)],
    }


def _print_metrics(store: Store, outcome: Outcome, console: Console) -> None:
    """Print for each layer the metrics of each method at the full ensemble size, means over seeds, from fresh tables."""
    experiment, counterpart = outcome.experiment, outcome.counterpart
    tables = listed(over_experiments=False)
    headlines = [each for table in tables for each in table.headlines if each.in_summary]
    names = {*(each.table for each in headlines), *(table.name for table in tables if table.conclusion)}
    controls = _fresh_tables(store, counterpart.name, counterpart.statuses, names) if counterpart else {}
    for layer, results in _fresh_tables(store, experiment.name, outcome.statuses, names).items():
        title = f"{experiment.name}, layer {layer}: mean over seeds {', '.join(map(str, results.seeds))}"
        reconstruction = results.tables.get("reconstruction", pl.DataFrame())
        columns = [(marked(each.title, each.column, reconstruction), each.form, results.of(each)) for each in headlines]
        if counterpart and layer in controls:
            name = counterpart.language_model
            title += f"; {name}: {counterpart.name}, the same experiment with {name} weights"
            columns += [(f"{each.title}, {name}", each.form, controls[layer].of(each)) for each in headlines if each.of_control]
        columns = [column for column in columns if column[2]]  # tables that this experiment does not fill
        shown = grid("method", "n", title=title)
        for heading, _, _ in columns:
            shown.add_column(heading, justify="right")
        for size in (Size(method, n) for method in methods() for n in _sizes(experiment, method)):
            if any(size in values for _, _, values in columns):
                cells = (format(values[size].mean, form) if size in values else "" for _, form, values in columns)
                shown.add_row(size.method, str(size.n_members), *cells)
        if shown.rows:
            console.print()
            console.print(shown)
        if results.caution:
            print_line(console, f"(!) {results.caution}")
        for table in tables:
            if table.conclusion and table.name in results.tables and (sentence := table.conclusion(results.tables[table.name])):
                print_line(console, sentence)


def _fresh_tables(store: Store, experiment: str, statuses: Sequence[Status], names: Collection[str]) -> dict[int, Results]:
    """Return the fresh tables of these names, by layer."""
    parts: dict[int, dict[str, list[pl.DataFrame]]] = {}
    for each in statuses:
        layer, name = each.partition.layer, each.declaration.address.name
        if each.state == "fresh" and each.declaration.address.kind == "eval" and layer is not None and name in names:
            parts.setdefault(layer, {}).setdefault(name, []).append(read_part(store.path(*each.where)))
    return {
        layer: Results(experiment, layer, {name: pl.concat(found) for name, found in tables.items()})
        for layer, tables in sorted(parts.items())
    }


def _print_warnings(store: Store, experiment: ExperimentSettings, statuses: Sequence[Status], console: Console) -> None:
    """Print the first warnings of the health checks of fresh artefacts, and the number of further warnings."""
    warnings = _warnings(store, experiment, statuses)
    for warning in warnings[:SHOWN_WARNINGS]:
        print_line(console, f"\nwarning: {warning}")
    if len(warnings) > SHOWN_WARNINGS:
        print_line(console, f"\nand {len(warnings) - SHOWN_WARNINGS} more warnings: the health checks in the UI show them")


def _warnings(store: Store, experiment: ExperimentSettings, statuses: Sequence[Status]) -> list[str]:
    """Return the warnings of the health checks of fresh artefacts."""
    fresh = [(each, store.require(*each.where)) for each in statuses if each.state == "fresh"]
    return [each for s, artefact in fresh for each in warnings_of(s.declaration, s.partition, artefact, experiment.checks)]


def _sizes(experiment: ExperimentSettings, method: str) -> list[int]:
    """Return the sizes of a method that are shown."""
    if method in BASELINES and BASELINES[method].is_sized:
        return experiment.expanded_widths
    return [experiment.ensemble.members if method in ENSEMBLES else 1]
