"""What the command line prints: the table at the end of a run, with warnings; tables; states; lineage as a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from saeens_pipeline.storage.tables import METHODS, with_totals

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console
    from rich.table import Table
    from rich.tree import Tree

    from saeens_pipeline.assets.forecast import Line
    from saeens_pipeline.assets.lineage import Ancestor
    from saeens_pipeline.assets.staleness import Status
    from saeens_pipeline.settings import ExperimentSettings
    from saeens_pipeline.storage.recipes import Store

SHOWN_WARNINGS = 5
_NOTE_CHARACTERS = 60  # of a plan's note; what is longer, and said of several lines, stands below them
STATE_COLOURS = {"fresh": "green", "stale": "yellow", "damaged": "red", "missing": "red", "running": "blue", "failed": "red"}
# column of the summary: its table, its column there, its format
COLUMNS = {
    "EV": ("reconstruction", "explained_variance", ".4f"),
    "MSE": ("reconstruction", "mse", ".4g"),
    "CE rec.": ("reconstruction", "ce_loss_recovered", ".4f"),
    "bits": ("reconstruction", "description_length_bits", ".0f"),
    "L0": ("reconstruction", "l0", ".1f"),
    "features": ("reconstruction", "n_features", ".0f"),
    "connectivity": ("coactivation", "connectivity", ".4f"),
    "stability": ("stability", "stability", ".4f"),
    "FLOPs": ("cost", "total_flops", ".2g"),
    "seconds": ("cost", "total_seconds", ".1f"),
}
BESIDE = ("EV", "stability")  # of the same experiment on the untrained, or the trained, language model


class Beside(NamedTuple):
    """The same experiment on a language model with other weights: the control, or what is controlled."""

    name: str
    language_model: str
    statuses: Sequence[Status]


def print_summary(
    store: Store, experiment: ExperimentSettings, statuses: Sequence[Status], console: Console, beside: Beside | None = None
) -> None:
    """For each layer: method by metric at the full ensemble size, mean over seeds. Tables that are not fresh are left out."""
    from rich.table import Table

    for layer, of_layer in _fresh_tables(statuses).items():
        values = {title: _by_method(store, of_layer, table, column) for title, (table, column, _) in COLUMNS.items()}
        forms = {title: form for title, (_, _, form) in COLUMNS.items()}
        seeds = ", ".join(sorted({str(s.partition.seed) for s in of_layer if s.partition.seed is not None}, key=int))
        title = f"{experiment.name}, layer {layer}: mean over seeds {seeds}"
        others = _fresh_tables(beside.statuses).get(layer) if beside else None
        if beside and others:
            title += f"; {beside.language_model}: {beside.name}, the same on the language model with {beside.language_model} weights"
            for name in BESIDE:
                table, column, form = COLUMNS[name]
                values[f"{name}, {beside.language_model}"] = _by_method(store, others, table, column)
                forms[f"{name}, {beside.language_model}"] = form
        table = Table("method", "n", title=title, title_justify="left", box=None, pad_edge=False)
        for name in values:
            table.add_column(name, justify="right")
        for method in METHODS:
            for n in _sizes(experiment, method):
                if (method, n) in values["EV"]:
                    table.add_row(method, str(n), *(_cell(values[name].get((method, n)), form) for name, form in forms.items()))
        if table.rows:
            console.print()
            console.print(table)
        _print_suggested(_by_method(store, of_layer, "marginal_gain", "suggested"), experiment.ensemble.members, console)
    print_warnings(store, experiment, statuses, console)


def _print_suggested(suggested: Mapping[tuple[str, int], float | None], members: int, console: Console) -> None:
    """By method and size, how many members are enough."""
    of_all = {method: size for (method, n), size in suggested.items() if n == members and size is not None}
    if of_all:
        sizes = [
            f"{method} {of_all[method]:.0f}{' or more' if of_all[method] == members else ''}" for method in METHODS if method in of_all
        ]
        console.print(f"suggested ensemble size: {', '.join(sizes)} (eval/marginal_gain says what each member adds)", highlight=False)


def _fresh_tables(statuses: Sequence[Status]) -> dict[int, list[Status]]:
    """The tables that are fresh, by layer."""
    fresh = [s for s in statuses if s.state == "fresh" and s.declaration.address.kind == "eval"]
    layers = sorted({s.partition.layer for s in fresh if s.partition.layer is not None})
    return {layer: [s for s in fresh if s.partition.layer == layer] for layer in layers}


def print_warnings(store: Store, experiment: ExperimentSettings, statuses: Sequence[Status], console: Console) -> None:
    """What the checks found in fresh artefacts: the first few in words, the others as a number."""
    from saeens_pipeline.assets.health import warnings_of

    warnings: list[str] = []
    for status in statuses:
        if status.state == "fresh":
            warnings += warnings_of(status.declaration, status.partition, store.require(*status.where), experiment.checks)
    for warning in warnings[:SHOWN_WARNINGS]:
        console.print(f"\nwarning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if len(warnings) > SHOWN_WARNINGS:
        n_more = len(warnings) - SHOWN_WARNINGS
        console.print(f"\nand {n_more} more warnings: the checks of each asset, in the UI, show them", highlight=False)


def status_frame(statuses: Sequence[Status]) -> pl.DataFrame:
    """Asset, layer, seed, state and why, one row for each artefact."""
    import polars as pl

    rows = [(str(s.declaration.address), *s.partition, s.state, s.reason) for s in statuses]
    schema = {"asset": pl.String, "layer": pl.Int64, "seed": pl.Int64, "state": pl.String, "why": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def status_table(statuses: Sequence[Status]) -> Table:
    """The same for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table("asset", "layer", "seed", "state", "why", box=None, pad_edge=False)
    for status in statuses:
        layer, seed = ("" if value is None else str(value) for value in status.partition)
        table.add_row(str(status.declaration.address), layer, seed, Text(status.state, STATE_COLOURS[status.state]), Text(status.reason))
    return table


