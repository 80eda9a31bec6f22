"""The page in a real browser: on a phone and on a desktop, light and dark, everything is drawn, fits and is silent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, find_browser
from reports import bare_report, rich_report

from job.deliver.page.write import write_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

CHARTS = """Array.from(document.querySelectorAll("svg[data-chart]")).map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = Array.from(svg.querySelectorAll("path")).filter(path => {
    const style = getComputedStyle(path), size = path.getBBox();
    return size.width + size.height > 0 && (style.stroke !== "none" || style.fill !== "none");
  });
  const text = svg.querySelector("text").getBoundingClientRect();
  return {name: svg.dataset.chart, width: box.width, height: box.height, drawn: drawn.length, letters: text.height};
})"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(write_page(rich_report()), "utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_drawn_fits_and_is_silent(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.complaints.clear()
    browser.open(page, width=width, height=900, dark=dark)
    charts = browser.evaluate(CHARTS)
    assert len(charts) == 12
    for chart in charts:
        assert chart["width"] > 300 and chart["height"] > 80 and chart["drawn"] > 2, chart
        assert chart["letters"] > 10, chart
    assert browser.evaluate(OVERFLOW) == 0 and browser.evaluate("innerWidth") == width
    assert browser.complaints == []
    ground = browser.evaluate(GROUND)
    assert ground == ("rgb(14, 17, 22)" if dark else "rgb(245, 246, 248)")


def test_long_words_do_not_widen_a_phone(browser: Browser, tmp_path: Path) -> None:
    word = "x" * 400
    report = rich_report(
        run_id=word, reason=word, model={"id": word}, versions={word: word}, settings={word: {word: word}}, attempts=[
            attempt.model_copy(update={"machine": word}) for attempt in rich_report().attempts
        ]
    )  # fmt: skip
    for name, one in (("long", report), ("bare", bare_report(reason=word))):
        path = tmp_path / f"{name}.html"
        path.write_text(write_page(one), "utf-8")
        browser.open(path, width=400, height=900)
        assert browser.evaluate(OVERFLOW) == 0


def test_a_page_that_is_wrong_is_noticed(browser: Browser, tmp_path: Path) -> None:
    browser.complaints.clear()
    path = tmp_path / "wrong.html"
    path.write_text(
        '<div style="width:2000px">a</div><img src="missing.png"><script>console.log("x"); nothing()</script>', "utf-8"
    )
    browser.open(path, width=400, height=900)
    told = " ".join(browser.complaints)
    assert browser.evaluate(OVERFLOW) > 0
    assert "console.log" in told and "nothing is not defined" in told and "missing.png" in told
