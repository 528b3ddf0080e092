"""Charts: one description, drawn by plotly on pages and by matplotlib (`pictures`) in exported pictures.

The page sets the colours of text and grid when it draws. Plotly's Python classes are not used: they take seconds to check keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saeens_pipeline.report.methods import Method

MANY_DECADES = 2.5
NAME_WIDTH, NAME_CHARACTERS = 150, 26  # pixels to the right of a plot, for the names of its lines; a longer name takes two lines
_PLAIN = range(-4, 7)  # exponents of ten whose powers are written out


@dataclass(frozen=True)
class Axis:
    """An axis; `whole` has ticks at whole numbers only."""

    title: str
    log: bool = False
    range: tuple[float, float] | None = None
    whole: bool = False


@dataclass(frozen=True)
class Style:
    """Width of the line and size of the symbols, in plotly's pixels; 0 draws none. `last` is the size of the last symbol."""

    line: float = 0
    symbol: float = 0
    last: float = 0
    dotted: bool = False
    steps: bool = False
    opacity: float = 1


LINE = Style(line=2, symbol=7)
POINTS = Style(symbol=10)
LEVEL = Style(line=1.5, dotted=True)
PATH = Style(line=1.5, symbol=6, last=12)
THIN = Style(line=1.1, symbol=4, dotted=True)
CURVE = Style(line=1.1, opacity=0.75)
STEPS = Style(line=1.8, steps=True)  # each value from its x to the next
FRONT = Style(line=1.2, dotted=True)


@dataclass(frozen=True)
class Series:
    """Points of one method. `x_bars` and `y_bars` are the ends of an interval around each point.

    `text` is shown when the series is pointed at, one for each point or one for all with plotly's placeholders; nothing where it is empty.
    """

    method: Method
    x: Sequence[Any]
    y: Sequence[float]
    style: Style = LINE
    x_bars: Sequence[tuple[float, float]] = ()
    y_bars: Sequence[tuple[float, float]] = ()
    text: str | Sequence[str] = ""
    label: str = ""
    is_named: bool = False
    """True: the label stands at the last point on pages, since the legend does not list it."""

    @property
    def errors(self) -> dict[str, tuple[list[float], list[float]]]:
        """Return by axis the lengths of its bars, down and up."""
        bars = {"x": (self.x, self.x_bars), "y": (self.y, self.y_bars)}
        return {
            axis: (
                [m - low for m, (low, _) in zip(middles, ends, strict=True)],
                [high - m for m, (_, high) in zip(middles, ends, strict=True)],
            )
            for axis, (middles, ends) in bars.items()
            if ends
        }


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and caption. `name` is the file name of its picture; `marks` are dotted verticals."""

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[tuple[Method, float]] = ()


def as_plotly(chart: Chart) -> dict[str, Any]:
    """Return the chart as `data` and `layout` of plotly."""
    values = {"xaxis": [x for each in chart.series for x in each.x], "yaxis": [y for each in chart.series for y in each.y]}
    margin = {"l": 58, "r": 14, "t": 10, "b": 46}
    layout: dict[str, Any] = {"showlegend": False, "margin": margin, "hovermode": "closest", "dragmode": "zoom"}
    layout |= {name: _axis(axis, values[name]) for name, axis in (("xaxis", chart.x), ("yaxis", chart.y))}
    if chart.marks:
        ends = {"type": "line", "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
        layout["shapes"] = [
            ends | {"x0": x, "x1": x, "line": {"color": about.colour, "dash": "dot", "width": 1.5}} for about, x in chart.marks
        ]
    if named := [each for each in chart.series if each.is_named]:
        layout["annotations"] = [_name(each) for each in named]
        layout["margin"] = margin | {"r": NAME_WIDTH}
    return {"data": [_trace(each) for each in chart.series], "layout": layout}


def _name(series: Series) -> dict[str, Any]:
    """Return the name of a series, to the right of its last point, beside the plot."""
    place = {"x": 1.01, "xref": "paper", "xanchor": "left", "y": series.y[-1], "yanchor": "middle", "align": "left", "showarrow": False}
    name = series.label or series.method.label
    return place | {
        "text": name if len(name) <= NAME_CHARACTERS else name.replace(", ", ",<br>"),
        "font": {"size": 10, "color": series.method.colour},
    }


def _axis(axis: Axis, values: Sequence[Any]) -> dict[str, Any]:
    kind = "category" if values and isinstance(values[0], str) else "log" if axis.log else "linear"
    found: dict[str, Any] = {"title": {"text": axis.title, "standoff": 8}, "type": kind, "zeroline": False, "automargin": True}
    if axis.range:
        found["range"] = [math.log10(end) for end in axis.range] if axis.log else list(axis.range)
    if axis.whole and values and max(values) <= 10:
        found["dtick"] = 1
    if axis.log:
        found |= _decades([value for value in (*values, *(axis.range or ())) if value > 0])
    return found


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis: at powers of ten, also between them if there are few, and beyond the data for zooming out.

    Axes with long labels have fewer ticks, so that the labels fit side by side on paper.
    """
    if not values:
        return {}
    low, high = math.log10(min(values)), math.log10(max(values))
    between = (1, 2, 5) if low >= _PLAIN[0] and high <= _PLAIN[-1] else (1, 3)
    digits = between if high - low < MANY_DECADES else (1,)
    ticks = [(digit, exponent) for exponent in range(math.floor(low) - 1, math.ceil(high) + 2) for digit in digits]
    return {"tickvals": [digit * 10.0**exponent for digit, exponent in ticks], "ticktext": [_tick(*tick) for tick in ticks], "tickangle": 0}


def _tick(digit: int, exponent: int) -> str:
    if exponent in _PLAIN:
        return f"{digit * 10**exponent:,}" if exponent >= 0 else f"{digit * 10.0**exponent:.{-exponent}f}"
    power = f"10<sup>{exponent}</sup>"
    return power if digit == 1 else f"{digit}·{power}"


def _trace(series: Series) -> dict[str, Any]:
    about, style = series.method, series.style
    label = series.label or about.label
    trace: dict[str, Any] = {"type": "scatter", "x": list(series.x), "y": list(series.y), "name": label, "meta": {"method": about.name}}
    trace["mode"] = "+".join(["lines"] * bool(style.line) + ["markers"] * bool(style.symbol))
    if style.line:
        trace["line"] = {"color": about.colour, "width": style.line}
        trace["line"] |= ({"dash": "dot"} if style.dotted else {}) | ({"shape": "hv"} if style.steps else {})
    if style.symbol:
        size = [style.symbol] * (len(series.x) - 1) + [style.last] if style.last else style.symbol
        trace["marker"] = {"color": about.colour, "symbol": about.symbol, "size": size, "opacity": 1, "line": {"width": 0}}
    if style.opacity < 1:
        trace["opacity"] = style.opacity
    for axis, (downs, ups) in series.errors.items():
        ends = {"type": "data", "array": ups, "arrayminus": downs, "symmetric": False}
        trace[f"error_{axis}"] = ends | {"color": about.colour, "thickness": 1.2, "width": 3}
    if not series.text:
        return trace | {"hoverinfo": "skip"}
    if not isinstance(series.text, str):
        trace["customdata"] = list(series.text)
    text = series.text if isinstance(series.text, str) else "%{customdata}"
    return trace | {"hovertemplate": f"<b>{label}</b>, {text}<extra></extra>"}
