"""The tables of one experiment and layer, as far as they are on disk, and their means and intervals over seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from saeens_pipeline.assets.tables import listed as listed_tables
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.report.methods import in_order
from saeens_pipeline.storage.tables import has_table, read_table

if TYPE_CHECKING:
    import polars as pl


class Size(NamedTuple):
    """A method, and how many SAEs it consists of, or is as wide as."""

    method: str
    n_members: int


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, the 95% interval (Student's t), and the points in the order of `seeds`.

    With one seed there is no interval. With two it is so wide that the points say more: `has_interval` is for three and more.
    """

    mean: float
    low: float | None
    high: float | None
    points: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, points: Sequence[float], seeds: Sequence[int]) -> Spread:
        """Raises ValueError without points."""
        from saeens_models.metrics import mean_interval

        return cls(*mean_interval(points), tuple(points), tuple(seeds))

    @property
    def has_interval(self) -> bool:
        return len(self.points) > 2 and self.low is not None and self.high is not None

    @property
    def bar(self) -> tuple[float, float]:
        """What is drawn around the mean: the interval or, with fewer than three seeds, from the lowest point to the highest."""
        if self.has_interval and self.low is not None and self.high is not None:
            return self.low, self.high
        return min(self.points), max(self.points)

    def is_above(self, other: Spread) -> bool:
        """Whether seeds do not blur the difference: intervals that do not overlap or, with fewer than three seeds, all points above."""
        return self.bar[0] > other.bar[1]


@dataclass(frozen=True)
class Results:
    """The tables by name, with the rows of one layer and of the seeds that are declared. `missing`: tables that are not on disk.

    Without the table of contexts.
    """

    experiment: str
    layer: int
    tables: Mapping[str, pl.DataFrame]
    missing: tuple[str, ...] = ()
    _columns: dict[tuple[str, str], dict[Size, Spread]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, root: Path, experiment: str, layer: int, seeds: Iterable[int]) -> Results:
        """What there is of one layer. Raises SaeensError for a table that cannot be read."""
        import polars as pl

        declared, names = list(seeds), [table.name for table in listed_tables(over_experiments=False)]
        tables = {
            name: rows
            for name in names
            if name != "contexts"  # text of single features, and large
            and has_table(root, experiment, name, layer)
            and len(rows := read_table(root, experiment, name, layer).filter(pl.col("seed").is_in(declared)))
        }
        return cls(experiment, layer, tables, tuple(name for name in names if name not in {"contexts", *tables}))

    def spreads(self, table: str, column: str) -> dict[Size, Spread]:
        """A column, or one of the table's totals, by method and size; empty where the table, the column or all its values are missing."""
        if (table, column) not in self._columns:
            rows = with_totals(self.tables[table]) if table in self.tables else None
            self._columns[table, column] = spreads(rows, column) if rows is not None and column in rows.columns else {}
        return self._columns[table, column]

    @cached_property
    def full_sizes(self) -> list[Size]:
        """Every method that was measured, at its largest size, in the order in which methods are explained."""
        for table in ("reconstruction", "coactivation", "stability", "cost"):
            if table in self.tables:
                largest = self.tables[table].group_by("method").agg(n=_col("n_members").max())
                sizes = dict(largest.iter_rows())
                return [Size(name, sizes[name]) for name in in_order(sizes)]
        return []

    @cached_property
    def methods(self) -> list[str]:
        """Every method of any table."""
        return in_order(name for rows in self.tables.values() for name in rows["method"].unique())

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for rows in self.tables.values() for seed in rows["seed"].unique()})

    @property
    def example(self) -> tuple[str, int, Size] | None:
        """A table with a row of it, by seed and size, to show how a number is asked for: boosting's where there is one."""
        for table, rows in self.tables.items():
            largest = rows.sort(_col("method") == "boosting", "n_members", "seed", descending=[True, True, False]).row(0, named=True)
            return table, largest["seed"], Size(largest["method"], largest["n_members"])
        return None

    def full(self, table: str, column: str) -> dict[str, Spread]:
        """A column of every method at its largest size."""
        found = self.spreads(table, column)
        return {size.method: found[size] for size in self.full_sizes if size in found}


def spreads(rows: pl.DataFrame, column: str) -> dict[Size, Spread]:
    """By method and size, a column over seeds. What is null, or not finite, is left out."""
    there = rows.select("method", "n_members", "seed", value=_col(column).cast(float)).filter(_col("value").is_finite())
    of_seeds = there.group_by("method", "n_members", "seed").agg(_col("value").mean()).sort("method", "n_members", "seed")
    parts = of_seeds.partition_by("method", "n_members", as_dict=True, maintain_order=True)
    return {Size(*key): Spread.of(part["value"].to_list(), part["seed"].to_list()) for key, part in parts.items()}  # pyright: ignore[reportArgumentType]


def written(value: float, form: str) -> str:
    """A number in a format, powers of ten in short: `1.5e8`."""
    return re.sub(r"e\+?(-?)0*", r"e\1", format(value, form))


def _col(name: str) -> pl.Expr:
    import polars as pl

    return pl.col(name)
