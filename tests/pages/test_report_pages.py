"""The pages of `report` and `compare` in a real browser.

Filter, search, sort, keyboard, widths, and accessibility by axe-core.

They need Chromium on the path (`apt-get install chromium`), and are not in the default suite: `make pages`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from pipeline.cli.main import main
from pipeline.report.page import render_page
from pipeline.report.report import make_report
from tests.unit.compare.test_compare import AFTER, BEFORE, REFERENCES, ok, write_output
from tests.unit.report.test_report import HOSTILE, write_run

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of each command."""
    root = tmp_path_factory.mktemp("run")
    report = root / "report.html"
    report.write_text(render_page(make_report(write_run(root).uri, 100)), encoding="utf-8")
    compare = root / "compare.html"
    sides = [
        write_output(
            root / name,
            {"0.tar": [ok(f"{HOSTILE}{n}", text, truth=REFERENCES[n]) for n, text in enumerate(texts)]},
        )
        for name, texts in (("a", BEFORE), ("b", AFTER))
    ]
    assert main(["compare", *sides, "--reference", "truth", "--html", str(compare)]) == 0
    return {"report": report, "compare": compare}


class Opened:
    """A page in a browser, with records of everything that must not happen on it."""

    def __init__(self, browser: Browser, file: Path, size=DESKTOP, scheme="light") -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def keys(self) -> list[str]:
        """Return the keys of the visible cards, in order."""
        found = "[...document.querySelectorAll('#sheet > li')].filter(c => !c.hidden).map(c => c.dataset.key)"
        return self.page.evaluate(found)

    def number(self, name: str) -> list[float]:
        """Return the values of the visible cards, in order; cards without the value are left out."""
        shown = "[...document.querySelectorAll('#sheet > li')].filter(c => !c.hidden && name in c.dataset)"
        return self.page.evaluate(f"(name) => {shown}.map(c => Number(c.dataset[name]))", name)

    @property
    def focused(self) -> str:
        return self.page.evaluate(
            "document.activeElement.closest('li')?.dataset.key ?? document.activeElement.id"
        )

    def wait_for_focus(self, key: str) -> None:
        """Wait until the card of `key` has the focus, which a closed dialog returns in a later task."""
        has_focus = "(key) => document.activeElement.closest('li')?.dataset.key === key"
        self.page.wait_for_function(has_focus, arg=key)


@pytest.fixture
def opened(browser, pages) -> Iterator[Opened]:
    shown = Opened(browser, pages["report"])
    yield shown
    assert not shown.problems and all(url.startswith(("file:", "data:")) for url in shown.requests)
    shown.context.close()


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "light"), (DESKTOP, "dark")])
def test_a_page_fits_and_has_no_serious_fault(browser, pages, name, size, scheme):
    """Nothing is wider than the screen or loaded, hostile texts do nothing, and axe-core finds no fault."""
    shown = Opened(browser, pages[name], size, scheme)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    found = Axe().run(shown.page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []
    assert not shown.problems
    assert {url.partition(":")[0] for url in shown.requests} <= {"file", "data"}
    shown.context.close()


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_phone_shows_every_column_without_scrolling(browser, pages, name):
    """The remedy of a failure, the last column, used to be outside the screen, next to empty lines."""
    shown = Opened(browser, pages[name], PHONE)
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert shown.page.evaluate(f"{cut}.map(e => e.ariaLabel)") == []
    shown.context.close()


def test_the_filters_stay_on_top_of_what_they_filter_only(opened):
    """They used to cover the first lines of every later section."""
    page, top = opened.page, "document.querySelector('.controls').getBoundingClientRect().top"
    page.locator("#sheet > li").last.scroll_into_view_if_needed()
    assert page.evaluate(top) == 0
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    assert page.evaluate(top) < -40


def test_the_sheet_searches(opened):
    total = len(opened.keys())
    opened.page.keyboard.press("/")
    assert opened.focused == "search"
    opened.page.keyboard.type("UNDECODABLE cut")
    assert 0 < len(opened.keys()) < total
    assert opened.page.inner_text("#shown") == f"{len(opened.keys())} of {total} rows of the sheet"
    opened.page.click("#clear")
    assert len(opened.keys()) == total


def test_the_sheet_shows_a_group(opened):
    failed = opened.page.locator("#sheet > li", has_text="undecodable").count()
    opened.page.select_option("#group", "failed")
    assert len(opened.keys()) == failed == 6


def test_the_sheet_sorts(opened):
    before = opened.keys()
    opened.page.select_option("#order", "key up")
    assert opened.keys() == sorted(before)
    opened.page.select_option("#order", "logprob up")
    assert opened.number("logprob") == sorted(opened.number("logprob"))
    opened.page.select_option("#order", "tokens down")
    assert opened.number("tokens") == sorted(opened.number("tokens"), reverse=True)
    opened.page.select_option("#order", "")
    assert opened.keys() == before


def test_bars_filter_the_sheet(opened):
    bar = opened.page.locator("g[data-field=tokens]").first
    bar.focus()
    opened.page.keyboard.press("Enter")
    assert bar.get_attribute("aria-pressed") == "true" and set(opened.number("tokens")) == {4}
    opened.page.locator("g[data-field=tokens]").nth(1).click()
    assert set(opened.number("tokens")) == {4, 5}
    before = opened.keys()
    opened.page.locator("g[data-field=likely]").last.click()
    assert 0 < len(opened.keys()) < len(before) and set(opened.number("tokens")) <= {4, 5}
    opened.page.click("#clear")
    assert len(opened.keys()) == 60 and bar.get_attribute("aria-pressed") == "false"


def test_the_keyboard_walks_and_enlarges(opened):
    keys, page = opened.keys(), opened.page
    page.locator("#sheet .enlarge").first.focus()
    page.keyboard.press("ArrowRight")
    assert opened.focused == keys[1]
    page.keyboard.press("ArrowDown")
    column = keys.index(opened.focused)
    assert column > 2
    page.keyboard.press("ArrowUp")
    assert opened.focused == keys[1]
    page.keyboard.press("End")
    assert opened.focused == keys[-1]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator("#large").is_visible() and keys[0] in page.inner_text("#large")
    page.keyboard.press("ArrowRight")
    assert keys[1] in page.inner_text("#large")
    page.keyboard.press("Escape")
    opened.wait_for_focus(keys[1])
    assert not page.locator("#large").is_visible()


def test_a_click_enlarges_a_picture(opened):
    opened.page.select_option("#group", "flagged")
    opened.page.locator("#sheet .enlarge:visible").first.click()
    image = opened.page.locator("#large img")
    assert image.is_visible() and image.bounding_box()["width"] > 256
    opened.page.click("#large .close")
    assert not image.is_visible()


def test_what_is_printed_has_no_controls(opened):
    opened.page.emulate_media(media="print")
    assert not opened.page.locator(".controls").is_visible()
    assert opened.page.locator("#sheet > li").first.is_visible()


def test_a_comparison_marks_words_and_is_filtered_by_its_bars(browser, pages):
    shown = Opened(browser, pages["compare"])
    assert shown.page.locator("#sheet mark", has_text="sleeps").count() == 1
    shown.page.select_option("#order", "distance up")
    assert shown.number("distance") == sorted(shown.number("distance"))
    shown.page.locator("g[data-field=distance]").first.click()
    assert len(set(shown.number("distance"))) == 1
    shown.context.close()
