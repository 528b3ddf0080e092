"""The pages in a browser, opened from disk: drawn, legible, sortable, quiet, and with the tables' numbers. `make browser-test` runs this.

The pages are those that `write_pages.py` wrote into the folder that SAEENS_TEST_PAGES names.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

PAGES = Path(os.environ.get("SAEENS_TEST_PAGES", ""))
REPORT = "plain/reports/tiny/layer=1/index.html"
FEATURES = "plain/reports/tiny/layer=1/features.html"
HOSTILE_FEATURES = "hostile/reports/tiny/layer=1/features.html"
LEADERBOARD = "plain/reports/leaderboard/index.html"
HOSTILE = "hostile/reports/tiny/layer=1/index.html"
HOSTILE_TEXT = '<script>document.title = "taken"</script>'
SVG = "{http://www.w3.org/2000/svg}"
VIEWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]


@dataclass
class Opened:
    """A page, its console errors, and its requests for files that are not on disk."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def draw(self) -> None:
        """Scroll to every plot, which draws it."""
        for plot in self.page.query_selector_all(".plot"):
            plot.scroll_into_view_if_needed()
            self.page.wait_for_function("plot => plot.querySelector('.main-svg')", arg=plot)


def _open(browser: Browser, path: str, width: int = 1280, scheme: Any = "light") -> Opened:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    opened = Opened(page)
    page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: opened.complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (opened.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else opened.complaints.append(request.url)
    )
    page.on("requestfailed", lambda request: opened.complaints.append(f"not there: {request.url}"))
    file, _, fragment = path.partition("#")
    page.goto((PAGES / file).as_uri() + (f"#{fragment}" if fragment else ""))
    return opened


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("path", [REPORT, LEADERBOARD, HOSTILE])
def test_every_plot_is_drawn_without_console_errors_and_fits(browser: Browser, path: str, width: int, scheme: str):
    opened = _open(browser, path, width, scheme)
    opened.draw()
    plots = opened.page.query_selector_all(".plot")
    assert len(plots) >= (4 if path == LEADERBOARD else 15)
    for plot in plots:
        assert plot.query_selector_all(".scatterlayer .trace"), plot.get_attribute("data-figure")
        assert (plot.bounding_box() or {"width": 0})["width"] <= width
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("path", [REPORT, LEADERBOARD])
def test_text_is_legible(browser: Browser, path: str, width: int, scheme: str):
    opened = _open(browser, path, width, scheme)
    opened.draw()
    for selector in ("main p", "td", "th", "figcaption", "nav a", ".note", ".legend button", ".xtick text", ".ytick text", ".xtitle"):
        element = opened.page.query_selector(selector)
        if element is not None:
            assert opened.page.evaluate(_CONTRAST, element) >= 4.5, (selector, scheme)


_CONTRAST = """element => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(element);
  const text = element instanceof SVGElement ? style.fill : style.color;
  // from the page upwards, each background over what is behind it
  const layers = [];
  for (let behind = element; behind; behind = behind.parentElement) layers.unshift(numbers(getComputedStyle(behind).backgroundColor));
  const over = (below, [r, g, b, alpha = 1]) => [r, g, b].map((c, i) => c * alpha + below[i] * (1 - alpha));
  const surface = layers.reduce(over, [255, 255, 255]);
  const [one, other] = [luminance(numbers(text).slice(0, 3)), luminance(surface)].sort((a, b) => b - a);
  return (one + 0.05) / (other + 0.05);
}"""


@pytest.mark.parametrize("layer", [0, 1])
def test_page_numbers_equal_the_tables(browser: Browser, layer: int):
    page = _open(browser, f"plain/reports/tiny/layer={layer}/index.html").page
    expected = json.loads((PAGES / "expected.json").read_text())[str(layer)]
    shown: dict[str, dict[str, float]] = {}
    for cell in page.query_selector_all("#main-table td[data-metric]"):
        method = cell.evaluate("cell => cell.closest('tbody').dataset.method")
        value, text = float(cell.get_attribute("data-value") or "nan"), cell.evaluate("cell => cell.firstChild.textContent")
        shown.setdefault(method, {})[cell.get_attribute("data-metric") or ""] = value
        assert _written(text) == pytest.approx(value, rel=1e-2, abs=_last_digit(text))
    assert shown == {method: pytest.approx(values, rel=1e-12) for method, values in expected.items()}


def _written(text: str) -> float:
    return float(text.rstrip("%").replace(",", "")) / (100 if text.endswith("%") else 1)


def _last_digit(text: str) -> float:
    """One in the last place that is written."""
    decimals = len(text.rstrip("%").partition(".")[2]) + (2 if text.endswith("%") else 0)
    return 10.0**-decimals if "e" not in text else 0.0


def test_hostile_names_are_rendered_as_text(browser: Browser):
    opened = _open(browser, HOSTILE)
    opened.draw()
    assert HOSTILE_TEXT in opened.page.inner_text("#main-table")
    assert opened.page.title() == "tiny, layer 1"
    assert opened.page.query_selector("main img[onerror]") is None
    assert opened.complaints == []


