"""The summary at the end of `saeens run`: metrics of every method, warnings, and paths of the reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import polars as pl
from rich.console import Console
from rich.table import Table

from saeens_pipeline.assets.health import warnings_of
from saeens_pipeline.assets.staleness import Status
from saeens_pipeline.assets.tables import METHODS, TABLES, Headline, listed
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.orchestration.runs import Outcome, print_line
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root
from saeens_pipeline.storage.tables import read_part

SHOWN_WARNINGS = 5
_BESIDE = ("explained_variance", "stability")  # shown for the control, too, or for the experiment that this one controls


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print metrics, warnings, paths of report pages, and the time."""
    store = Store(data_root())
    _print_metrics(store, outcome, console)
    print_warnings(store, outcome.experiment, outcome.statuses, console)
    for pages, title in (
        (outcome.reports, "The report, to open in a browser"),
        (outcome.renewed, "It is the control of these reports, which now show it"),
    ):
        if pages:
            print_line(console, "\n" + "\n".join([f"{title}:", *(f"  {page}" for page in pages)]))
    print_line(console, f"\nTook {outcome.seconds:.0f} s. Everything lies below {store.root}; `saeens ui` opens the Dagster UI.")


def _headlines() -> Iterator[tuple[str, Headline]]:
    """Give the columns of the summary, each with its table."""
    for table in listed(over_experiments=False):
        yield from ((table.name, headline) for headline in table.headlines if headline.in_summary)


def _print_metrics(store: Store, outcome: Outcome, console: Console) -> None:
    """Print for each layer the metrics of each method at the full ensemble size, means over seeds, from fresh tables."""
    experiment, beside = outcome.experiment, outcome.beside
    for layer, of_layer in _fresh_tables(outcome.statuses).items():
        values = {headline.title: _by_method(store, of_layer, table, headline.column) for table, headline in _headlines()}
        forms = {headline.title: headline.form for _, headline in _headlines()}
        seeds = ", ".join(sorted({str(s.partition.seed) for s in of_layer if s.partition.seed is not None}, key=int))
        title = f"{experiment.name}, layer {layer}: mean over seeds {seeds}"
        others = _fresh_tables(beside.statuses).get(layer) if beside else None
        if beside and others:
            title += f"; {beside.language_model}: {beside.name}, the same on the language model with {beside.language_model} weights"
            for table, headline in _headlines():
                if headline.column in _BESIDE:
                    values[f"{headline.title}, {beside.language_model}"] = _by_method(store, others, table, headline.column)
                    forms[f"{headline.title}, {beside.language_model}"] = headline.form
        shown = Table("method", "n", title=title, title_justify="left", box=None, pad_edge=False)
        for name in values:
            shown.add_column(name, justify="right")
        sizes = {size for of_column in values.values() for size in of_column}
        for method in METHODS:
            for n in _sizes(experiment, method):
                if (method, n) in sizes:
                    shown.add_row(method, str(n), *(_cell(values[name].get((method, n)), form) for name, form in forms.items()))
        if shown.rows:
            console.print()
            console.print(shown)
        _print_suggested(_by_method(store, of_layer, "marginal_gain", "suggested"), experiment.ensemble.members, console)


def _print_suggested(suggested: Mapping[tuple[str, int], float | None], members: int, console: Console) -> None:
    """Print the suggested numbers of members, given by method and size."""
    of_all = {method: size for (method, n), size in suggested.items() if n == members and size is not None}
    if of_all:
        sizes = [
            f"{method} {of_all[method]:.0f}{' or more' if of_all[method] == members else ''}" for method in METHODS if method in of_all
        ]
        print_line(console, f"suggested ensemble size: {', '.join(sizes)} (eval/marginal_gain says what each member adds)")


def _fresh_tables(statuses: Sequence[Status]) -> dict[int, list[Status]]:
    """Return the fresh tables by layer."""
    fresh = [s for s in statuses if s.state == "fresh" and s.declaration.address.kind == "eval"]
    layers = sorted({s.partition.layer for s in fresh if s.partition.layer is not None})
    return {layer: [s for s in fresh if s.partition.layer == layer] for layer in layers}


def print_warnings(store: Store, experiment: ExperimentSettings, statuses: Sequence[Status], console: Console) -> None:
    """Print the first warnings of health checks of fresh artefacts, and the number of others."""
    warnings: list[str] = []
    for status in statuses:
        if status.state == "fresh":
            warnings += warnings_of(status.declaration, status.partition, store.require(*status.where), experiment.checks)
    for warning in warnings[:SHOWN_WARNINGS]:
        print_line(console, f"\nwarning: {warning}")
    if len(warnings) > SHOWN_WARNINGS:
        n_more = len(warnings) - SHOWN_WARNINGS
        print_line(console, f"\nand {n_more} more warnings: the health checks in the UI show them")


def _sizes(experiment: ExperimentSettings, method: str) -> list[int]:
    match method:
        case "bagging" | "boosting":
            return [experiment.ensemble.members]
        case "expanded" | "expanded_l0_matched":
            return experiment.expanded_widths
        case _:
            return [1]


def _by_method(store: Store, statuses: Sequence[Status], table: str, column: str) -> dict[tuple[str, int], float | None]:
    parts = [store.path(s.declaration.address, s.partition) for s in statuses if s.declaration.address.name == table]
    if not parts or table not in TABLES:
        return {}
    rows = with_totals(pl.concat([read_part(part) for part in parts]))
    means = rows.group_by("method", "n_members").agg(pl.col(column).mean())
    return {(row["method"], row["n_members"]): row[column] for row in means.iter_rows(named=True)}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
