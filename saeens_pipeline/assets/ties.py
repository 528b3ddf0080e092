"""Ties: methods that the held-out documents cannot tell apart from the best, by the table `differences`."""

from __future__ import annotations

import polars as pl


def tied_with(differences: pl.DataFrame, metric: str, best: tuple[str, int], n_seeds: int) -> dict[tuple[str, int], bool]:
    """Return, by method and n_members, whether 0 is in the interval of the difference to `best` in every seed.

    differences: rows of one experiment and layer. Methods without an interval in each of the `n_seeds` seeds are left out.
    """
    names, others = ["method", "n_members"], ["other_method", "other_n_members"]
    has_zero = ((pl.col("low") <= 0) & (pl.col("high") >= 0)).alias("has_zero")
    rows = differences.filter(metric=metric).select(*names, *others, "seed", has_zero).drop_nulls("has_zero")
    turned = rows.select(*(pl.col(a).alias(b) for a, b in zip(names + others, others + names, strict=True)), "seed", "has_zero")
    of_best = pl.concat([rows, turned.select(rows.columns)]).filter(pl.struct(names) == pl.lit(dict(zip(names, best, strict=True))))
    found = of_best.unique([*others, "seed"]).group_by(others).agg(pl.col("has_zero").all(), n=pl.len()).filter(n=n_seeds)
    return {(method, n): tied for method, n, tied in found.select(*others, "has_zero").iter_rows()}