def test_a_row_expands_to_its_saes(browser: Browser):
    page = _open(browser, REPORT).page
    details = page.locator("#main-table tbody[data-method='boosting'] details")
    assert not details.locator("li").first.is_visible()
    details.locator("summary").click()
    assert details.locator("li").count() == 9  # three rounds of three seeds
    assert details.locator("li").first.is_visible()
    assert "round 1" in details.locator("li").first.inner_text()


@pytest.mark.parametrize(("path", "table"), [(REPORT, "#main-table"), (LEADERBOARD, "#leaderboard")])
def test_tables_fit_at_1280_pixels_and_show_numbers_next_to_the_method_at_400(browser: Browser, path: str, table: str):
    fits = "table => [table.scrollWidth, table.parentElement.clientWidth]"
    width, place = _open(browser, path, 1280).page.eval_on_selector(table, fits)
    assert width <= place
    page = _open(browser, path, 400).page
    seen = """table => {
      const row = table.querySelector("tbody tr"), place = table.parentElement.getBoundingClientRect();
      const heading = row.querySelector("th").getBoundingClientRect();
      const inside = (cell) => cell.getBoundingClientRect().left >= heading.right - 1 && cell.getBoundingClientRect().right <= place.right;
      return [heading.left, [...row.querySelectorAll("td[data-metric]")].filter(inside).map((cell) => cell.dataset.metric)];
    }"""
    left, columns = page.eval_on_selector(table, seen)
    assert len(columns) >= 3 and columns[0] == "explained_variance"
    page.eval_on_selector(table, "table => { table.parentElement.scrollLeft = 1e4; }")
    still, columns = page.eval_on_selector(table, seen)
    assert still == left and len(columns) >= 2 and "explained_variance" not in columns


@pytest.mark.parametrize("width", [1280, 400])
def test_links_to_features_and_experiments_are_visible_in_every_state_of_the_navigation(browser: Browser, width: int):
    page = _open(browser, REPORT, width).page
    for scrolled in (0, 1e4):
        page.eval_on_selector("nav", "(nav, scrolled) => { nav.scrollLeft = scrolled; }", scrolled)
        after = page.locator("nav").bounding_box()
        assert after and after["width"] > 100
        edge = after["x"] + after["width"]
        for selector in ("header a.apart[href='features.html']", "header a.apart[href$='leaderboard/index.html']", "#theme"):
            box = page.locator(selector).bounding_box()
            assert box and edge <= box["x"] and box["x"] + box["width"] <= width, selector
            edge = box["x"] + box["width"]
    names = [text.strip() for text in page.locator("header a.apart").all_inner_texts()]
    assert names == (["All features", "All experiments"] if width == 1280 else ["Features", "Experiments"])


@pytest.mark.parametrize("place", ["header", "#top", "#features"])
def test_the_report_links_to_its_features(browser: Browser, place: str):
    page = _open(browser, REPORT).page
    page.click(f"{place} a[href='features.html']")
    page.wait_for_selector("#rows tr[data-row]")


def test_the_legend_scrolls_away_with_the_plots(browser: Browser):
    page = _open(browser, REPORT).page
    top = "document.querySelector('.legend').getBoundingClientRect().top"
    for section, is_seen in (("members", True), ("lineage", False), ("words", False)):
        page.evaluate("id => document.getElementById(id).scrollIntoView({ behavior: 'instant' })", section)
        assert (page.evaluate(top) >= 0) == is_seen, section


def test_an_expanded_row_fits_a_narrow_view(browser: Browser):
    page = _open(browser, REPORT, 400).page
    details = page.locator("#main-table tbody[data-method='boosting'] details")
    details.locator("summary").click()
    for scrolled in (0, 1e4):
        page.eval_on_selector("#main-table", "(table, scrolled) => { table.parentElement.scrollLeft = scrolled; }", scrolled)
        for each in (details.locator("p").first, details.locator("li").first, details.locator("li").last):
            box = each.bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 400
            assert each.evaluate("each => each.scrollWidth <= each.clientWidth")


def test_links_use_the_entered_address_of_the_dagster_ui(browser: Browser):
    page = _open(browser, REPORT).page
    link = page.locator("#lineage a.box").first
    assert (link.get_attribute("href") or "").startswith("http://127.0.0.1:3000/assets/tiny/")
    others = [href for href in page.eval_on_selector_all("a", "links => links.map((a) => a.href)") if "/assets/" in href]
    page.fill("#ui-address input", "http://lab:8080/")
    assert link.get_attribute("href") == "http://lab:8080/assets/tiny/tokens"
    page.fill("#ui-address input", "javascript:alert(1)")
    assert link.get_attribute("href") == "http://lab:8080/assets/tiny/tokens"
    assert "begins with http" in page.inner_text("#ui-address output")
    page.reload()
    assert page.input_value("#ui-address input") == "http://lab:8080"
    moved = [href for href in page.eval_on_selector_all("a", "links => links.map((a) => a.href)") if "/assets/" in href]
    assert moved == [href.replace("http://127.0.0.1:3000", "http://lab:8080") for href in others] and len(moved) > 20
    page.fill("#ui-address input", "")
    assert (link.get_attribute("href") or "").startswith("http://127.0.0.1:3000/assets/tiny/")
    assert page.evaluate("localStorage.getItem('saeens-ui')") is None
    page.press("#ui-address input", "Tab")
    assert page.input_value("#ui-address input") == "http://127.0.0.1:3000"
    page.reload()
    assert page.input_value("#ui-address input") == "http://127.0.0.1:3000"
    assert (link.get_attribute("href") or "").startswith("http://127.0.0.1:3000/assets/tiny/")


