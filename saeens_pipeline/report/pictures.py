"""Pictures of the key charts: PNG for the Dagster UI and for slides, SVG and PDF for pages and papers, in one style."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal

import polars as pl
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.report.charts import BAR, CAP, Chart, tick_label
from saeens_pipeline.report.figures import BY_MEMBERS, against_members, by_members, sweep, trade_offs
from saeens_pipeline.report.metrics import GAINS
from saeens_pipeline.report.results import Results, spreads

INCHES = (5.8, 3.1)
DPI = 110
SCALE = 0.75  # points for a pixel of plotly
COLUMN, PAGE = 3.3, 6.8  # inches: a column of a paper, and a page
_PRINTED = {  # of the charts in SVG and PDF: text stays text, and the same chart is the same file
    "font.size": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "svg.fonttype": "none", "svg.hashsalt": "saeens", "pdf.fonttype": 42,
}  # fmt: skip
_NO_DATE = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
_EXPORTED = (
    "explained_variance_by_members",
    "stability_by_members",
    "explained_variance_for_l0",
    "explained_variance_for_stability_equal_candidates",
)


def report_pictures(results: Results) -> Iterator[tuple[str, bytes]]:
    """Yield name and PNG of each key chart that has values."""
    for chart in (*by_members(results), *trade_offs(results)):
        if chart.name in _EXPORTED:
            yield chart.name, as_png([[chart]])


def printed(chart: Chart, inches: float, form: Literal["svg", "pdf"]) -> bytes:
    """Return a chart as SVG or PDF, that many inches wide, with its legend below. The same chart gives the same bytes."""
    labels = list(dict.fromkeys(each.label or each.method.label for each in chart.series))
    columns = max(1, int(inches / (0.4 + 0.05 * max(map(len, labels), default=0))))
    height = 0.62 * min(inches, 4.6) + 0.16 * -(-len(labels) // columns)
    written = io.BytesIO()
    with rc_context(_PRINTED):  # pyright: ignore[reportArgumentType]  # names of settings
        figure = Figure(figsize=(inches, height), layout="constrained")
        axes = figure.subplots()
        _draw(axes, chart)
        handles, names = axes.get_legend_handles_labels()
        shown = dict(zip(names, handles, strict=True))
        if len(shown) > 1:
            figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(written, format=form, metadata=_NO_DATE[form])
    return written.getvalue()


def table_picture(table: str, rows: pl.DataFrame) -> bytes | None:
    """Return the key chart of one table as PNG: its first metric by the number of members. None without a chart or values."""
    metric = next((each for each in (*BY_MEMBERS, *GAINS) if each.table == table), None)
    chart = against_members(spreads(rows, metric.column), metric) if metric else None
    return as_png([[chart]]) if chart else None


def sweep_picture(table: pl.DataFrame, pareto: Declaration) -> bytes:
    """Return the charts of a sweep as PNG."""
    values = ", ".join(f"{value:g}" for value in pareto.settings["values"].values())
    return as_png(sweep(table), (5, 4), f"{pareto.address.owner}: {pareto.settings['field']} {values}")


def as_png(rows: Sequence[Sequence[Chart]], inches: tuple[float, float] = INCHES, title: str = "") -> bytes:
    """Return rows of charts, with one legend, as PNG. With a title the charts have theirs, too."""
    width, height = inches
    figure = Figure(figsize=(width * len(rows[0]), height * len(rows)), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    shown = {}
    for of_row, charts in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
        for axes, chart in zip(of_row, charts, strict=True):
            _draw(axes, chart)
            if title:
                axes.set_title(chart.title, loc="left")
            handles, labels = axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside right upper", frameon=False, fontsize=7.5)
    if title:
        figure.suptitle(title)
    written = io.BytesIO()
    canvas.print_png(written, metadata={"Software": None})  # `savefig` draws twice
    return written.getvalue()


def _draw(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel("\n".join(chart.title_of("x")))
    axes.set_ylabel("\n".join(chart.title_of("y")))
    if not chart.series:
        axes.text(0.5, 0.5, "not evaluated yet", ha="center", va="center", transform=axes.transAxes)
        return
    for each in chart.series:
        about, style = each.method, each.style
        errors = {f"{axis}err": ends for axis, ends in each.errors.items()}
        line = {"linestyle": ":" if style.dotted else "-" if style.line else "none", "linewidth": style.line * SCALE}
        bars = {"elinewidth": BAR * SCALE, "capsize": CAP * SCALE}  # also of symbols that no line joins
        sizes = {"marker": about.marker if style.symbol else "", "markersize": style.symbol * SCALE, **bars}
        drawn = axes.errorbar(
            each.x, each.y, **errors, color=about.colour, label=each.label or about.label, alpha=style.opacity, **line, **sizes
        )
        if style.steps:
            drawn.lines[0].set_drawstyle("steps-post")
        if style.last:
            axes.plot(each.x[-1:], each.y[-1:], color=about.colour, marker=about.marker, markersize=style.last * SCALE)
    for about, x in chart.marks:
        axes.axvline(x, color=about.colour, linestyle=":")
    _scale(axes, "x", chart)
    _scale(axes, "y", chart)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, name: Literal["x", "y"], chart: Chart) -> None:
    drawn = axes.xaxis if name == "x" else axes.yaxis
    axis = chart.axis(name)
    if axis.log:
        axes.set(**{f"{name}scale": "log"})
        drawn.set_major_locator(FixedLocator(chart.ticks_of(name)))
        drawn.set_major_formatter(lambda value, _: tick_label(float(value)))
        drawn.set_minor_formatter(NullFormatter())
    if axis.whole:
        drawn.set_major_locator(MaxNLocator(integer=True))
    if ends := chart.range_of(name):
        axes.set(**{f"{name}lim": ends})
