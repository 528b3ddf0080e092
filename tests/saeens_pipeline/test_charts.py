"""Charts on pages and in pictures: ticks and titles of their axes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure

from saeens_pipeline.report import pictures
from saeens_pipeline.report.charts import CURVE, LINE, POINTS, Axis, Chart, Series, as_plotly, log_ticks, tick_label
from saeens_pipeline.report.methods import method

positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@given(positive, positive)
@example(0.61, 0.63)
@example(1e-7, 3.0)
@example(5e-324, 1.7e308)
@example(5e-324, 1.5e-323)  # three floats
def test_a_logarithmic_axis_has_three_to_nine_ticks_within_the_data(one: float, other: float):
    low, high = sorted((one, other))
    assume(high > low * (1 + 1e-12) and high - low > 1e-322)  # between nearer floats there are no three round numbers
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert low <= ticks[0] and ticks[-1] <= high
    assert all(left < right for left, right in itertools.pairwise(ticks))
    assert len({tick_label(tick) for tick in ticks}) == len(ticks)


@given(st.floats(1e-12, 1e12), st.floats(1.001, 1e12))
@example(11000, 900)
@example(1, 1e6)
@example(9.95e-5, 1.02)
def test_labels_of_an_axis_fit_side_by_side_in_a_column_of_a_paper(low: float, ratio: float):
    ticks, high = log_ticks(low, low * ratio), low * ratio
    places = [190 * math.log(tick / low) / math.log(high / low) for tick in ticks]  # points
    widths = [7 * 0.64 * len(tick_label(tick)) * 0.85 for tick in ticks]  # of the labels' 7 points; commas, dots and powers are narrower
    between = zip(itertools.pairwise(places), itertools.pairwise(widths), strict=True)
    assert all(right - left > (one + another) / 2 for (left, right), (one, another) in between), ticks


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1e-7, 3, ["10⁻⁶", "0.0001", "0.01", "1"]),
        (0.003, 0.9, ["0.003", "0.01", "0.03", "0.1", "0.3"]),
        (1, 50, ["1", "2", "5", "10", "20", "50"]),
        (512, 65536, ["1,000", "3,000", "10,000", "30,000"]),
        (1.5, 8, ["2", "4", "6", "8"]),
        (0.61, 0.63, ["0.61", "0.62", "0.63"]),
        (6.12e9, 6.31e9, ["6.15·10⁹", "6.2·10⁹", "6.25·10⁹", "6.3·10⁹"]),
        (1e12, 3e13, ["10¹²", "2·10¹²", "5·10¹²", "10¹³", "2·10¹³"]),
    ],
)
def test_ticks_are_powers_of_ten_then_1_2_5_then_round_steps(low: float, high: float, labels: list[str]):
    assert [tick_label(tick) for tick in log_ticks(low, high)] == labels


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (2, 2), (3, 2), (1, math.inf), (math.nan, 1)])
def test_ticks_of_no_range_are_refused(low: float, high: float):
    with pytest.raises(ValueError, match="goes from a positive number to a larger one"):
        log_ticks(low, high)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1e-4, "0.0001"),
        (0.6125, "0.6125"),
        (30, "30"),
        (1e6, "1,000,000"),
        (1e-5, "10⁻⁵"),
        (2e6, "2·10⁶"),
        (1e7, "10⁷"),
        (1.25e-7, "1.25·10⁻⁷"),
    ],
)
def test_labels_are_written_out_from_a_ten_thousandth_to_a_million(value: float, label: str):
    assert tick_label(value) == label


def _chart(
    y: list[float], x: list[float] | None = None, *, title: str = "mean squared error", log_x: bool = False, log: bool = False
) -> Chart:
    x = x or [float(i) for i in range(1, len(y) + 1)]
    series = [Series(method("bagging"), x, y, LINE), Series(method("boosting"), x, y, CURVE)]
    return Chart("mse", "MSE", "", Axis("tokens", log=log_x), Axis(title, log=log), series)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of all pictures that are drawn from now on."""
    axes: list[Axes] = []
    draw = pictures._draw
    monkeypatch.setattr(pictures, "_draw", lambda of, chart: (axes.append(of), draw(of, chart)))
    return axes


def _printed(chart: Chart, drawn: list[Axes], inches: float = pictures.COLUMN) -> Axes:
    pictures.printed(chart, inches, "svg")
    return drawn[-1]