def test_switching_the_theme_switches_the_plots(browser: Browser):
    opened = _open(browser, REPORT, 1280, "light")
    opened.draw()
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.xtick text')).fill]"
    before = opened.page.evaluate(colours)
    opened.page.click("#theme")
    opened.page.wait_for_function(f"before => ({colours}).every((colour, i) => colour !== before[i])", arg=before)
    opened.page.reload()
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_hiding_a_method_hides_it_in_all_plots(browser: Browser):
    opened = _open(browser, REPORT)
    opened.draw()
    shown = "document.querySelectorAll('[data-figure=\"explained_variance_by_members\"] .scatterlayer .trace').length"
    before = opened.page.evaluate(shown)
    opened.page.click(".legend button[data-method='boosting']")
    opened.page.wait_for_function(f"before => {shown} === before - 1", arg=before)
    opened.page.click(".legend button[data-method='boosting']")
    opened.page.wait_for_function(f"before => {shown} === before", arg=before)


def _saved(page: Page, figure: str, form: str) -> tuple[str, bytes]:
    """Press the button of a plot that saves it; return the name and the content of the file."""
    plot = page.locator(f"[data-figure='{figure}']")
    plot.hover()
    with page.expect_download() as download:
        plot.get_by_role("button", name=f"Save as {form.upper()}").click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_plot_is_saved_as_svg_with_its_legend_in_dark_text_on_white(browser: Browser, scheme: str):
    opened = _open(browser, REPORT, 1280, scheme)
    opened.draw()
    opened.page.click(".legend button[data-method='expanded']")
    for figure, axis in (("mse_by_members", "error (log scale)"), ("training_loss", "loss (log scale)")):
        name, content = _saved(opened.page, figure, "svg")
        assert name == f"tiny_layer_1_{figure}.svg"
        svg = ET.fromstring(content)
        assert (svg.attrib["width"], svg.attrib["height"]) == ("800", "520")
        behind = next(svg.iter(f"{SVG}rect"))
        assert (behind.attrib["width"], behind.attrib["height"]) == ("800", "520") and "rgb(255, 255, 255)" in behind.attrib["style"]
        entries = [text.text for text in svg.iter(f"{SVG}text") if text.attrib.get("class") == "legendtext"]
        methods = ["bagging", "boosting", "expanded (L0 matched)"]
        assert entries == (["single", *methods] if figure == "mse_by_members" else methods)
        texts = [text for text in svg.iter() if text.tag in (f"{SVG}text", f"{SVG}tspan") and "fill: rgb" in text.attrib.get("style", "")]
        assert any(text.text == axis for text in svg.iter())
        colours = {
            tuple(map(int, match)) for text in texts for match in re.findall(r"fill: rgb\((\d+), (\d+), (\d+)\)", text.attrib["style"])
        }
        assert colours and all(max(colour) < 0x60 for colour in colours)
    assert opened.complaints == []


def test_a_plot_is_saved_as_png_of_the_same_size_in_every_view(browser: Browser):
    for width in (1280, 400):
        opened = _open(browser, REPORT, width, "dark")
        opened.draw()
        name, content = _saved(opened.page, "explained_variance_for_l0", "png")
        assert name == "tiny_layer_1_explained_variance_for_l0.png"
        assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (2400, 1560)
        assert opened.complaints == []


@pytest.mark.parametrize("path", [REPORT, LEADERBOARD])
def test_the_buttons_of_a_plot_send_nothing_anywhere(browser: Browser, path: str):
    opened = _open(browser, path)
    opened.draw()
    for plot in opened.page.query_selector_all(".plot"):
        titles = [button.get_attribute("data-title") for button in plot.query_selector_all(".modebar-btn")]
        assert titles == ["Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Save as SVG", "Save as PNG"]
    if path == REPORT:
        assert "saeens report tiny --figures figures" in opened.page.inner_text(".legend + .note")


