"""Output of the commands: two consoles, messages, and tables for programs and terminals."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saeens_pipeline.errors import printable

if TYPE_CHECKING:
    import polars as pl

_PIPE_WIDTH = 1000  # columns without a terminal, so that tables in files are not wrapped
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)


def _names_beginning_with(incomplete: str) -> list[str]:
    """Return names of experiments, sweeps and followed sets, for the completion of a shell."""
    from saeens_pipeline.assets.catalogue import Experiments

    found = Experiments.load()
    return sorted(name for name in {*found.experiments, *found.sweeps, *found.following} if name.startswith(incomplete))


ExperimentName = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT", help="Name of an experiment; `saeens experiments` lists them.", autocompletion=_names_beginning_with
    ),
]
DictionaryName = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="An SAE or an ensemble on disk: EXPERIMENT/bagging:layer=L,seed=S or /boosting, /consensus, /bagging/member_1, "
        "/baseline/expanded; or a data version, at least its first 4 digits.",
    ),
]
LayerOption = Annotated[list[int] | None, typer.Option("--layer", help="Only this layer; may be given several times.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Another value of a field of the experiment file for this command, such as sae.k=8 or ensemble.seeds=[42,43]; "
        "may be given several times.",
    ),
]
Format = Literal["table", "csv", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="csv and json print the table and nothing else.")]


def print_line(text: str) -> None:
    """Print a line on standard output unchanged, without escape sequences."""
    out.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def notify(label: str, message: str) -> None:
    """Print a message on standard error, without markup and escape sequences; a terminal gets it wrapped between words."""
    err.print(Text.assemble((f"{label}: ", "red"), printable(message)), soft_wrap=not err.is_terminal)


def print_data(frame: pl.DataFrame, format: Format) -> bool:
    """Print a table as CSV or JSON, and nothing else, if that is the format. Return whether it is.

    In CSV the entries of a list have commas between them.
    """
    if format == "csv":
        import polars as pl
        from polars import selectors

        sys.stdout.write(frame.with_columns(selectors.list().cast(pl.List(pl.String)).list.join(", ")).write_csv())
    elif format == "json":
        sys.stdout.write(frame.write_json() + "\n")
    return format != "table"


def print_rows(rows: Sequence[Mapping[str, Any]], headings: Sequence[str], format: Format) -> None:
    """Print rows with values for these headings: as a table for the terminal, as CSV, or as JSON, with _ for spaces in the names."""
    if format == "table":
        table = grid(*headings)
        for row in rows:
            table.add_row(*(Text(_shown(row[heading])) for heading in headings))
        out.print(table)
        return
    import polars as pl

    print_data(pl.DataFrame({heading.replace(" ", "_"): [row[heading] for row in rows] for heading in headings}), format)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return ("yes" if value else "") if isinstance(value, bool) else printable(str(value))


def grid(*headings: str, **options: Any) -> Table:
    """Return an empty table for the terminal, without lines; `options` are those of rich."""
    return Table(*headings, box=None, pad_edge=False, title_justify="left", **options)


def rich_table(frame: pl.DataFrame, title: str | None = None) -> Table:
    """Return a data frame as a table for the terminal, numbers to four digits."""
    table = grid(title=Text(title) if title else None)
    for name, dtype in frame.schema.items():
        table.add_column(name, justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.iter_rows():
        table.add_row(*("" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(str(value)) for value in row))
    return table
