"""The table at the end of a run, and tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.tables import read_table

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console
    from rich.table import Table

    from saeens_pipeline.components import ExperimentSettings

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


def print_summary(root: Path, experiment: ExperimentSettings, layers: Sequence[int], console: Console) -> None:
    """For each layer: method by metric at the full ensemble size, mean over seeds."""
    from rich.table import Table

    values = {title: _by_method(root, experiment.name, table, column) for title, (table, column, _) in COLUMNS.items()}
    seeds = ", ".join(map(str, experiment.ensemble.seeds))
    for layer in layers:
        shown = [(method, n) for method in METHODS for n in _sizes(experiment, method)]
        if not any((layer, method, n) in values["EV"] for method, n in shown):
            continue
        table = Table(
            "method",
            "n",
            title=f"{experiment.name}, layer {layer}: mean over seeds {seeds}",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for title in COLUMNS:
            table.add_column(title, justify="right")
        for method, n in shown:
            if (layer, method, n) in values["EV"]:
                cells = (_cell(values[title].get((layer, method, n)), form) for title, (_, _, form) in COLUMNS.items())
                table.add_row(method, str(n), *cells)
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


def _by_method(root: Path, experiment: str, table: str, column: str) -> dict[tuple[int, str, int], float | None]:
    import polars as pl

    try:
        frame = read_table(root, experiment, table)
    except SaeensError:  # this table was not asked for
        return {}
    means = frame.group_by("layer", "method", "n_members").agg(pl.col(column).mean())
    return {(row["layer"], row["method"], row["n_members"]): row[column] for row in means.iter_rows(named=True)}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
