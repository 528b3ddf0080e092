"""Means over seeds of evaluation tables on disk, a row for each experiment, layer, method and size: for the leaderboard and for sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import polars as pl

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.registry import table_frame
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import read_part

Sizes = Literal["full", "all"]
_KEY = ["experiment", "source", "layer", "method", "n_members"]


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
    return measured if sizes == "all" else measured.filter(of_all_members | ~pl.col("method").is_in(["bagging", "boosting"]))


def over_seeds(measured: pl.DataFrame, metrics: Iterable[str], means: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Give a row for each experiment, layer, method and size: `metrics` with mean, interval and points, `means` without the last two."""
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
    """Give the columns of a metric. A seed without a value has an empty point, and is left out of mean and interval."""
    from saeens_models.metrics import mean_interval

    there = [point for point in points if point is not None]
    yield from zip((name, f"{name}_low", f"{name}_high"), mean_interval(there) if there else (None, None, None), strict=True)
    yield f"{name}_by_seed", ",".join("" if point is None else str(point) for point in points) if there else None
