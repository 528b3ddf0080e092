"""The pages in a browser, opened from disk: drawn, legible, sortable, quiet, and with the tables' numbers. `make browser-test` runs this.

The pages are those that `write_pages.py` wrote into the folder that SAEENS_TEST_PAGES names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PAGES = Path(os.environ.get("SAEENS_TEST_PAGES", ""))
REPORT = "plain/reports/tiny/layer=1/index.html"
LEADERBOARD = "plain/reports/leaderboard/index.html"
HOSTILE = "hostile/reports/tiny/layer=1/index.html"
HOSTILE_TEXT = '<script>document.title = "taken"</script>'
VIEWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]


@dataclass
class Opened:
    """A page, and what it complained of or asked for that is not on disk."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def draw(self) -> None:
        """Scroll to every plot, which draws it."""
        for plot in self.page.query_selector_all(".plot"):
            plot.scroll_into_view_if_needed()
            self.page.wait_for_function("plot => plot.querySelector('.main-svg')", arg=plot)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "no chromium: `apt-get install chromium`, or name one in CHROMIUM"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


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
    page.goto((PAGES / path).as_uri())
    return opened


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("path", [REPORT, LEADERBOARD, HOSTILE])
def test_every_plot_is_drawn_without_a_complaint_and_fits(browser: Browser, path: str, width: int, scheme: str):
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
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(element);
  const text = element instanceof SVGElement ? style.fill : style.color;
  let behind = element;
  const isClear = (colour) => colour === "transparent" || numbers(colour)[3] === 0;
  while (behind && isClear(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const surface = getComputedStyle(behind || document.body).backgroundColor;
  const [one, other] = [luminance(text), luminance(surface)].sort((a, b) => b - a);
  return (one + 0.05) / (other + 0.05);
}"""


@pytest.mark.parametrize("layer", [0, 1])
def test_numbers_are_those_of_the_tables(browser: Browser, layer: int):
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


def test_hostile_names_are_text(browser: Browser):
    opened = _open(browser, HOSTILE)
    opened.draw()
    assert HOSTILE_TEXT in opened.page.inner_text("#main-table")
    assert opened.page.title() == "tiny, layer 1"
    assert opened.page.query_selector("main img[onerror]") is None
    assert opened.complaints == []


def test_a_row_unfolds_to_its_saes(browser: Browser):
    page = _open(browser, REPORT).page
    details = page.locator("#main-table tbody[data-method='boosting'] details")
    assert not details.locator("li").first.is_visible()
    details.locator("summary").click()
    assert details.locator("li").count() == 9  # three rounds of three seeds
    assert details.locator("li").first.is_visible()
    assert "round 1" in details.locator("li").first.inner_text()


def test_the_theme_is_switched_with_the_plots(browser: Browser):
    opened = _open(browser, REPORT, 1280, "light")
    opened.draw()
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.xtick text')).fill]"
    before = opened.page.evaluate(colours)
    opened.page.click("#theme")
    opened.page.wait_for_function(f"before => ({colours}).every((colour, i) => colour !== before[i])", arg=before)
    opened.page.reload()
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_method_is_hidden_in_all_plots(browser: Browser):
    opened = _open(browser, REPORT)
    opened.draw()
    shown = "document.querySelectorAll('[data-figure=\"explained_variance_by_members\"] .scatterlayer .trace').length"
    before = opened.page.evaluate(shown)
    opened.page.click(".legend button[data-method='boosting']")
    opened.page.wait_for_function(f"before => {shown} === before - 1", arg=before)
    opened.page.click(".legend button[data-method='boosting']")
    opened.page.wait_for_function(f"before => {shown} === before", arg=before)


def test_a_plot_shows_its_numbers_when_pointed_at(browser: Browser):
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
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"


def _column(page: Page, name: str) -> list[str]:
    """The values of the rows that are shown."""
    return page.evaluate(
        """name => {
          const column = [...document.querySelectorAll("#leaderboard thead button")].findIndex((button) => button.dataset.sort === name);
          const rows = [...document.querySelectorAll("#leaderboard tbody tr")].filter((row) => !row.hidden);
          return rows.map((row) => row.cells[column].dataset.value);
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


def test_the_leaderboard_leads_to_reports_and_back(browser: Browser):
    page = _open(browser, LEADERBOARD).page
    page.click("#leaderboard tbody tr:first-child a")
    page.wait_for_selector("#main-table")
    page.click("nav a.apart")
    page.wait_for_selector("#leaderboard")
