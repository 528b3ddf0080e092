"""Evaluation tables on disk: columns with units, and paths of partitions. `assets/tables` declares the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.names import validate_name

ColumnType = Literal["str", "int", "float"]


@dataclass(frozen=True)
class Column:
    """One column of a table: name, type, and meaning with unit."""

    name: str
    type: ColumnType
    description: str
    from_columns: tuple[str, ...] = ()
    """Columns of other tables that this column is computed from, if their names differ."""
    less_is_better: bool = False
    """True: the leaderboard ranks small values first."""
    compares_seeds: bool = False
    """True: the values of several seeds are not independent, since each compares its seed with the others: no Student's t."""
    left_out: str = ""
    """The column with the value that is left without a seed, for the jackknife; without one, what compares seeds has no interval."""


def frame(table: str, columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Return rows as a data frame with exactly these columns. Raises ValueError for rows with other columns."""
    types = {"str": pl.String, "int": pl.Int64, "float": pl.Float64}
    rows = list(rows)
    unknown = {name for row in rows for name in row} - {column.name for column in columns}
    if unknown:
        raise ValueError(f"table {table} has no column {', '.join(sorted(unknown))}")
    return pl.DataFrame(
        [{column.name: row.get(column.name) for column in columns} for row in rows],
        schema={column.name: types[column.type] for column in columns},
        orient="row",
    )


def has_table(root: Path, experiment: str, table: str, layer: int | None = None) -> bool:
    """Return True if at least one partition of a table is on disk; with `layer`, at least one of that layer."""
    return bool(_parts(root, experiment, table, layer))


def layers_with_tables(root: Path, experiment: str) -> list[int]:
    """Return the layers with a folder of any table."""
    names = {path.name.removeprefix("layer=") for path in (root / "tables" / experiment).glob("*/layer=*")}
    return sorted(int(name) for name in names if name.isdecimal())


def read_table(root: Path, experiment: str, table: str, layer: int | None = None) -> pl.DataFrame:
    """Return all partitions of a table of an experiment, or those of one layer. Raises SaeensError if there are none."""
    parts = _parts(root, experiment, table, layer)
    if not parts:
        raise SaeensError(f"{experiment} has no table {table} below {root} yet: `saeens run {experiment}` computes it")
    return pl.concat([read_part(part) for part in parts]).sort("layer", "seed", "method", "n_members", maintain_order=True)


def _parts(root: Path, experiment: str, table: str, layer: int | None) -> list[Path]:
    folder = root / "tables" / validate_name(experiment) / validate_name(table)
    return sorted(folder.glob("**/part.parquet" if layer is None else f"layer={layer}/**/part.parquet"))


def read_part(part: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return one partition of a table, or some of its columns. Raises SaeensError for a file that cannot be read."""
    try:
        return pl.read_parquet(part, columns=list(columns) if columns else None, hive_partitioning=False, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SaeensError(f"{part} cannot be read ({error}): remove it and run again") from error