@pytest.mark.parametrize("width", [1280, 400])
def test_titles_and_labels_of_axes_stay_within_their_plot_and_apart(browser: Browser, width: int):
    opened = _open(browser, REPORT, width)
    opened.draw()
    boxes = "(plot, selector) => [...plot.querySelectorAll(selector)].map((each) => each.getBoundingClientRect().toJSON())"
    for plot in opened.page.query_selector_all(".plot"):
        figure, whole = plot.get_attribute("data-figure"), plot.bounding_box()
        assert whole
        for title in plot.evaluate(boxes, ".xtitle, .ytitle"):
            assert whole["x"] - 1 <= title["left"] and title["right"] <= whole["x"] + whole["width"] + 1, figure
            assert whole["y"] - 1 <= title["top"] and title["bottom"] <= whole["y"] + whole["height"] + 1, figure
        seen = [box for box in plot.evaluate(boxes, ".xtick text") if whole["x"] <= box["left"] <= whole["x"] + whole["width"]]
        assert len(seen) >= 2, figure
        assert all(one["right"] < other["left"] for one, other in pairwise(sorted(seen, key=lambda box: box["left"]))), figure
        title = plot.evaluate(boxes, ".ytitle")
        assert all(title[0]["right"] < box["left"] for box in plot.evaluate(boxes, ".ytick text")), figure


def test_hovering_over_a_plot_shows_its_numbers(browser: Browser):
    opened = _open(browser, REPORT)
    opened.draw()
    point = opened.page.locator("[data-figure='explained_variance_by_members'] .scatterlayer .trace path.point").nth(1)
    point.hover(force=True)
    opened.page.wait_for_selector("[data-figure='explained_variance_by_members'] .hoverlayer .hovertext")


def test_printing_draws_every_plot_in_light_colours(browser: Browser):
    opened = _open(browser, REPORT, 1280, "dark")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "light"
    plots = opened.page.query_selector_all(".plot")
    widths = [(plot.query_selector(".main-svg") or plot).evaluate("svg => svg.clientWidth") for plot in plots]
    assert len(plots) >= 15 and set(widths) == {325}
    for plot in plots:
        boxes = plot.evaluate("plot => [...plot.querySelectorAll('.xtick text')].map((text) => text.getBoundingClientRect())")
        boxes.sort(key=lambda box: box["left"])
        assert all(one["right"] < other["left"] for one, other in pairwise(boxes)), plot.get_attribute("data-figure")
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"


def _column(page: Page, name: str) -> list[str]:
    """The values of the rows that are shown."""
    return page.evaluate(
        """name => {
          const rows = [...document.querySelectorAll("#leaderboard tbody tr")].filter((row) => !row.hidden);
          return rows.map((row) => row.querySelector(`[data-key="${name}"]`).dataset.value);
        }""",
        name,
    )


def test_the_leaderboard_is_sorted_by_any_column(browser: Browser):
    page = _open(browser, LEADERBOARD).page
    page.click("#leaderboard button[data-sort='explained_variance']")
    values = list(map(float, _column(page, "explained_variance")))
    assert len(values) == 10
    assert values == sorted(values, reverse=True) and len(set(values)) > 5
    page.click("#leaderboard button[data-sort='explained_variance']")
    assert list(map(float, _column(page, "explained_variance"))) == sorted(values)
    page.click("#leaderboard button[data-sort='mse']")  # less is better: the best first
    assert list(map(float, _column(page, "mse"))) == sorted(map(float, _column(page, "mse")))
    page.click("#leaderboard button[data-sort='method']")
    assert _column(page, "method") == sorted(_column(page, "method"))
    assert page.get_attribute("#leaderboard th[aria-sort]", "aria-sort") == "ascending"


def test_the_leaderboard_is_filtered(browser: Browser):
    page = _open(browser, LEADERBOARD).page
    page.select_option("[data-filter='method']", "boosting")
    assert _column(page, "method") == ["boosting"] * 2
    page.select_option("[data-filter='layer']", "0")
    assert _column(page, "layer") == ["0"]
    assert page.inner_text("#shown") == "1 of 10 rows"
    page.select_option("[data-filter='method']", "")
    page.fill("[data-find]", "L0 matched")
    assert _column(page, "method") == ["expanded_l0_matched"]
    page.fill("[data-find]", "expanded_l0")  # as the tables call it
    assert _column(page, "method") == ["expanded_l0_matched"]


@pytest.mark.parametrize("width", [1280, 400])
def test_filters_can_be_cleared_if_no_row_of_the_leaderboard_matches(browser: Browser, width: int):
    opened = _open(browser, LEADERBOARD, width)
    page, empty = opened.page, opened.page.locator("#no-row")
    assert not empty.is_visible()
    page.select_option("[data-filter='method']", "boosting")
    page.fill("[data-find]", "in no row")
    page.wait_for_selector("#no-row:has-text('No row matches.')")
    assert page.inner_text("#shown") == "0 of 10 rows" and _column(page, "method") == []
    page.get_by_role("button", name="Clear the filters").click()
    assert page.inner_text("#shown") == "10 of 10 rows" and len(_column(page, "method")) == 10
    assert not empty.is_visible()
    assert opened.complaints == []


