"""Means over seeds of evaluation tables on disk, a row for each experiment, layer, method and size: for the leaderboard and for sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean
from typing import Any, Literal

import polars as pl

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.registry import seed_column, table_frame
from saeens_pipeline.storage.names import ENSEMBLES, Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import read_part

Sizes = Literal["full", "all"]
_KEY = ["experiment", "source", "layer", "method", "n_members"]


def written(value: float, form: str) -> str:
    """Return a number in a format, powers of ten in short: `1.5e8`."""
    return re.sub(r"e\+?(-?)0*", r"e\1", format(value, form))


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, the 95% interval, and the points.

    The interval is Student's t, from three seeds: with two it is 12.7 standard errors wide to each side, and the points say more. A metric
    that compares seeds has a jackknife interval, or none.
    """

    mean: float
    low: float | None
    high: float | None
    points: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[float], *, compares_seeds: bool = False, left_out: Sequence[float] = ()) -> Spread:
        """Return mean, interval and points of a number's values, one per seed. Raises ValueError without values.

        `left_out`: the values without each seed, for the jackknife of a metric that compares seeds.
        """
        from saeens_models.metrics import jackknife_interval, mean_interval

        mean, low, high = mean_interval(points)
        if compares_seeds:
            mean, low, high = jackknife_interval(mean, left_out) if len(left_out) == len(points) > 2 else (mean, None, None)
        return cls(mean, *((low, high) if len(points) > 2 else (None, None)), tuple(points))

    @classmethod
    def of_column(cls, name: str, rows: pl.DataFrame) -> Spread | None:
        """Return the spread of a column over rows of different seeds; None if it has no finite value. Null values are left out."""
        points = _finite(rows, name)
        column = seed_column(name)
        if column is None or not column.compares_seeds:
            return cls.of(points) if points else None
        return cls.of(points, compares_seeds=True, left_out=_finite(rows, column.left_out)) if points else None

    @property
    def _interval(self) -> tuple[float, float] | None:
        return (self.low, self.high) if self.low is not None and self.high is not None else None

    @property
    def bar(self) -> tuple[float, float]:
        """Return the interval or, without one, the lowest and the highest point."""
        return self._interval or (min(self.points), max(self.points))

    def around(self, form: str) -> str:
        """Return the half width of the interval or, without one, the points."""
        if self._interval:
            half_width = self._interval[1] - self.mean
            return f"±{half_width:.1%}" if form.endswith("%") else f"±{written(half_width, '.2g')}"
        points = dict.fromkeys(written(point, form) for point in self.points)
        return ", ".join(points) if len(self.points) > 1 else ""


def _finite(rows: pl.DataFrame, name: str) -> list[float]:
    return rows[name].cast(float).drop_nulls().filter(rows[name].drop_nulls().is_finite()).to_list() if name in rows.columns else []


def measurements(store: Store, over: Declaration, columns: Mapping[str, Sequence[str]], sizes: Sizes = "full") -> pl.DataFrame:
    """Return the inputs of `over` that are on disk, a row for each experiment, layer, seed, method and size of `reconstruction`.

    `columns`: of each table, `reconstruction` first; null for missing tables. Ensembles have one row with all their members or, with
    `sizes="all"`, a row for the first n with every n; expanded SAEs have a row for each width.
    """
    parts = {name: [table_frame(name, []).select(pl.lit("").alias("source"), pl.all())] for name in columns}
    for _, table, _, artefact in over.optional_inputs(store, Partition()):
        assert isinstance(table, Declaration)
        if table.address.name not in parts:
            continue
        parts[table.address.name].append(read_part(artefact.path).select(pl.lit(table.source).alias("source"), pl.all()))
    tables = [pl.concat(found).select(*_KEY, "seed", *columns[name]) for name, found in parts.items()]
    measured = reduce(lambda one, other: one.join(other, on=[*_KEY, "seed"], how="left"), tables)
    measured = measured.filter(pl.col("explained_variance").is_not_nan())  # also drops null, of activations without variance
    of_all_members = pl.col("n_members") == pl.col("n_members").max().over("experiment", "layer", "method")
    return measured if sizes == "all" else measured.filter(of_all_members | ~pl.col("method").is_in(ENSEMBLES))


def over_seeds(measured: pl.DataFrame, metrics: Iterable[str], means: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each experiment, layer, method and size: `metrics` with mean, interval and points, `means` without the last two."""
    for of_seeds in measured.sort("seed").partition_by(_KEY, maintain_order=True):
        yield {
            **of_seeds.select(*_KEY, "language_model").row(0, named=True),
            "n_features": _rounded_mean(of_seeds["n_features"]),  # those of a consensus differ
            "n_seeds": len(of_seeds),
            "seeds": ",".join(map(str, of_seeds["seed"])),
            "sae_data_versions": ";".join(of_seeds["sae_data_versions"]),
            **{column: value for name in metrics for column, value in _statistics(name, of_seeds)},
            **of_seeds.select(means).mean().row(0, named=True),
        }


def _rounded_mean(counts: pl.Series) -> int | None:
    known = counts.drop_nulls().to_list()
    return round(fmean(known)) if known else None


def _statistics(name: str, of_seeds: pl.DataFrame) -> Iterator[tuple[str, float | str | None]]:
    """Yield (column, value) of a metric: mean, interval and points over seeds. A seed without a value has an empty point."""
    spread = Spread.of_column(name, of_seeds)
    yield from {name: spread and spread.mean, f"{name}_low": spread and spread.low, f"{name}_high": spread and spread.high}.items()
    yield f"{name}_by_seed", ",".join("" if point is None else str(point) for point in of_seeds[name]) if spread else None
