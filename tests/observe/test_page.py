"""The page in a real browser: it shows what the keeper says, acts with the token, and fits its window."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.observe.traffic import Engine, traffic

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright (kvkeep[dev])")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no browser on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Open a page; anything that the browser complains about fails the test."""
    complaints: list[str] = []
    pages = []

    def open_(url: str, width: int = 1400, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#requests table")
        return page

    yield open_
    for page in pages:
        page.close()
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_and_is_drawn(busy: Any, opened: Any, tmp_path: Path, width: int, scheme: str) -> None:
    Engine(busy.engine.connection, "A-model-with-a-rather-long-name-8B-Instruct bfloat16 tp2", 9).request(
        99, 5
    )
    page = opened(busy.url, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = (
        "(e) => e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).display != 'none'"
    )
    assert (
        page.evaluate(f"[...document.querySelectorAll('body *')].filter({beyond}).map(e => e.outerHTML)")
        == []
    )
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 27)") == (scheme == "dark")
    picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert len(picture) > 20_000


def test_it_says_what_the_keeper_says(busy: Any, opened: Any) -> None:
    page, state = opened(busy.url), busy.state()
    assert page.inner_text("#state") == "ready"
    assert state["tiers"][0]["name"] in page.inner_text("#tiers")
    assert "SmolLM2-135M" in page.inner_text("#namespaces")
    rows = page.query_selector_all("#requests tbody tr")
    assert len(rows) == 25
    assert {label.text_content() for label in page.query_selector_all("#history .right")} >= {
        "0 %",
        "50 %",
        "100 %",
    }
    for chart in ("#history", "#memory"):
        assert page.query_selector_all(f"{chart} rect")
        assert re.fullmatch(r"\d\d:\d\d", page.text_content(f"{chart} .middle")), "a time axis"
    assert "4.00 MiB" in {label.text_content() for label in page.query_selector_all("#memory .right")}
    tenants = state["keeper"]["tenants"]
    assert len(tenants) == len(page.query_selector_all("#tenants tbody tr")) == 2
    assert tenants[0]["tenant"] in page.inner_text("#tenants")
    assert state["keeper"]["peers"]["address"] in page.inner_text("#keeper")
    assert "off (--record)" in page.inner_text("#keeper")
    assert "engine-0123456789abcdef" in page.inner_text("#requests")
    prefix = state["prefixes"][0]
    first = page.inner_text("#prefixes tbody tr:first-child")
    assert first.split()[0] == prefix["prefix"][:8]
    assert f"{prefix['tokens']:,}" in first


def test_names_are_shown_as_text(watched: Any, opened: Any) -> None:
    one = watched()
    Engine(one.engine.connection, "<img src=x onerror=alert(1)>", 3).request(1, 2)
    page = opened(one.url)
    assert "<img src=x" in page.inner_text("#namespaces")
    assert page.query_selector("main img") is None


def test_actions_by_its_buttons(watched: Any, opened: Any) -> None:
    one = watched()
    traffic(one.engine, rounds=2, documents=2)
    page = opened(one.url)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#prefixes button >> nth=0")
    page.wait_for_selector("#note.bad")
    assert "need the token" in page.inner_text("#note")
    page.fill("#token", one.token()["Authorization"].removeprefix("Bearer "))
    page.click("#prefixes button >> nth=0")
    page.wait_for_selector("#note >> text=/^pinned chunks/")
    assert one.state()["arena"]["pinned"] > 0
    page.wait_for_selector("#prefixes button >> text=unpin")
    page.click("#clear")
    page.wait_for_selector("#note >> text=/^forgotten chunks/")
    assert one.state()["keeper"]["chunks"] == 0


def test_drain_by_its_button_and_a_lost_keeper_is_told(watched: Any, browser: Any) -> None:
    one = watched()
    one.engine.request(1, 2)
    page = browser.new_page()
    page.goto(one.url)
    page.wait_for_selector("#requests table")
    page.on("dialog", lambda dialog: dialog.accept())
    page.fill("#token", one.token()["Authorization"].removeprefix("Bearer "))
    page.click("#drain")
    assert one.keeper.process.wait(20) == 0
    page.wait_for_selector("#state >> text=no answer", timeout=10_000)
    page.close()
