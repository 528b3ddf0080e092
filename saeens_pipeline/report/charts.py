"""Charts: one description, drawn by plotly on pages and by matplotlib (`pictures`) in exported pictures.

The page sets the colours of text and grid when it draws. Plotly's Python classes are not used: they take seconds to check keys.
"""

from __future__ import annotations

import itertools
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from saeens_pipeline.report.methods import Method

NAME_WIDTH, NAME_CHARACTERS = 150, 26  # pixels to the right of a plot, for the names of its lines; a longer name takes two lines
NAME_LINE, PLOT_HEIGHT = 12, 170  # pixels: a line of a name, and the least height of a plot
TITLE_CHARACTERS = {"x": 40, "y": 26}  # of a line of an axis' title, in the smallest picture
FEWEST_TICKS, MOST_TICKS = 3, 9
TICK_ROOM = 24.0  # width of the data in a column of a paper, in the font sizes of the ticks' labels
TICK_GAP = 0.9  # between labels, in font sizes
ZOOM = 100.0  # ticks go on by this factor beyond the data
BAR, CAP = 1.2, 3  # pixels: the width of an interval's line and of its ends
SAME = 1 + 1e-6  # values whose ratio is smaller are one value to a logarithmic axis
_PLAIN = (1e-4, 1e6)  # values between these are written out
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """An axis; `whole` has ticks at whole numbers only."""

    title: str
    log: bool = False
    range: tuple[float, float] | None = None
    whole: bool = False

    @property
    def heading(self) -> str:
        """Return the title as it is written at the axis: it says if the axis is logarithmic."""
        return " ".join(filter(None, [self.title, "(log scale)" if self.log else ""]))


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

    def axis(self, name: Literal["x", "y"]) -> Axis:
        """Return an axis by its name."""
        return self.x if name == "x" else self.y

    def title_of(self, name: Literal["x", "y"]) -> list[str]:
        """Return the lines of an axis' title, about equally long. "(log scale)" stays on one line."""
        text = self.axis(name).heading.replace(" (log scale)", " (log\xa0scale)")
        return [line.replace("\xa0", " ") for line in _wrapped(text, TITLE_CHARACTERS[name])]

    def values_of(self, name: Literal["x", "y"]) -> list[Any]:
        """Return the values along an axis, with the ends of their bars."""
        values = [value for each in self.series for value in (each.x if name == "x" else each.y)]
        return values + [end for each in self.series for bar in (each.x_bars if name == "x" else each.y_bars) for end in bar]

    def range_of(self, name: Literal["x", "y"]) -> tuple[float, float] | None:
        """Return the ends of an axis that the data alone would not give: set ones, and those of a logarithmic axis with a single value."""
        axis, values = self.axis(name), self._positive(name)
        if axis.range or not axis.log or not values or max(values) > min(values) * SAME:
            return axis.range
        return min(values) / 2, max(values) * 2

    def ticks_of(self, name: Literal["x", "y"], *, zoom: float = 1) -> list[float]:
        """Return the ticks of a logarithmic axis: within its range, and with `zoom` also those that zooming out by this factor shows.

        A linear axis, and a logarithmic one without positive values, has none.
        """
        values = self.range_of(name) or self._positive(name)
        if not self.axis(name).log or not values:
            return []
        low, high = min(values), max(values)
        ticks = log_ticks(low, high)
        if zoom == 1:
            return ticks
        gap = min(other / one for one, other in itertools.pairwise(ticks))
        further = log_ticks(low / zoom, high * zoom)
        return sorted({*ticks, *(tick for tick in further if tick * gap <= ticks[0] or tick >= ticks[-1] * gap)})

    def _positive(self, name: Literal["x", "y"]) -> list[float]:
        return [value for value in self.values_of(name) if 0 < value < math.inf] if self.axis(name).log else []


def _wrapped(text: str, most: int) -> list[str]:
    """Return the fewest lines of at most so many characters, unless a word has more, with the longest line as short as can be."""
    widths = range(1, most + 1)
    lines = [textwrap.wrap(text, width, break_long_words=False) for width in widths]
    fewest = len(lines[-1])
    return next(each for each in lines if len(each) <= fewest)


def log_ticks(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis from `low` to `high`: at least 3, at most 9, all within it, with labels that fit side by side.

    They are powers of ten, or 1, 2 and 5 times these, or multiples of a round step where the axis is too narrow for both. Between floats
    that are too near for three round numbers there are fewer. Raises ValueError unless 0 < low < high < inf.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"a logarithmic axis goes from a positive number to a larger one, not from {low} to {high}")
    enough: list[float] = []
    for grid in _grids(low, high):
        ticks = [tick for tick in grid if low <= tick <= high]
        if FEWEST_TICKS <= len(ticks) <= MOST_TICKS:
            if _fit(ticks, low, high):
                return ticks
            enough = min([enough or ticks, ticks], key=len)
    return enough or [low, high]


