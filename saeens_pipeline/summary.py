"""The table at the end of a run, and tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console
    from rich.table import Table

    from saeens_pipeline.components import ExperimentSettings
    from saeens_pipeline.plan import Status
    from saeens_pipeline.storage.recipes import Store

METHODS = ("single", "bagging", "boosting", "expanded", "expanded_l0_matched")
# column of the summary: its table, its column there, its format
COLUMNS = {
    "EV": ("reconstruction", "explained_variance", ".4f"),
    "MSE": ("reconstruction", "mse", ".4g"),
    "L0": ("reconstruction", "l0", ".1f"),
    "features": ("reconstruction", "n_features", ".0f"),
    "connectivity": ("coactivation", "connectivity", ".4f"),
    "stability": ("stability", "stability", ".4f"),
    "train seconds": ("cost", "train_seconds", ".1f"),
}


def print_summary(store: Store, experiment: ExperimentSettings, statuses: Sequence[Status], console: Console) -> None:
    """For each layer: method by metric at the full ensemble size, mean over seeds. Tables that are not fresh are left out."""
    from rich.table import Table

    fresh = [s for s in statuses if s.state == "fresh" and s.declaration.address.kind == "eval"]
    for layer in sorted({s.partition.layer for s in fresh if s.partition.layer is not None}):
        of_layer = [s for s in fresh if s.partition.layer == layer]
        values = {title: _by_method(store, of_layer, table, column) for title, (table, column, _) in COLUMNS.items()}
        seeds = ", ".join(sorted({str(s.partition.seed) for s in of_layer if s.partition.seed is not None}, key=int))
        title = f"{experiment.name}, layer {layer}: mean over seeds {seeds}"
        table = Table("method", "n", title=title, title_justify="left", box=None, pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for method in METHODS:
            for n in _sizes(experiment, method):
                if (method, n) in values["EV"]:
                    table.add_row(method, str(n), *(_cell(values[name].get((method, n)), form) for name, (_, _, form) in COLUMNS.items()))
        if table.rows:
            console.print()
            console.print(table)


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
    if method == "single":
        return [1]
    return experiment.expanded_widths if method.startswith("expanded") else [experiment.ensemble.members]


def _by_method(store: Store, statuses: Sequence[Status], table: str, column: str) -> dict[tuple[str, int], float | None]:
    import polars as pl

    parts = [store.path(s.declaration.address, s.partition) for s in statuses if s.declaration.address.name == table]
    if not parts:
        return {}
    rows = pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts])
    means = rows.group_by("method", "n_members").agg(pl.col(column).mean())
    return {(row["method"], row["n_members"]): row[column] for row in means.iter_rows(named=True)}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
