"""Static pictures of the key plots, as PNG, for the Dagster UI and for slides."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from saeens_pipeline.report.figures import EV, L0, STABILITY, Axis
from saeens_pipeline.report.methods import ENSEMBLES, in_order, method
from saeens_pipeline.report.results import Results, Size, Spread, spreads

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

INCHES = (5.8, 3.1)
DPI = 110
_OF_TABLE = {  # what is drawn of a table against the number of members
    "reconstruction": EV,
    "coactivation": Axis("coactivation", "connectivity", "connectivity"),
    "stability": STABILITY,
    "marginal_gain": Axis("marginal_gain", "explained_variance_gain", "explained variance that a member adds"),
}


def report_pictures(results: Results) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each key plot that there are numbers for."""
    for axis in (EV, STABILITY):
        values = results.spreads(axis.table, axis.column)
        if len(values) > 1:
            yield f"{axis.column}_by_members", _by_members(values, axis)
    for x, y in ((L0, EV), (STABILITY, EV)):
        xs, ys = results.spreads(x.table, x.column), results.spreads(y.table, y.column)
        if len(xs.keys() & ys.keys()) > 1:
            yield f"{y.column}_for_{x.column}", _trade_off(xs, ys, x, y)


def table_picture(table: str, rows: pl.DataFrame) -> bytes | None:
    """The key plot of one table, as PNG; None for tables without one, or without numbers."""
    axis = _OF_TABLE.get(table)
    if axis is None:
        return None
    values = spreads(rows, axis.column)
    if table == "marginal_gain":
        values = {size: spread for size, spread in values.items() if size.n_members > 1}
    return _by_members(values, axis) if len(values) > 1 else None


def as_markdown(png: bytes, title: str) -> str:
    """A picture that is complete in itself, as Dagster's metadata show it."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _by_members(values: dict[Size, Spread], axis: Axis) -> bytes:
    from matplotlib.ticker import MaxNLocator

    most = max(size.n_members for size in values)

    def draw(axes: Axes) -> None:
        for name in in_order(size.method for size in values):
            sizes = sorted(size for size in values if size.method == name)
            is_level = name not in ENSEMBLES and len(sizes) == 1 and most > 1
            if is_level:  # one SAE, to compare with at every size
                axes.plot([1, most], [values[sizes[0]].mean] * 2, color=method(name).colour, linestyle=":", linewidth=1.2)
            _line(axes, name, [most] if is_level else [size.n_members for size in sizes], [values[size] for size in sizes])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.log:
            axes.set_yscale("log")

    return _png(draw, "members", axis.title)


def _trade_off(xs: dict[Size, Spread], ys: dict[Size, Spread], x: Axis, y: Axis) -> bytes:
    def draw(axes: Axes) -> None:
        both = sorted(xs.keys() & ys.keys())
        for name in in_order(size.method for size in both):
            sizes = [size for size in both if size.method == name]
            _line(axes, name, [xs[size].mean for size in sizes], [ys[size] for size in sizes])
        if x.log:
            axes.set_xscale("log")

    return _png(draw, x.title, y.title)


def _line(axes: Axes, name: str, xs: Sequence[float], chosen: Sequence[Spread]) -> None:
    about = method(name)
    means = [spread.mean for spread in chosen]
    downs, ups = [spread.mean - spread.bar[0] for spread in chosen], [spread.bar[1] - spread.mean for spread in chosen]
    style = {"color": about.colour, "marker": about.marker, "markersize": 5, "linewidth": 1.5, "label": about.label}
    axes.errorbar(xs, means, yerr=[downs, ups], capsize=2, **style)


def _png(draw: Callable[[Axes], None], x_title: str, y_title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7.5)
    written = io.BytesIO()
    canvas.print_png(written, metadata={"Software": None})  # `savefig` draws twice
    return written.getvalue()
