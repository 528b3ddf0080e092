"""Ties: methods that the held-out documents cannot tell apart from the best, by the table `differences`."""

from __future__ import annotations

import polars as pl


def tied_with(differences: pl.DataFrame, metric: str, best: tuple[str, int], n_seeds: int) -> dict[tuple[str, int], bool]:
    """Return, by method and n_members, whether the documents fail to tell it apart from `best`.

    They tell it apart if the interval of the difference leaves out 0 in every seed, on the same side. differences: rows of one experiment
    and layer. Methods without an interval in each of the `n_seeds` seeds are left out.
    """
    names, others = ["method", "n_members"], ["other_method", "other_n_members"]
    side = (pl.col("low") > 0).cast(int) - (pl.col("high") < 0).cast(int)
    rows = differences.filter(metric=metric).select(*names, *others, "seed", side.alias("side")).drop_nulls("side")
    turned = rows.select(*(pl.col(a).alias(b) for a, b in zip(names + others, others + names, strict=True)), "seed", -pl.col("side"))
    of_best = pl.concat([rows, turned.select(rows.columns)]).filter(pl.struct(names) == pl.lit(dict(zip(names, best, strict=True))))
    found = of_best.unique([*others, "seed"]).group_by(others).agg(pl.col("side").sum().abs(), n=pl.len()).filter(n=n_seeds)
    return {(method, n): told < n_seeds for method, n, told in found.select(*others, "side").iter_rows()}