def _grids(low: float, high: float) -> Iterator[Sequence[float]]:
    """Yield ticks in the order of preference, some of them beyond the ends: coarse kinds first, then each without some of its ticks."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for stride in range(1, len(exponents)):
        yield [float(f"1e{exponent}") for exponent in exponents if exponent % stride == 0]
    by_fives, by_threes = ([float(f"{digit}e{exponent}") for exponent in exponents for digit in digits] for digits in ((1, 2, 5), (1, 3)))
    yield from (by_fives, by_threes, *_sparser(by_threes), *_sparser(by_fives))
    largest = math.floor(math.log10(high - low))
    for exponent, digit in itertools.product(range(largest, largest - 3, -1), (5, 2, 1)):
        step = digit * Fraction(10) ** exponent
        counts = range(max(1, math.floor(Fraction(low) / step)), math.ceil(Fraction(high) / step) + 1)
        if len(counts) <= 3 * MOST_TICKS:
            multiples = sorted({float(count * step) for count in counts if count * step < sys.float_info.max})
            yield from (multiples, *_sparser(multiples))


def _sparser(ticks: Sequence[float]) -> Iterator[Sequence[float]]:
    """Yield every second of the ticks, third and so on, from each start."""
    return (ticks[start::stride] for stride in range(2, 5) for start in range(stride))


def _fit(ticks: Sequence[float], low: float, high: float) -> bool:
    """Return whether the ticks' labels have room side by side in a column of a paper."""
    widths = [_width(tick_label(tick)) for tick in ticks]
    places = [TICK_ROOM * math.log(tick / low) / math.log(high / low) for tick in ticks]
    pairs = itertools.pairwise(zip(places, widths, strict=True))
    return all(right - left >= (one + other) / 2 + TICK_GAP for (left, one), (right, other) in pairs)


def _width(label: str) -> float:
    """Return the width of a label in font sizes, as in DejaVu Sans, which is wider than most."""
    return sum(0.32 if character in ".,·" else 0.42 if character in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹" else 0.64 for character in label)


def tick_label(value: float) -> str:
    """Return a tick's label: written out from 0.0001 to 1,000,000, else with a power of ten, and with every digit that the value has."""
    if _PLAIN[0] <= value <= _PLAIN[1]:
        return f"{value:,}".removesuffix(".0")
    digits, _, exponent = f"{Decimal(repr(value)).normalize():e}".partition("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if digits == "1" else f"{digits}·{power}"


def as_plotly(chart: Chart) -> dict[str, Any]:
    """Return the chart as `data` and `layout` of plotly."""
    margin = {"l": 58, "r": 14, "t": 28, "b": 46}  # the buttons are above the plot
    layout: dict[str, Any] = {"showlegend": False, "margin": margin, "hovermode": "closest", "dragmode": "zoom"}
    layout |= {"xaxis": _axis(chart, "x"), "yaxis": _axis(chart, "y")}
    if chart.marks:
        ends = {"type": "line", "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
        layout["shapes"] = [
            ends | {"x0": x, "x1": x, "line": {"color": about.colour, "dash": "dot", "width": 1.5}} for about, x in chart.marks
        ]
    if named := [each for each in chart.series if each.is_named]:
        layout["annotations"] = list(_names(named, chart.values_of("y")))
        layout["margin"] = margin | {"r": NAME_WIDTH}
    return {"data": _traces(chart.series), "layout": layout}


def _traces(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Return the traces. The legend of a saved picture lists each label once, by its last trace, and none that stands beside its line."""
    traces = [_trace(each) for each in series]
    last = {trace["name"]: i for i, trace in enumerate(traces)}
    for i, (each, trace) in enumerate(zip(series, traces, strict=True)):
        trace["showlegend"] = last[trace["name"]] == i and not each.is_named
    return traces


def _names(named: Sequence[Series], values: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Yield the name of each series, to the right of its last point, beside the plot; names that would cover each other are moved up."""
    beside = {"x": 1.01, "xref": "paper", "xanchor": "left", "yanchor": "middle", "align": "left", "showarrow": False}
    taken = -math.inf
    for each in sorted(named, key=lambda each: each.y[-1]):
        name = each.label or each.method.label
        text = name if len(name) <= NAME_CHARACTERS else name.replace(", ", ",<br>")
        half = NAME_LINE * (1 + text.count("<br>")) / 2
        place = PLOT_HEIGHT * (each.y[-1] - min(values)) / ((max(values) - min(values)) or 1)
        shift = max(0, taken + half - place)
        taken = place + shift + half
        yield beside | {"text": text, "y": each.y[-1], "yshift": round(shift), "font": {"size": 10, "color": each.method.colour}}


def _axis(chart: Chart, name: Literal["x", "y"]) -> dict[str, Any]:
    axis, values = chart.axis(name), chart.values_of(name)
    kind = "category" if values and isinstance(values[0], str) else "log" if axis.log else "linear"
    title = {"text": "<br>".join(chart.title_of(name)), "standoff": 8}
    found: dict[str, Any] = {"title": title, "type": kind, "zeroline": False, "automargin": True}
    if ends := chart.range_of(name):
        found["range"] = [math.log10(end) for end in ends] if axis.log else list(ends)
    if axis.whole and values and max(values) <= 10:
        found["dtick"] = 1
    if ticks := chart.ticks_of(name, zoom=ZOOM):
        found |= {"tickvals": ticks, "ticktext": [tick_label(tick) for tick in ticks], "tickangle": 0}
    return found


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
        trace[f"error_{axis}"] = ends | {"color": about.colour, "thickness": BAR, "width": CAP}
    if not series.text:
        return trace | {"hoverinfo": "skip"}
    if not isinstance(series.text, str):
        trace["customdata"] = list(series.text)
    text = series.text if isinstance(series.text, str) else "%{customdata}"
    return trace | {"hovertemplate": f"<b>{label}</b>, {text}<extra></extra>"}