def test_the_leaderboard_links_to_reports_and_back(browser: Browser):
    page = _open(browser, LEADERBOARD).page
    page.click("#leaderboard tbody tr:first-child a")
    page.wait_for_selector("#main-table")
    page.click("header a.apart[href$='leaderboard/index.html']")
    page.wait_for_selector("#leaderboard")


# the feature browser


def _features(browser: Browser, path: str = FEATURES, width: int = 1280, scheme: Any = "light") -> Opened:
    opened = _open(browser, path, width, scheme)
    opened.page.wait_for_selector("#loading", state="hidden")
    if "#" in path:
        opened.page.wait_for_selector("#one h1")
    return opened


def _table(seed: int = 1, table: str = "features") -> list[dict[str, Any]]:
    """Rows of both ensembles of a table, as `write_pages.py` read them."""
    rows = [json.loads(line) for line in (PAGES / f"{table}.ndjson").read_text().splitlines()]
    return sorted(
        (row for row in rows if row["seed"] == seed and row["method"] in ("bagging", "boosting")),
        key=lambda row: (row["method"], row["member"], row["index"]),
    )


def _shown_features(page: Page) -> list[tuple[str, int, int]]:
    """The first rows of the table, from top."""
    texts = page.locator("#rows tr[data-row]").evaluate_all(
        "rows => rows.map(row => [...row.cells].slice(0, 3).map(cell => cell.textContent))"
    )
    return [(method[1:], int(member), int(index)) for method, member, index in texts]


def _keys(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(row["method"], row["member"], row["index"]) for row in rows]


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("path", [FEATURES, f"{FEATURES}#boosting/2/5", HOSTILE_FEATURES, f"{HOSTILE_FEATURES}#bagging/1/0"])
def test_features_open_without_console_errors_and_fit(browser: Browser, path: str, width: int, scheme: str):
    opened = _features(browser, path, width, scheme)
    opened.page.wait_for_selector(".match .context" if "#" in path else "#rows tr[data-row]")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("main p", "td", "th", "dd", ".token", ".peak", ".byte", "figcaption", "small", ".match .value"):
        for element in opened.page.query_selector_all(selector)[:20]:
            assert opened.page.evaluate(_CONTRAST, element) >= 4.5, (selector, scheme)
    assert opened.complaints == []


@pytest.mark.parametrize(
    ("heading", "column", "ascending"),
    [
        ("density", "density", False),
        ("near", "nearest_cosine", False),
        ("seed", "nearest_other_seed_cosine", False),
        ("index", "index", True),
    ],
)
def test_features_are_sorted_by_any_column(browser: Browser, heading: str, column: str, ascending: bool):
    page, rows = _features(browser).page, _table()
    for sign in (1, -1) if ascending else (-1, 1):
        page.click(f"#rows button[data-sort='{heading}']")
        shown = _shown_features(page)
        values = dict(zip(_keys(rows), (row[column] for row in rows), strict=True))
        assert [values[key] for key in shown] == pytest.approx(
            sorted(values.values(), key=lambda value, sign=sign: sign * value)[: len(shown)], abs=1e-6
        )
        assert page.get_attribute("#rows th[aria-sort]", "aria-sort") == ("ascending" if sign == 1 else "descending")


def test_features_without_a_value_come_last(browser: Browser):
    page, rows = _features(browser).page, _table()
    dead = [row for row in rows if row["mean_activation"] is None]
    assert dead
    for _ in range(2):
        page.click("#rows button[data-sort='mean']")
        page.focus("#rows")
        page.keyboard.press("End")
        page.wait_for_function("n => document.querySelector(`#row-${n}`)", arg=len(rows) - 1)
        assert [key for key in _shown_features(page) if key in _keys(dead)][-1] == _keys(dead)[-1]
        page.keyboard.press("Home")


def test_features_are_filtered_and_searched(browser: Browser):
    page, rows = _features(browser).page, _table()

    def expect(chosen: list[dict[str, Any]]) -> None:
        assert 0 < len(chosen) < len(rows)
        page.wait_for_function(
            "text => document.getElementById('features-shown').textContent === text", arg=f"{len(chosen)} of {len(rows)} features"
        )
        shown = _shown_features(page)
        assert shown == _keys(chosen)[: len(shown)]

    page.select_option("[name='method']", "boosting")
    expect([row for row in rows if row["method"] == "boosting"])
    page.select_option("[name='member']", "2")
    expect([row for row in rows if row["method"] == "boosting" and row["member"] == 2])
    page.select_option("[name='method']", "")
    page.select_option("[name='member']", "")
    page.select_option("[name='near']", "shared")
    expect([row for row in rows if row["nearest_cosine"] >= 0.7])
    page.select_option("[name='near']", "unique")
    page.select_option("[name='seeds']", "unique")
    expect([row for row in rows if row["nearest_cosine"] < 0.7 and row["nearest_other_seed_cosine"] < 0.7])
    page.select_option("[name='near']", "")
    page.select_option("[name='seeds']", "")
    page.select_option("[name='dead']", "dead")
    expect([row for row in rows if row["density"] == 0])
    page.select_option("[name='dead']", "")
    page.fill("[name='from']", "5")
    page.fill("[name='to']", "20")
    expect([row for row in rows if 0.05 <= row["density"] <= 0.2])
    page.fill("[name='from']", "")
    page.fill("[name='to']", "")
    word = next(token for row in rows for token in json.loads(row["top_tokens"]) if token.strip().isalpha()).strip()
    explained = _table(table="autointerp")
    explanations = dict(zip(_keys(explained), (row["explanation"] or "" for row in explained), strict=True))
    for text in (word.upper(), "Kind 7"):
        page.fill("[name='find']", text)
        parts = text.lower().split()
        found = [
            row
            for row, key in zip(rows, _keys(rows), strict=True)
            if all(
                any(part in token.lower() for token in json.loads(row["top_tokens"])) or part in explanations.get(key, "") for part in parts
            )
        ]
        expect(found)


