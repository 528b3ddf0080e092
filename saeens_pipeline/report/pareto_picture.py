"""The picture of a sweep: a row of axes per layer, explained variance against L0 and against description length."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from saeens_pipeline.storage.tables import METHODS

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from saeens_pipeline.assets.tables.pareto import Sweep

# Okabe and Ito's colours without the yellow, which is faint on white; markers tell methods apart in black and white, too.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#e69f00", "#cc79a7")
_STYLES = dict(zip(METHODS, zip(_COLOURS, "oos^vDP", strict=True), strict=True))
_SPENT = {"l0": "L0 [features per token]", "description_length_bits": "description length [bits per token]"}


def draw(table: pl.DataFrame, sweep: Sweep) -> bytes:
    """A PNG of rows of the table `pareto`. Means are joined by lines in the order of the sweep's values; small points are the seeds."""
    from matplotlib.figure import Figure

    layers = sorted(set(table["layer"])) or [None]
    figure = Figure(figsize=(10, 4 * len(layers)), dpi=100, layout="constrained")
    for row, layer in zip(figure.subplots(len(layers), 2, squeeze=False), layers, strict=True):
        for axes, spent in zip(row, _SPENT, strict=True):
            _draw_methods(axes, table.filter(layer=layer) if layer is not None else table, spent)
            axes.set_title("" if layer is None else f"layer {layer}", loc="left")
        row[0].set_ylabel("explained variance")
    shown = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside right upper", frameon=False)
    figure.suptitle(f"{sweep.name}: {sweep.field} {', '.join(f'{value:g}' for value in sweep.values.values())}")
    contents = io.BytesIO()
    figure.savefig(contents, format="png", metadata={"Software": None})
    return contents.getvalue()


def _draw_methods(axes: Axes, table: pl.DataFrame, spent: str) -> None:
    import polars as pl
    from matplotlib.ticker import LogLocator, NullFormatter

    known = table.filter(pl.col(spent).is_not_null())
    axes.set_xlabel(_SPENT[spent])
    if known.is_empty():
        axes.text(0.5, 0.5, "not evaluated yet", ha="center", va="center", transform=axes.transAxes)
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    for (method, n), line in known.sort("value").partition_by("method", "n_members", as_dict=True, maintain_order=True).items():
        several = known.filter(method=method)["n_members"].n_unique() > 1
        colour, marker = _STYLES[method]
        label = f"{method} ({n})" if several else method
        axes.plot(line[spent], line["explained_variance"], color=colour, marker=marker, markersize=6, label=label)
        for costs, gains in line.select(f"{spent}_by_seed", "explained_variance_by_seed").rows():
            points = [(x, y) for x, y in zip(costs.split(","), gains.split(","), strict=True) if x and y]
            axes.scatter(*zip(*((float(x), float(y)) for x, y in points), strict=True), color=colour, marker=marker, s=8, alpha=0.5)