def _measured(axes: Axes) -> tuple[Figure, RendererAgg]:
    """The figure, drawn again by a renderer that measures."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    with rc_context(pictures._PRINTED):  # pyright: ignore[reportArgumentType]
        canvas.draw()
    return figure, canvas.get_renderer()


@pytest.mark.parametrize(("log_x", "log_y"), [(False, False), (True, False), (False, True), (True, True)])
def test_titles_of_logarithmic_axes_say_so_on_pages_and_in_pictures(drawn: list[Axes], *, log_x: bool, log_y: bool):
    chart = _chart([1.0, 2.0, 30.0], log_x=log_x, log=log_y)
    layout, axes = as_plotly(chart)["layout"], _printed(chart, drawn)
    for is_log, page, picture in (
        (log_x, layout["xaxis"]["title"]["text"], axes.get_xlabel()),
        (log_y, layout["yaxis"]["title"]["text"], axes.get_ylabel()),
    ):
        assert page.endswith("(log scale)") == picture.endswith("(log scale)") == is_log
        assert page.replace("<br>", "\n") == picture


@pytest.mark.parametrize("values", [[0.61, 0.62, 0.63], [1e-7, 0.1, 3.0], [5e8, 7e8, 6e8], [0.4, 0.4, 0.4], [0.0, 0.2, 0.4]])
@pytest.mark.parametrize("inches", [pictures.COLUMN, pictures.PAGE])
def test_pages_and_pictures_have_the_same_ticks_within_the_data(drawn: list[Axes], values: list[float], inches: float):
    chart = _chart(values, [each or 0.1 for each in values], log_x=True, log=True)
    layout, axes = as_plotly(chart)["layout"], _printed(chart, drawn, inches)
    for name, axis, ends in (("yaxis", axes.yaxis, axes.get_ylim()), ("xaxis", axes.xaxis, axes.get_xlim())):
        ticks = [float(tick) for tick in axis.get_majorticklocs()]
        assert len(ticks) >= 3 and ends[0] <= ticks[0] and ticks[-1] <= ends[1]
        shown = dict(zip(layout[name]["tickvals"], layout[name]["ticktext"], strict=True))
        assert [shown[tick] for tick in ticks] == [label.get_text() for label in axis.get_majorticklabels()]
        assert min(shown) < ticks[0] / 3 and max(shown) > ticks[-1] * 3  # for zooming out


@pytest.mark.parametrize("high", [1e3, 64e3, 9.9e6, 3e7, 2e10])
def test_labels_of_ticks_do_not_overlap_in_a_column_of_a_paper(drawn: list[Axes], high: float):
    chart = _chart([0.5, 0.6, 0.7], [high / 1000, high / 30, high], log_x=True)
    axes = _printed(chart, drawn)
    _, renderer = _measured(axes)
    boxes = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
    assert len(boxes) >= 3
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_long_titles_are_wrapped_on_pages_and_in_pictures_and_stay_within_the_picture(drawn: list[Axes]):
    title = "share of the pairs of features that never fire on the same token"
    chart = _chart([0.5, 0.6, 0.7], title=title, log=True)
    lines = as_plotly(chart)["layout"]["yaxis"]["title"]["text"].split("<br>")
    assert " ".join(lines) == f"{title} (log scale)" and "(log scale)" in lines[-1]
    assert len(lines) == 4 and max(map(len, lines)) <= 26
    axes = _printed(chart, drawn)
    figure, renderer = _measured(axes)
    box, whole = axes.yaxis.label.get_window_extent(renderer), figure.bbox
    assert box.x0 >= 0 and box.y0 >= 0 and box.y1 <= whole.y1


def test_intervals_of_symbols_without_a_line_are_drawn_in_pictures(drawn: list[Axes]):
    series = Series(method("expanded"), [1], [0.5], POINTS, y_bars=[(0.4, 0.7)])
    axes = _printed(Chart("ev", "EV", "", Axis("members"), Axis("explained variance"), [series]), drawn)
    (bars,) = axes.collections
    assert [float(width) for width in np.ravel(bars.get_linewidth())] == [pytest.approx(0.9)]


def test_names_beside_a_plot_are_moved_apart():
    series = [
        Series(method(name), [1, 2], [0.5, y], label=f"level {name}", is_named=True) for name, y in (("a", 0.5), ("b", 0.51), ("c", 1.0))
    ]
    names = as_plotly(Chart("stability", "", "", Axis("members"), Axis("stability"), series))["layout"]["annotations"]
    heights = [170 * (name["y"] - 0.5) / 0.5 + name["yshift"] for name in names]
    assert [name["text"] for name in names] == ["level a", "level b", "level c"]
    assert heights[1] - heights[0] >= 11.5 and names[2]["yshift"] == 0