def test_tokens_are_searched_as_displayed_and_regardless_of_case(browser: Browser, tmp_path: Path):
    tokens = {"d": " def", "e": "Def", "s": "\n", "t": "\t\t", "h": "    ", "a": "a\r", "o": "a·b"}
    changed = _changed(tmp_path, lambda data: data.update(vocabulary=[tokens.get(token, token) for token in data["vocabulary"]]))
    page, rows = _features(browser, changed).page, _table()
    looked_for = {
        " def": [" def"],
        "·DEF": [" def"],
        "def": ["def"],
        "def ": ["def"],  # a space after a word is typed on the way to the next
        "↵": ["\n"],
        "⇥": ["\t"],
        "a␍": ["a\r"],
        "  ": ["  "],
        "a·b": ["a·b"],
        " def ↵": [" def", "\n"],
    }
    for text, parts in looked_for.items():
        page.fill("[name='find']", text)
        found = [
            row
            for row in rows
            if all(any(part in tokens.get(token, token).lower() for token in json.loads(row["top_tokens"])) for part in parts)
        ]
        assert 0 < len(found) < len(rows), text
        page.wait_for_function(
            "text => document.getElementById('features-shown').textContent === text", arg=f"{len(found)} of {len(rows)} features"
        )
        shown = _shown_features(page)
        assert shown == _keys(found)[: len(shown)], text


@pytest.mark.parametrize("width", [1280, 400])
def test_filters_can_be_cleared_if_no_feature_matches(browser: Browser, width: int):
    opened = _features(browser, width=width)
    page, n = opened.page, len(_table())
    empty = page.locator("#no-feature")
    assert not empty.is_visible()
    page.select_option("[name='method']", "boosting")
    page.fill("[name='from']", "1")
    page.fill("[name='find']", "in no token")
    page.wait_for_selector("#no-feature:has-text('No feature matches.')")
    assert page.inner_text("#features-shown") == f"0 of {n} features" and page.locator("#rows tr[data-row]").count() == 0
    page.get_by_role("button", name="Clear the filters").click()
    page.wait_for_selector("#rows tr[data-row]")
    assert page.inner_text("#features-shown") == f"{n} of {n} features" and not empty.is_visible()
    assert [page.input_value(f"[name='{name}']") for name in ("method", "from", "find")] == ["", "", ""]
    assert opened.complaints == []


def test_a_narrow_view_shows_the_tokens_of_features_first(browser: Browser):
    page, row = _features(browser, width=400).page, _table()[0]
    cells = page.locator("#rows tr[data-row]").first.locator("td")
    assert page.locator("#rows thead th").all_inner_texts()[:3] == ["feature", "most active on", "explanation"]
    assert page.inner_text("#rows tr[data-row] td >> nth=0") == f"■member {row['member']} · {row['index']}"
    token = cells.nth(1).locator(".token").first
    assert token.inner_text() == "".join({" ": "·", "\n": "↵", "\t": "⇥"}.get(each, each) for each in json.loads(row["top_tokens"])[0])
    box = token.bounding_box()
    assert box and box["x"] + box["width"] <= 400
    page.eval_on_selector("#rows", "rows => { rows.scrollLeft = 1e4; }")
    first, last = cells.first.bounding_box(), cells.last.bounding_box()
    assert first and last and first["x"] < 30 and first["x"] + first["width"] <= last["x"] and last["x"] + last["width"] <= 400
    page.click("#rows button[data-sort='density']")
    assert page.get_attribute("#rows th[aria-sort]", "aria-sort") == "descending"
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_selector("#rows thead th:has-text('index')")
    assert page.locator("#rows thead th").first.inner_text() == "method"
    best = max(_table(), key=lambda row: row["density"])
    assert _shown_features(page)[0] == _keys([best])[0]


