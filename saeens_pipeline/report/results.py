"""The tables of one experiment and layer that are on disk, their means and intervals over seeds, and the comparison with the control."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from saeens_pipeline.assets.massive_activations import SHARE, caution
from saeens_pipeline.assets.over_seeds import Spread
from saeens_pipeline.assets.registry import Headline, listed, seed_column
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.report.methods import Method, in_order, method
from saeens_pipeline.report.metrics import CE, EQUAL_STABILITY, EV, METRICS, STABILITY
from saeens_pipeline.storage.tables import has_table, read_table


class Size(NamedTuple):
    """A method and its size: the number of members of an ensemble, or the number of members whose width an expanded SAE has."""

    method: str
    n_members: int


@dataclass(frozen=True)
class Results:
    """The tables by name, with the rows of one layer and of the declared seeds. `missing`: names of tables that are not on disk.

    Large tables, such as the text of single features, are in neither: the feature browser alone reads them, one seed at a time.
    """

    experiment: str
    layer: int
    tables: Mapping[str, pl.DataFrame]
    missing: tuple[str, ...] = ()
    _columns: dict[tuple[str, str], dict[Size, Spread]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, root: Path, experiment: str, layer: int, seeds: Iterable[int]) -> Results:
        """Read the tables of one layer. Raises SaeensError for a table that cannot be read."""
        declared, names = list(seeds), [table.name for table in listed(over_experiments=False) if not table.is_large]
        tables = {
            name: rows
            for name in names
            if has_table(root, experiment, name, layer)
            and len(rows := read_table(root, experiment, name, layer).filter(pl.col("seed").is_in(declared)))
        }
        return cls(experiment, layer, tables, tuple(name for name in names if name not in tables))

    def spreads(self, table: str, column: str) -> dict[Size, Spread]:
        """Return a column, or one of the table's totals, by method and size; empty where it has no value."""
        if (table, column) not in self._columns:
            rows = with_totals(self.tables[table]) if table in self.tables else None
            self._columns[table, column] = spreads(rows, column) if rows is not None and column in rows.columns else {}
        return self._columns[table, column]

    @property
    def caution(self) -> str:
        """Return a sentence if a few rows hold so much of the variance that explained variance is about them; otherwise nothing."""
        return caution(spread.mean for spread in self.spreads("reconstruction", SHARE).values())

    def of(self, metric: Headline) -> dict[Size, Spread]:
        """Return a metric by method and size."""
        return self.spreads(metric.table, metric.column)

    def full(self, metric: Headline) -> dict[str, Spread]:
        """Return a metric of every method at its full size."""
        found = self.of(metric)
        return {size.method: found[size] for size in self.full_sizes if size in found}

    @cached_property
    def full_sizes(self) -> list[Size]:
        """Return every method that has a metric of the main table, at its largest size."""
        sizes: dict[str, int] = {}
        for size in (size for metric in METRICS for size in self.of(metric)):
            sizes[size.method] = max(size.n_members, sizes.get(size.method, 0))
        return [Size(name, sizes[name]) for name in in_order(sizes)]

    @cached_property
    def methods(self) -> list[str]:
        """Return every method of any table."""
        return in_order(name for rows in self.tables.values() for name in rows["method"].unique())

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for rows in self.tables.values() for seed in rows["seed"].unique()})

    @property
    def example(self) -> tuple[str, int, Size] | None:
        """Return table, seed and size of a row as an example for `saeens lineage`, of boosting if possible."""
        for table, rows in self.tables.items():
            order = [pl.col("method") == "boosting", pl.col("n_members"), pl.col("seed")]
            first = rows.sort(order, descending=[True, True, False]).row(0, named=True)
            return table, first["seed"], Size(first["method"], first["n_members"])
        return None


def spreads(rows: pl.DataFrame, column: str, by: str = "n_members") -> dict[Size, Spread]:
    """Return the mean of a column over seeds, by method and size. Values that are null or not finite are left out; several values of one
    seed count as their mean. `by` is the column that holds the size.
    """
    named = seed_column(column)
    names = [column, named.left_out] if named and named.left_out in rows.columns else [column]
    there = rows.filter(pl.col(column).cast(float).is_finite()).with_columns(pl.col(names).cast(float))
    of_seeds = there.group_by("method", by, "seed").agg(pl.col(names).mean()).sort("method", by, "seed")
    groups = of_seeds.partition_by("method", by, as_dict=True, maintain_order=True)
    found = {Size(str(name), size): Spread.of_column(column, group) for (name, size), group in groups.items()}
    return {size: spread for size, spread in found.items() if spread}


def spread_of_row(row: Mapping[str, Any], name: str) -> Spread | None:
    """Return mean, interval and points of a metric from a row of a table over seeds; None without a finite point."""
    points = row.get(f"{name}_by_seed") or ""
    finite = [value for point in points.split(",") if point and math.isfinite(value := float(point))]
    return Spread(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"), tuple(finite)) if finite else None


@dataclass(frozen=True)
class Comparison:
    """A metric of every method, on the trained language model and on the untrained control of the same shape."""

    title: str
    rows: Sequence[tuple[Method, Spread, Spread]]

    def of(self, about: Method) -> tuple[Spread, Spread] | tuple[None, None]:
        """Return both spreads of a method, or None twice where either is missing."""
        return next(((ours, theirs) for each, ours, theirs in self.rows if each == about), (None, None))

    @property
    def same_order(self) -> bool:
        """Return True if both models rank the methods alike."""
        return sorted(self.rows, key=lambda row: -row[1].mean) == sorted(self.rows, key=lambda row: -row[2].mean)


def compare(trained: Results, untrained: Results) -> Iterator[Comparison]:
    """Yield each metric that both have, of the methods that both have."""
    for metric in (EV, CE, STABILITY, EQUAL_STABILITY):
        ours, theirs = trained.full(metric), untrained.full(metric)
        if both := in_order(ours.keys() & theirs.keys()):
            yield Comparison(metric.name, [(method(name), ours[name], theirs[name]) for name in both])
