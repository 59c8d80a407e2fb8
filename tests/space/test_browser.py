"""The page in a real browser: type, stream, stop, compare, break it; keyboard, phone, light and dark.

HF_QEP_SCREENSHOTS=DIR keeps pictures of what was seen.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import texts
from models import Models

from tests.space.conftest import HOSTILE, LONG, generations, served, wait_until

CHROMIUM = next((p for p in ("/usr/bin/chromium", shutil.which("chromium") or "") if p and Path(p).is_file()), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium (or run .ci/run as root) to test the page in it"
)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PROMPT = "The ferryman looked at the river"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def url(live_models) -> Iterator[str]:
    with served(live_models) as address:
        yield address


class Visitor:
    """A page with what tests do on it. hosts: every host that was asked for anything. errors: of the console."""

    def __init__(self, page, url: str) -> None:
        self.page, self.hosts, self.errors = page, set(), []
        page.set_default_timeout(15_000)
        page.on("request", lambda r: self.hosts.add(re.sub(r"^\w+://([^/:]*).*", r"\1", r.url)))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        page.locator("#prompt textarea").wait_for()
        page.locator("#status[aria-live]").wait_for()

    def type(self, text: str) -> None:
        self.page.locator("#prompt textarea").fill(text)

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def set_tokens(self, count: int) -> None:
        self.set_number("#new-tokens", count)

    def set_number(self, selector: str, value: float) -> None:
        """Type into the field of a slider until the slider has it: a page that is still busy may not take it yet."""
        field = self.page.locator(f"{selector} input[type=number]")
        if not field.is_visible():
            self.click("Settings")

        def taken() -> bool:
            field.fill(str(value))
            field.press("Tab")
            self.page.wait_for_timeout(50)
            shown = self.page.locator(f"{selector} input").evaluate_all("inputs => inputs.map(i => Number(i.value))")
            return len(shown) == 2 and all(number == value for number in shown)

        assert wait_until(taken), f"{selector} does not take {value}"

    def badge(self, lane: str, status: str) -> None:
        self.page.locator(f"#lane-{lane} .badge", has_text=status).wait_for()

    def text(self, lane: str) -> str:
        return self.page.locator(f"#lane-{lane} .answer").inner_text()

    def numbers(self, lane: str) -> dict[str, str]:
        pairs = self.page.locator(f"#lane-{lane} .metrics > div").all_inner_texts()
        return dict(pair.split("\n", 1) for pair in pairs)

    def keep(self, name: str) -> None:
        if folder := os.environ.get("HF_QEP_SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.fixture
def visit(browser, url):
    """`visit(viewport=..., color_scheme=...)`: a visitor in a context of its own."""
    contexts = []

    def start(address: str = url, viewport=DESKTOP, **options) -> Visitor:
        contexts.append(browser.new_context(viewport=viewport, **options))
        return Visitor(contexts[-1].new_page(), address)

    yield start
    for context in contexts:
        context.close()
    assert wait_until(lambda: not generations()), "a closed page left its generation running"


WATCH = """() => {
  window.seen = [];
  const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);
  const note = () => window.seen.push([
    all("#lanes .badge", (e) => e.textContent), all("#lanes .answer", (e) => e.textContent.length)]);
  new MutationObserver(note).observe(document.getElementById("lanes"), { subtree: true, childList: true });
}"""
"""Notes what the lanes show after each change, however fast it goes."""


def test_type_stream_compare(visit):
    visitor = visit()
    visitor.type(PROMPT)
    visitor.set_tokens(400)
    visitor.page.evaluate(WATCH)
    visitor.click("Generate")
    visitor.badge("one-bit", "Done")
    seen = visitor.page.evaluate("window.seen")
    assert ["Writing", "Waiting"] in [badges for badges, _ in seen]
    assert ["Done", "Writing"] in [badges for badges, _ in seen]
    for lane in (0, 1):
        assert len({lengths[lane] for _, lengths in seen}) > 2, "the text did not grow while it was written"
    for lane in ("original", "one-bit"):
        numbers = visitor.numbers(lane)
        assert numbers["Tokens"] == "400"
        assert all(re.match(r"\d", numbers[n]) for n in ("Tokens/s", "First token", "Weights", "Peak memory"))
    assert "% of the memory" in visitor.page.locator("#delta").inner_text()
    assert "tokens are the same" in visitor.page.locator("#delta").inner_text()
    assert visitor.page.locator("#status").inner_text().strip() == "Original: done. 1-bit: done."
    assert visitor.hosts == {"127.0.0.1"}, "something was fetched from elsewhere"
    assert visitor.errors == []


def test_markup_that_a_model_writes_is_shown_and_not_run(visit):
    visitor = visit()
    visitor.type(f"{PROMPT} <img src=x onerror='window.hit=1'>")
    visitor.set_number("#temperature", 1.5)
    visitor.click("Generate")
    visitor.badge("one-bit", "Done")
    written = visitor.text("original") + visitor.text("one-bit")
    for part in HOSTILE:
        assert part in written, "the tiny model did not write what this test is about; choose another seed"
    inside = visitor.page.locator("#lanes .answer :is(img, script, svg, b, h1, article)")
    assert inside.count() == 0
    assert visitor.page.evaluate("window.hit") is None
    assert visitor.page.locator("#lanes .metrics").count() == 2, "markup of a model closed an element of the page"


def test_stop_ends_the_generation_and_the_lanes_say_so(visit):
    visitor = visit()
    visitor.type(PROMPT)
    visitor.set_tokens(LONG)
    visitor.click("Generate")
    visitor.page.wait_for_function("document.querySelector('#lane-original .answer').innerText.length > 40")
    assert generations()
    visitor.click("Stop")
    visitor.badge("original", "Stopped")
    visitor.badge("one-bit", "Stopped")
    assert not generations()
    assert 0 < int(visitor.numbers("original")["Tokens"]) < LONG
    visitor.click("Stop")
    visitor.page.locator("#status", has_text=texts.NOTHING_TO_STOP).wait_for()


def test_a_closed_page_ends_its_generation(visit, forwards):
    visitor = visit()
    visitor.type(PROMPT)
    visitor.set_tokens(LONG)
    visitor.click("Generate")
    assert wait_until(lambda: bool(generations()))
    visitor.page.close()
    assert wait_until(lambda: not generations())
    assert len(forwards) < LONG, "it ended by itself"


def test_broken_input_gets_a_sentence_and_the_page_goes_on(visit):
    visitor = visit()
    visitor.click("Generate")
    visitor.page.locator("#status .problem", has_text=texts.EMPTY_PROMPT).wait_for()
    visitor.type("y" * 300)
    visitor.set_tokens(8)
    visitor.click("Generate")
    visitor.page.locator("#lane-one-bit .notes", has_text="60 of 300 tokens").wait_for()
    visitor.badge("one-bit", "Done")


def test_an_example_fills_the_prompt(visit):
    visitor = visit()
    visitor.click("日本語：説明")
    visitor.page.wait_for_function("document.querySelector('#prompt textarea').value.includes('四季')")
    visitor.type("")
    visitor.click("Known to fail: arithmetic")
    visitor.page.wait_for_function("document.querySelector('#prompt textarea').value.includes('487')")


def test_the_keyboard_is_enough_and_goes_in_reading_order(visit):
    visitor = visit()
    page = visitor.page
    page.locator("#prompt textarea").focus()
    page.keyboard.type(PROMPT)
    order = []
    where = "document.activeElement.closest('[id]:not([id^=html]):not([id^=component])')?.id"
    for _ in range(18):
        place = page.evaluate(where)
        if place and (not order or order[-1] != place):
            order.append(place)
        page.keyboard.press("Tab")
    wanted = ["prompt", "examples", "settings", "generate", "stop", "lane-original", "lane-one-bit"]
    # After the last one the browser begins again at the top.
    assert [place for place in order if place in wanted][: len(wanted)] == wanted
    fold = page.locator("#settings > button")
    assert fold.get_attribute("aria-expanded") == "false"
    fold.focus()
    page.keyboard.press("Enter")
    page.locator("#settings > button[aria-expanded=true]").wait_for()
    page.locator("#new-tokens input[type=number]").fill("8")
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Shift+Enter")
    visitor.badge("one-bit", "Done")
    assert page.locator("#prompt textarea").input_value() == PROMPT


def test_names_and_roles_for_screen_readers(visit):
    page = visit().page
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.title() == texts.TITLE
    assert page.get_by_role("heading", level=1).inner_text() == texts.TITLE
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["Original", "1-bit"]
    page.get_by_role("button", name="Settings").click()
    for label in ("Prompt", "System prompt", "New tokens", "Temperature", "Seed"):
        page.get_by_label(label).first.wait_for()
    assert page.locator("#status[role=status][aria-live=polite]").count() == 1
    for name in ("Original", "1-bit"):
        assert page.get_by_role("region", name=f"Text of the lane {name}").count() == 1
    buttons = [b.inner_text() or b.get_attribute("aria-label") or "" for b in page.get_by_role("button").all()]
    nameless = [name for name in buttons if not re.search(r"\w", name)]
    assert not nameless


CONTRAST = """() => {
  const parse = (color) => { const v = color.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const luminance = (rgb) => { const [r, g, b] = rgb.map((c) => c / 255).map((c) =>
    c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, box = element.getBoundingClientRect();
    if (!node.textContent.trim() || !box.width || !box.height) continue;
    if (["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), back = behind(element);
    if (style.visibility === "hidden" || element.checkVisibility && !element.checkVisibility()) continue;
    const svg = element instanceof SVGElement;
    const ink = over(parse(svg ? style.fill : style.color), back);
    const [hi, lo] = [luminance(ink), luminance(back)].sort((a, b) => b - a), ratio = (hi + 0.05) / (lo + 0.05);
    if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${element.tagName} ${node.textContent.trim().slice(0, 40)}`);
  }
  return bad;
}"""


CLIPPED = """() => [...document.querySelectorAll(".metrics dd, .metrics dt, .badge, .bar-value")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
  .map((e) => e.textContent)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_texts_have_contrast_and_nothing_sticks_out(visit, scheme, viewport):
    visitor = visit(viewport=viewport, color_scheme=scheme)
    page = visitor.page
    visitor.type(PROMPT)
    visitor.set_tokens(60)
    visitor.click("Generate")
    visitor.badge("one-bit", "Done")
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)  # colours of buttons fade
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    visitor.keep(f"{scheme}-{viewport['width']}")
    assert page.evaluate(CONTRAST) == []
    first, second = (page.locator(f"#lane-{lane}").bounding_box() for lane in ("original", "one-bit"))
    if viewport is PHONE:
        assert second["y"] >= first["y"] + first["height"], "the lanes do not stack"
        for name in ("Generate", "Stop"):
            assert page.get_by_role("button", name=name, exact=True).bounding_box()["height"] >= 44
    else:
        assert abs(first["y"] - second["y"]) < 1
        assert abs(first["height"] - second["height"]) < 1
        tops = [page.locator(f"#lane-{lane} .metrics").bounding_box()["y"] for lane in ("original", "one-bit")]
        assert abs(tops[0] - tops[1]) < 1, "the numbers of the lanes do not stand side by side"
    for tab in ("Compare", "Scores"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert page.evaluate(CLIPPED) == []
        assert page.evaluate(CONTRAST) == []
    visitor.keep(f"{scheme}-{viewport['width']}-scores")


def test_the_narrowest_phone_and_reduced_motion(visit):
    visitor = visit(viewport={"width": 320, "height": 640}, reduced_motion="reduce")
    visitor.type(PROMPT)
    visitor.set_tokens(LONG)
    visitor.click("Generate")
    visitor.badge("original", "Writing")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 320
    assert (
        visitor.page.evaluate("getComputedStyle(document.querySelector('.badge-writing'), '::before').animationName")
        == "none"
    )
    visitor.click("Stop")
    visitor.badge("one-bit", "Stopped")


def test_the_scores_tab_shows_the_record(visit, live_models):
    page = visit().page
    page.get_by_role("tab", name="Scores").click()
    shown = page.locator("#scores").inner_text()
    assert f"{live_models.record.text.subject.perplexity.value:.4g}" in shown
    assert page.get_by_role("img", name=re.compile("^Perplexity on held-out text")).is_visible()


def test_recorded_outputs_are_marked_as_recorded(visit, settings_for):
    models = Models(settings_for(original="recorded"))
    item = models.samples.items[0]
    with served(models) as address:
        visitor = visit(address)
        visitor.page.locator("#examples button").first.click()
        visitor.page.wait_for_function("document.querySelector('#prompt textarea').value.length > 0")
        visitor.set_tokens(16)
        visitor.click("Generate")
        visitor.badge("one-bit", "Done")
        visitor.badge("original", "Recorded")
        assert visitor.page.locator("#lane-original .answer").text_content() == item.baseline
        note = visitor.page.locator("#lane-original .notes").inner_text()
        assert models.samples.created[:10] in note
        assert "not run now" in note
        assert visitor.numbers("original")["Tokens/s"] == "–"
        visitor.keep("recorded")
        visitor.type("nobody recorded this")
        visitor.click("Generate")
        visitor.badge("original", "Not available")


def test_a_model_that_cannot_be_had_is_said_at_the_top_and_in_its_lane(visit, settings_for):
    with served(Models(settings_for(model_id="acme/not-there"))) as address:
        visitor = visit(address)
        assert "cannot be reached" in visitor.page.locator("#header .problem").inner_text()
        visitor.badge("one-bit", "Failed")
        visitor.type(PROMPT)
        visitor.click("Generate")
        visitor.page.locator("#status .problem", has_text="cannot be reached").wait_for()
        visitor.keep("failed")
