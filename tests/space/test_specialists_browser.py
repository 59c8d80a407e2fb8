"""The tab of specialists in a real browser: a deal is edited and judged, a glyph is drawn and found."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.space.conftest import served
from tests.space.specialist_folders import deals_folder, glyphs_folder
from tests.space.test_browser import PHONE, Visitor, browser, pytestmark, visit

__all__ = ["browser", "pytestmark", "visit"]


@pytest.fixture(scope="module")
def url(live_models, tmp_path_factory) -> Iterator[str]:
    from settings import Settings
    from specialist_files import load_specialists

    work = tmp_path_factory.mktemp("specialists")
    folders = f"{deals_folder(work)},{glyphs_folder(work)},acme/nowhere"
    with served(live_models, load_specialists(Settings(specialists=folders))) as address:
        yield address


def opened(visitor: Visitor, name: str) -> Visitor:
    visitor.page.get_by_role("tab", name="Specialists").click()
    visitor.page.get_by_role("tab", name=name).click()
    return visitor


def result(visitor: Visitor, number: int, text: str) -> str:
    found = visitor.page.locator(f"#specialist-{number}-result", has_text=text)
    found.wait_for()
    return found.inner_text()


def test_a_deal_is_edited_and_judged(visit):
    visitor = opened(visit(), "deals")
    visitor.page.get_by_role("button", name="Ask both").click()
    said = result(visitor, 0, "What happened: yes")
    assert "size none ; kind new ; note missing ->" in said
    assert len(re.findall(r"\d+\.\d%", said)) == 2 and len(re.findall(r"\d (ms|s)\b", said)) == 2
    visitor.page.get_by_label("size").fill("30")
    visitor.page.get_by_label("note").fill("was late")
    visitor.page.get_by_role("button", name="Ask both").click()
    said = result(visitor, 0, "size p25 ; kind new ; note was late")
    assert "What happened" not in said
    visitor.page.get_by_label("Fill in an example").click()
    visitor.page.get_by_role("option", name="Example 6").click()
    visitor.page.get_by_role("button", name="Ask both").click()
    assert "kind old" in result(visitor, 0, "What happened: no")
    visitor.keep("specialist-deals")
    assert visitor.hosts == {"127.0.0.1"} and visitor.errors == []


@pytest.mark.parametrize("options", [{}, {"viewport": PHONE, "color_scheme": "dark"}])
def test_a_glyph_is_drawn_and_found(visit, options):
    visitor = opened(visit(**options), "glyphs")
    ask = visitor.page.get_by_role("button", name="Ask both")
    ask.click()
    result(visitor, 1, "Nothing is drawn")
    visitor.page.get_by_role("button", name="Brush").click()
    visitor.page.wait_for_timeout(300)
    board = visitor.page.locator("#specialist-1-board canvas").first
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    mouse = visitor.page.mouse
    mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.4)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.55, steps=12)
    mouse.up()
    visitor.page.wait_for_timeout(700)
    ask.click()
    said = result(visitor, 1, "Student")
    assert len(re.findall(r": -?\d\.\d\d", said)) == 6
    visitor.keep(f"specialist-drawn-{options.get('color_scheme', 'light')}")
    assert visitor.errors == []


def test_a_drawing_is_chosen_without_a_pointer(visit):
    visitor = opened(visit(), "glyphs")
    visitor.page.get_by_label("Choose a drawing").click()
    visitor.page.get_by_role("option", name="Drawing 2").click()
    visitor.page.wait_for_timeout(700)
    visitor.page.get_by_role("button", name="Ask both").click()
    said = result(visitor, 1, "Student")
    visitor.keep("specialist-chosen")
    assert said.count("b: 1.00") == 2, "each finds the glyph itself"


def test_a_specialist_that_cannot_be_had_says_why(visit):
    visitor = opened(visit(), "acme/nowhere")
    assert "cannot be reached" in visitor.page.locator("#specialist-2-problem").inner_text()