def lineage_tree(ancestor: Ancestor) -> Tree:
    """A lineage for the terminal, from what was asked for down to where it comes from."""
    from rich.text import Text
    from rich.tree import Tree

    label = Text.assemble(
        (f"{ancestor.role}: " if ancestor.role else "", "dim"),
        (ancestor.title, "bold"),
        (f"  {ancestor.data_version}", "cyan"),
        (" (see above)" if ancestor.shown_before else "", "dim"),
        *((f"\n{fact}", "dim") for fact in ancestor.facts),
        *(((f"\n{ancestor.problem}", "red"),) if ancestor.problem else ()),
    )
    tree = Tree(label)
    for parent in ancestor.parents:
        tree.children.append(lineage_tree(parent))
    return tree


def forecast_table(name: str, lines: Sequence[Line]) -> Table:
    """A plan for the terminal, section by section."""
    from rich.table import Table
    from rich.text import Text

    from saeens_pipeline.assets.forecast import UTILISATION, readable

    title = f"{name}, everything from nothing; time at {UTILISATION:.0%} of the published speed"
    table = Table("", "", "", "", box=None, pad_edge=False, show_header=False, title=title, title_justify="left")
    notes = Counter(line.note for line in lines)
    said_below = [note for note, n in notes.items() if n > 1 and len(note) > _NOTE_CHARACTERS]  # why all of these are not known
    for before, line in zip([None, *lines], lines, strict=False):
        section = "" if before and before.section == line.section else line.section
        note = "see below" if line.note in said_below else line.note
        table.add_row(section, Text(line.item), Text(readable(line), justify="right"), Text(note))
    if said_below:
        table.caption, table.caption_justify = Text("\n".join(said_below)), "left"
    return table


def rich_table(frame: pl.DataFrame) -> Table:
    """A data frame for the terminal, numbers to four digits."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, dtype in frame.schema.items():
        table.add_column(name, justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.iter_rows():
        table.add_row(*("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    return table


def _sizes(experiment: ExperimentSettings, method: str) -> list[int]:
    match method:
        case "bagging" | "boosting":
            return [experiment.ensemble.members]
        case "expanded" | "expanded_l0_matched":
            return experiment.expanded_widths
        case _:
            return [1]


def _by_method(store: Store, statuses: Sequence[Status], table: str, column: str) -> dict[tuple[str, int], float | None]:
    import polars as pl

    parts = [store.path(s.declaration.address, s.partition) for s in statuses if s.declaration.address.name == table]
    if not parts:
        return {}
    rows = with_totals(pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts]))
    means = rows.group_by("method", "n_members").agg(pl.col(column).mean())
    return {(row["method"], row["n_members"]): row[column] for row in means.iter_rows(named=True)}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
