"""In a real browser the pages are whole: nothing fails, nothing sticks out, formulas are drawn, the search finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pages import browser
from tests.pages.reading import DOCS, PAGES, built
from torch_simu.unlearning.report.page import Bullets, Section, Table, to_html

pytestmark = pytest.mark.skipif(browser.why_not() is not None, reason=f"no browser: {browser.why_not()}")

NAMES = [page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES]
DESKTOP, PHONE = 1280, 390
TALLEST = 20_000
"""Pixels of a page of the API at most, on a desktop: what is longer is more than one noun."""

MEASURE = """
const done = arguments[0], code = document.querySelectorAll("article td code, article .doc-object-name");
const ready = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
// A page whose width changes takes some frames until nothing sticks out.
const settled = async () => {
    for (let i = 0; i < 40 && document.documentElement.scrollWidth > innerWidth; i++)
        await new Promise(next => setTimeout(next, 50));
};
ready.then(settled).then(() => done({
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    title: document.querySelector("article h1").innerText,
    drawn: document.querySelectorAll("article .arithmatex mjx-container > svg").length,
    thin: [...document.querySelectorAll("article mjx-container > svg")]
        .filter(each => each.getBoundingClientRect().width < 3).length,
    wrong: document.querySelectorAll("article [data-mml-node=merror]").length,
    hidden: [...document.querySelectorAll("article table[data-prose]")]
        .filter(each => each.getBoundingClientRect().right > innerWidth).length,
}));
"""
SEARCH = """
const word = arguments[0], done = arguments[1], field = document.querySelector("[data-md-component=search-query]");
document.querySelector("#__search").checked = true;
field.focus();
field.value = word;
field.dispatchEvent(new Event("input", {bubbles: true}));
field.dispatchEvent(new KeyboardEvent("keyup", {key: word.at(-1), bubbles: true}));
const look = () => {
    const found = document.querySelector(".md-search-result__item a");
    const told = document.querySelector(".md-search-result__meta").innerText;
    if (/^no /i.test(told)) done("");
    else if (found && /\\d/.test(told)) done(found.getAttribute("href"));
    else setTimeout(look, 50);
};
look();
"""


class Opened(NamedTuple):
    driver: Any
    address: str
    failed: list[str]


@pytest.fixture(scope="module")
def pages(site: Path) -> Iterator[Opened]:
    with browser.served(site) as (address, failed), browser.opened() as driver:
        yield Opened(driver, address, failed)


def opened(pages: Opened, name: str) -> None:
    """Go to a page."""
    pages.driver.get(f"{pages.address}/{name}")


def measured(pages: Opened, width: int) -> dict[str, Any]:
    """What the browser says of the page that it shows on a screen of that width."""
    browser.resize(pages.driver, width)
    return pages.driver.execute_async_script(MEASURE)


def test_every_page_is_whole_and_as_wide_as_the_screen(pages: Opened, site: Path) -> None:
    pages.driver.get_log("browser")
    tall = {}
    for name in NAMES:
        opened(pages, name)
        desktop, phone = measured(pages, DESKTOP), measured(pages, PHONE)
        assert desktop["width"] <= DESKTOP and phone["width"] <= PHONE, (name, desktop["width"], phone["width"])
        assert phone["title"].strip() and not phone["hidden"], f"{name}: tables of sentences with columns out of sight"
        for screen in (desktop, phone):
            drawn = (screen["drawn"], screen["thin"], screen["wrong"])
            assert drawn == (built(site / name).formulas, 0, 0), f"{name}: formulas drawn, without a width, wrong"
        assert not [entry["message"] for entry in pages.driver.get_log("browser")], name
        assert not pages.failed
        if name.startswith("api/") and desktop["height"] > TALLEST:
            tall[name] = desktop["height"]
    assert not tall, "give a noun a page of its own"


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("SIMUOptimizer", r"api/optimizer\.html"),
        ("forget", r"(index|tutorials/.*|how_to/.*)\.html"),
        ("install", r"(index|tutorials/.*|how_to/.*)\.html"),
        ("license", r"reference/references\.html"),
    ],
)
def test_the_search_finds_the_page_of_a_word_first(word: str, page: str, pages: Opened) -> None:
    opened(pages, "concepts.html")
    measured(pages, DESKTOP)
    found = pages.driver.execute_async_script(SEARCH, word)
    assert re.fullmatch(page, found.split("?")[0].split("#")[0].removeprefix(pages.address + "/")), found


def test_a_report_is_as_wide_as_a_phone_and_breaks_no_word_of_a_row(pages: Opened, tmp_path: Path) -> None:
    name = "torch_simu.unlearning.report.keyed.keyed_hash." * 3
    table = Table(["Rule", "Figure", "Basis"], [["probability of every forgotten answer", "0.100", name]])
    (tmp_path / "report.html").write_text(to_html(name, [Section(name, [f"See {name}", Bullets([name]), table])]))
    browser.resize(pages.driver, PHONE)
    with browser.served(tmp_path) as (address, _):
        opened(pages._replace(address=address), "report.html")
        assert pages.driver.execute_script("return document.documentElement.scrollWidth") <= PHONE
        row = "return document.querySelector('tbody th').getBoundingClientRect().height"
        assert pages.driver.execute_script(row) < 5 * 24


def test_what_sticks_out_and_what_is_missing_is_seen(pages: Opened, site: Path, tmp_path: Path) -> None:
    table = '<table data-prose style="width: 3000px"><tr><td>x</td></tr></table>'
    wide = f'<article><h1>Wide</h1><img src="gone.png"><pre style="width: 2000px">x</pre>{table}</article>'
    (tmp_path / "wide.html").write_text(f"<!doctype html><title>x</title>{wide}<script>console.error('bad')</script>")
    with browser.served(tmp_path) as (address, failed):
        opened(pages._replace(address=address), "wide.html")
        found = measured(pages, PHONE)
        said = [entry["message"] for entry in pages.driver.get_log("browser")]
    assert found["width"] > PHONE and found["hidden"] == 1 and "404 /gone.png" in failed
    assert any("bad" in line for line in said) and any("gone.png" in line for line in said)