def test_features_are_filtered_by_whether_they_are_explained(browser: Browser):
    page, rows, explained = _features(browser).page, _table(), _table(table="autointerp")
    statuses = {(row["method"], row["member"], row["index"]): row["status"] for row in explained}
    with_text = {(row["method"], row["member"], row["index"]) for row in explained if row["explanation"]}
    assert {"scored", "malformed answer"} <= set(statuses.values()) and len(with_text) < len(rows)
    wanted = {
        "yes": [key for key in _keys(rows) if key in with_text],
        "no": [key for key in _keys(rows) if key not in with_text],
        "malformed answer": [key for key in _keys(rows) if statuses.get(key) == "malformed answer"],
        "": _keys(rows),
    }
    for choice, expected in wanted.items():
        page.select_option("[name='explained']", choice)
        page.wait_for_function(
            "text => document.getElementById('features-shown').textContent === text", arg=f"{len(expected)} of {len(rows)} features"
        )
        assert _shown_features(page) == expected[: len(_shown_features(page))]
    n_asked = sum(not status.startswith("too few") for status in statuses.values())
    n_scored = sum(status == "scored" for status in statuses.values())
    counts = f"Of {len(statuses)} features that were drawn, fake was asked about {n_asked}; {n_scored} are scored."
    assert counts in page.inner_text("#outcome")


def test_a_features_page_shows_its_scores_and_the_outcome_of_its_explanation(browser: Browser):
    opened = _features(browser)
    explained = _table(table="autointerp")
    scored = next(row for row in explained if row["control_score"] not in (None, row["detection_score"]))
    failed = next(row for row in explained if row["status"] == "malformed answer")
    drawn = _keys(explained)
    undrawn = next(key for key in _keys(_table()) if key not in drawn)
    for key, lines in (
        (
            _keys([scored])[0],
            [f"detection score\n{_short(scored['detection_score'])} balanced", f"control score\n{_short(scored['control_score'])} with"],
        ),
        (_keys([failed])[0], ["status\nmalformed answer: no answer that could be read"]),
        (undrawn, ["explanation\nnone: the feature is not among those that were drawn"]),
    ):
        method, member, index = key
        opened.page.evaluate("hash => { location.hash = hash }", f"#{method}/{member}/{index}")
        opened.page.wait_for_function("text => document.querySelector('#one h1')?.textContent.endsWith(text)", arg=f"{member} · {index}")
        facts = opened.page.inner_text("#one dl")
        for line in lines:
            assert line in facts
    assert opened.complaints == []


def _short(value: float) -> str:
    return f"{value:.3g}"


@pytest.mark.parametrize("width", [1280, 400])
def test_headings_have_room_for_their_arrows_and_filters_are_aligned(browser: Browser, width: int):
    page = _features(browser, width=width).page
    cut_off = "ths => ths.filter((th) => th.scrollWidth > th.clientWidth).map((th) => th.textContent)"
    assert page.locator("#rows thead th").evaluate_all(cut_off) == []
    places = page.locator("#feature-filters label").evaluate_all(
        "labels => labels.map((label) => [label, label.querySelector('input, select')].map((each) => each.getBoundingClientRect().top))"
    )
    assert len(places) == 9
    assert len({round(field - label) for label, field in places}) == 1


def test_a_histogram_has_a_description(browser: Browser):
    row = next(row for row in _table() if row["method"] == "boosting" and row["density"] > 0)
    page = _features(browser, f"{FEATURES}#boosting/{row['member']}/{row['index']}").page
    assert page.locator(".histogram .of-axis").all_inner_texts() == ["test tokens", "activation"]
    assert "Those on which the feature is silent are left out." in page.inner_text(".histogram figcaption")
    bars = page.locator(".histogram rect title").evaluate_all("titles => titles.map((title) => title.textContent)")
    most = max(int(re.search(r"([\d,]+) tokens", text)[1].replace(",", "")) for text in bars)  # pyright: ignore[reportOptionalSubscript]
    assert page.locator(".histogram .counts span").first.inner_text() == f"{most:,}"
    facts = page.inner_text("#one dl")
    assert "in other rounds" in facts and "in other members" not in facts


def test_bytes_that_are_no_character_are_shown_in_hexadecimal(browser: Browser):
    page = _features(browser, f"{FEATURES}#boosting/2/5").page
    written = page.locator(".logits .byte")
    assert written.count() > 0 and "\ufffd" not in page.inner_text(".logits >> nth=0")
    text = written.first.inner_text()
    assert re.fullmatch("<0x[89A-F][0-9A-F]>", text)
    assert (written.first.get_attribute("title") or "").startswith(f"the byte {text[3:5]}, a part of a character")


def test_a_feature_opens_by_mouse_and_keyboard_and_closes_by_going_back(browser: Browser):
    page, rows = _features(browser).page, _table()
    page.locator("#rows tr[data-row] td:nth-child(4)").nth(2).click()
    page.wait_for_selector("#one .contexts, #one .note")
    assert page.evaluate("location.hash") == "#bagging/1/2"
    page.go_back()
    page.wait_for_selector("#rows tr[data-row]")
    page.focus("#rows")
    for _ in range(40):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    method, member, index = _keys(rows)[40]
    page.wait_for_function("hash => location.hash === hash", arg=f"#{method}/{member}/{index}")
    page.wait_for_selector("#one h1")
    page.keyboard.press("Escape")
    page.wait_for_selector("#rows tr.current")
    assert page.get_attribute("#rows tr.current", "data-row") == "40"


