"""Means over seeds of evaluation tables on disk, a row for each experiment, layer, method and size: for the leaderboard and for sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import polars as pl

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.registry import table_frame
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
    """A number over seeds: its mean, the 95% interval (Student's t), and the points.

    With one seed there is no interval. With two it is so wide that the points say more: it is shown with three and more.
    """

    mean: float
    low: float | None
    high: float | None
    points: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[float]) -> Spread:
        """Return mean, interval and points of a number's values, one per seed. Raises ValueError without values."""
        from saeens_models.metrics import mean_interval

        return cls(*mean_interval(points), tuple(points))

    @property
    def _interval(self) -> tuple[float, float] | None:
        return (self.low, self.high) if len(self.points) > 2 and self.low is not None and self.high is not None else None

    @property
    def bar(self) -> tuple[float, float]:
        """Return the interval or, with fewer than three seeds, the lowest and the highest point."""
        return self._interval or (min(self.points), max(self.points))

    def around(self, form: str) -> str:
        """Return the half width of the interval or, with two seeds, the points: Student's t of two is 12.7 standard errors to each side."""
        if self._interval:
            half_width = self._interval[1] - self.mean
            return f"±{half_width:.1%}" if form.endswith("%") else f"±{written(half_width, '.2g')}"
        points = dict.fromkeys(written(point, form) for point in self.points)
        return ", ".join(points) if len(self.points) == 2 else ""


def measurements(store: Store, over: Declaration, columns: Mapping[str, Sequence[str]], sizes: Sizes = "full") -> pl.DataFrame:
    """Return the inputs of `over` that are on disk, a row for each experiment, layer, seed, method and size of `reconstruction`.

    `columns`: of each table, `reconstruction` first; null for missing tables. Ensembles have one row with all their members or, with
    `sizes="all"`, a row for the first n with every n; expanded SAEs have a row for each width.
    """
    parts = {name: [table_frame(name, []).select(pl.lit("").alias("source"), pl.all())] for name in columns}
    for _, table, _, artefact in over.optional_inputs(store, Partition()):
        assert isinstance(table, Declaration)
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
            **of_seeds.select(*_KEY, "language_model", "n_features").row(0, named=True),
            "n_seeds": len(of_seeds),
            "seeds": ",".join(map(str, of_seeds["seed"])),
            "sae_data_versions": ";".join(of_seeds["sae_data_versions"]),
            **{column: value for name in metrics for column, value in _statistics(name, of_seeds[name].to_list())},
            **of_seeds.select(means).mean().row(0, named=True),
        }


def _statistics(name: str, points: Sequence[float | None]) -> Iterator[tuple[str, float | str | None]]:
    """Yield (column, value) of a metric: mean, interval and points over seeds. A seed without a value has an empty point."""
    there = [point for point in points if point is not None]
    spread = Spread.of(there) if there else None
    yield from {name: spread and spread.mean, f"{name}_low": spread and spread.low, f"{name}_high": spread and spread.high}.items()
    yield f"{name}_by_seed", ",".join("" if point is None else str(point) for point in points) if there else None
