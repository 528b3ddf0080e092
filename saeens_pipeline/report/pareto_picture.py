"""The picture of a sweep: for each layer, explained variance against L0 and against description length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from saeens_pipeline.report.charts import LINE, Axis, Chart, Series
from saeens_pipeline.report.methods import method
from saeens_pipeline.report.metrics import BITS, EV, L0, Metric
from saeens_pipeline.report.pictures import as_png
from saeens_pipeline.report.results import spread_of_points

if TYPE_CHECKING:
    from saeens_pipeline.assets.tables.pareto import Sweep

INCHES = (5, 4)


def draw(table: pl.DataFrame, sweep: Sweep) -> bytes:
    """Return a PNG of rows of the table `pareto`: means over seeds, joined in the order of the sweep's values, with bars for the seeds."""
    layers = sorted(set(table["layer"]))
    rows = [[_chart(table.filter(layer=layer), spent, f"layer {layer}") for spent in (L0, BITS)] for layer in layers]
    empty = [[_chart(table, spent, "") for spent in (L0, BITS)]]
    return as_png(rows or empty, INCHES, f"{sweep.name}: {sweep.field} {', '.join(f'{value:g}' for value in sweep.values.values())}")


def _chart(table: pl.DataFrame, spent: Metric, title: str) -> Chart:
    known = table.drop_nulls(spent.column)
    series: list[Series] = []
    for (name, n), rows in known.sort("value").partition_by("method", "n_members", as_dict=True, maintain_order=True).items():
        several = known.filter(method=name)["n_members"].n_unique() > 1
        label = f"{method(name).label} ({n})" if several else ""
        x, y = rows[spent.column].to_list(), rows[EV.column].to_list()
        series.append(Series(method(name), x, y, LINE, _bars(rows, spent), _bars(rows, EV), label=label))
    return Chart(spent.column, title, "", Axis(spent.name, log=spent.log), Axis(EV.name), series)


def _bars(rows: pl.DataFrame, metric: Metric) -> list[tuple[float, float]]:
    points = rows.select(metric.column, f"{metric.column}_by_seed").iter_rows()
    return [spread.bar if (spread := spread_of_points(by_seed)) else (mean, mean) for mean, by_seed in points]