def test_a_features_page_shows_its_numbers_and_links_to_its_matches(browser: Browser):
    row = next(row for row in _table() if row["method"] == "boosting" and row["member"] == 2 and row["density"] > 0)
    page = _features(browser, f"{FEATURES}#boosting/2/{row['index']}").page
    facts = page.inner_text("#one dl")
    assert f"cosine {row['nearest_cosine']:.3f}" in facts and f"cosine {row['nearest_other_seed_cosine']:.3f}" in facts
    where = f"round {row['nearest_other_seed_member']} · {row['nearest_other_seed_index']} of seed {row['nearest_other_seed']}"
    assert where in facts
    assert page.locator(".histogram rect").count() > 0 and page.locator(".logits li").count() == 20
    assert page.locator(".contexts .peak").count() == page.locator(".contexts li").count() > 0
    heat = page.locator(".contexts .peak").first.evaluate("token => getComputedStyle(token).backgroundColor")
    assert heat != page.locator(".contexts .token:not(.peak):not([style])").first.evaluate(
        "token => getComputedStyle(token).backgroundColor"
    )
    matches = json.loads(row["matches"])
    assert page.locator(".match h3").all_inner_texts() == [f"round {member} · {index}" for member, index, _ in matches]
    page.wait_for_selector(".match .context, .match .tokens")
    page.locator(".match h3 a").last.click()
    member, index, _ = matches[-1]
    page.wait_for_function("hash => location.hash === hash", arg=f"#boosting/{member}/{index}")
    page.wait_for_function("text => document.querySelector('#one h1').textContent.endsWith(text)", arg=f"round {member} · {index}")
    page.go_back()
    page.wait_for_function("text => document.querySelector('#one h1').textContent.endsWith(text)", arg=f"round 2 · {row['index']}")


def test_a_missing_feature_is_named(browser: Browser):
    page = _open(browser, f"{FEATURES}#boosting/9/1").page
    page.wait_for_selector("#loading:has-text('There is no feature boosting/9/1 here.')")
    assert page.locator("#rows tr[data-row]").count() > 0


def _changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the page of features whose list was changed."""
    shutil.copytree((PAGES / FEATURES).parent, folder / "report")
    file = folder / "report" / "features" / "list.js"
    data = json.loads(gzip.decompress(base64.b64decode(file.read_text().split('"')[3])))
    change(data)
    packed = base64.b64encode(gzip.compress(json.dumps(data).encode(), 1)).decode()
    file.write_text(f'saeensFeatures("list","{packed}");\n')
    return str(folder / "report" / "features.html")


def test_131072_features_are_listed_sorted_and_searched(browser: Browser, tmp_path: Path):
    n_members, width = 8, 8192
    n = 2 * n_members * width

    def change(data: dict[str, Any]) -> None:
        data["groups"] = [[method, j, width] for method in ("bagging", "boosting") for j in range(1, n_members + 1)]
        for name, values in data["columns"].items():
            data["columns"][name] = (values * -(-n // len(values)))[:n]
        data["columns"]["member"] = [i // width % n_members + 1 for i in range(n)]
        data["columns"]["index"] = [i % width for i in range(n)]

    opened = _features(browser, _changed(tmp_path, change))
    page = opened.page
    assert page.inner_text("#features-shown") == "131,072 of 131,072 features"
    page.click("#rows button[data-sort='density']")
    most = max(row["density"] for row in _table())
    assert float(page.inner_text("#rows tr[data-row] td >> nth=3").rstrip("%")) == pytest.approx(100 * most, rel=1e-2)
    page.fill("[name='find']", "in no token")
    page.wait_for_selector("#no-feature:has-text('No feature matches.')")
    assert opened.complaints == []


def test_hostile_tokens_are_rendered_as_text(browser: Browser):
    opened = _features(browser, f"{HOSTILE_FEATURES}#bagging/1/0")
    opened.page.wait_for_selector(".match .context")
    for place in ("#one .contexts", "#one .logits", "#one dl", "#one .matches"):
        shown = opened.page.text_content(place) or ""
        assert HOSTILE_TEXT.replace(" ", "·") in shown, place
    opened.page.click(".steps a")
    opened.page.wait_for_selector("#rows tr[data-row]")
    assert HOSTILE_TEXT.replace(" ", "·") in (opened.page.text_content("#rows") or "")
    assert opened.page.query_selector("main img") is None
    assert opened.page.title() == "Features of tiny, layer 1"
    assert opened.complaints == []


def test_printing_shows_rows_outside_the_viewport(browser: Browser):
    page = _features(browser, FEATURES, 1280, "dark").page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#rows tr[data-row]").count() == 60
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#rows tr[data-row]").count() < 60
