"""Names and text of others in a card: shown, never obeyed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_qep.hub.cards.card import card_problems, render_card
from hf_qep.hub.cards.escape import Markdown, block, code, finish, hub_link, inline, link, table
from hf_qep.hub.cards.facts import CardOptions, gather
from hf_qep.hub.cards.lint import without_code
from tests.hub.card_checkpoints import RECORD, SAMPLES, edit, enrich, task

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "`code` and ``more``",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/track.png)",
    "https://evil.example and www.evil.example",
    "\n---\nlicense: mit\n---\n",
    "\n# A heading\n> a quote\n* a list",
    "```\nout of the block\n```",
    "~~~~\nout of the block",
    "</details></td></table>",
    "{{ 7 * 7 }} {% include 'x' %}",
    "a\u202eb\u200bc\x00d\x1b[31m",
    "$$ \\frac{1}{2} $$ @everyone &lt;b&gt;",
    "<!-- " + "hidden -->",
    "&#60;script&#62;",
    "\\",
    "- item",
    "1. item",
    "+ item",
]
MARKUP = "`*_{}[]<>#|~!&$@\\"
TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(HOSTILE)


def unescaped(text: str) -> str:
    """Characters that Markdown could read, after those with a backslash before them are taken out."""
    return re.sub(r"\\[!-/:-@\[-`{-~]", "", text)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_prose_is_one_line_without_markup(text):
    escaped = inline(text)
    rest = unescaped(escaped)
    assert not set(rest) & set(MARKUP) and "\n" not in escaped and "\r" not in escaped
    assert "://" not in rest and not re.search(r"www\.", rest, re.IGNORECASE)
    assert not re.match(r"[-+=]|\d+[.)](\s|$)", escaped)
    assert not re.search(r"[\u0000-\u001f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", escaped)


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_escaped_prose_still_says_the_same(text):
    shown = "".join(c for c in text if c.isprintable() or c.isspace())
    plain = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", inline(text))
    assert "".join(plain.split()) == "".join(shown.split()) or not text.isprintable()


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_a_block_cannot_be_left_from_inside(text):
    shown = block(text)
    assert without_code(f"before\n\n{shown}\n\nafter").split() == ["before", "after"]
    fence = re.match(r"`{3,}", shown)[0]
    assert shown.startswith(f"{fence}\n") and shown.endswith(f"\n{fence}")


@pytest.mark.parametrize("text", ["plain", " leading\n\n  and inner\tspace\n", "```\nfence\n```", "``````", "~~~"])
def test_a_block_shows_the_text_as_it_is(text):
    shown = block(text)
    fence = re.match(r"`+", shown)[0]
    inside = shown.removeprefix(f"{fence}\n").removesuffix(fence)
    assert inside in (text, f"{text}\n")


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_table_keeps_its_shape(rows):
    lines = table(["a", "b"], rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "data:text/html,x", "//evil", "ftp://x", "https://", " https://a"]
)
def test_only_addresses_of_pages_become_links(address):
    assert link("text", address) == "text"


def test_an_address_cannot_end_its_link():
    shown = link("a](b", "https://example.org/x>)y <z> |\n![")
    assert shown == r"[a\](b](<https://example.org/x%3E%29y%20%3Cz%3E%20%7C%0A!%5B>)"
    assert hub_link("a/b](https://evil)").startswith("`") and "](<" not in hub_link("a/b](https://evil)")


def test_code_spans_hold_only_what_they_can():
    assert code("q_proj") == "`q_proj`"
    assert code("a`b") == r"a\`b" and code("a|b") == r"a\|b" and code("") == ""


def test_only_text_that_was_made_as_markdown_is_left_alone():
    assert finish(Markdown("**x**")) == "**x**" and finish("**x**") == r"\*\*x\*\*" and finish(None) == ""


class Page(HTMLParser):
    """Tags and addresses of a page, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()
        self.comments: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses |= {value or "" for name, value in attrs if name in ("href", "src")}
        assert not any(name.startswith("on") or name == "style" and "text-align" not in value for name, value in attrs)

    def handle_comment(self, data):
        self.comments.append(data)


def as_page(card: str) -> Page:
    """The card as CommonMark with tables and raw HTML makes a page of it, before anything is sanitised."""
    return Page(MarkdownIt("commonmark").enable("table").render(ModelCard(card).text))


@pytest.fixture
def hostile(checkpoint) -> Path:
    """A checkpoint in which everything that can be text is hostile."""
    enrich(checkpoint)
    everything = " ".join(HOSTILE)

    def record(values):
        values["subject"]["name"] = values["baseline"]["name"] = everything
        values["command"] = f"hf-qep eval {everything}"
        values["text"]["source"] = everything
        values["notes"] = HOSTILE
        values["environment"].update(accelerator=everything, processor=everything, platform=everything)
        values["environment"]["versions"]["torch"] = everything
        values["tasks"] = [task(name, 0.8, 0.7, 0.25, note=name) for name in HOSTILE]

    def manifest(values):
        values["base_model"] = everything
        values["report"]["skipped"] = dict.fromkeys(HOSTILE, everything)
        values["report"]["warnings"] = HOSTILE
        for layer, name in zip(values["report"]["layers"], HOSTILE, strict=False):
            layer["name"] = name
            layer["spec"]["format"] = everything
        values["calibration"]["sources"] = [{"name": name, "rows": 1} for name in HOSTILE]
        values["calibration"]["fingerprint"] = everything
        values["versions"] = {everything: everything}
        values["recipe"] |= {"method": everything, "skip_modules": HOSTILE}

    def samples(values):
        values["items"] = [
            {"prompt": text, "baseline": text, "subject": text, "agreement": 0.5, "note": text} for text in HOSTILE
        ]

    edit(checkpoint, RECORD, record)
    edit(checkpoint, "hf_qep_manifest.json", manifest)
    edit(checkpoint, SAMPLES, samples)
    return checkpoint


HOSTILE_CARD = {
    "license": "<script>alert(1)</script>",
    "license_name": "[x](javascript:alert(1)) | `y`",
    "license_link": "javascript:alert(1)",
    "language": ["en", "a\n---\nb"],
    "pipeline_tag": "text-generation\n---\nlicense: mit",
    "extra_gated_prompt": "\n---\nlicense: mit\n---\n<b>| `agree`\u2028x",
    "extra_gated_fields": {"\n---\n": "text", "a: b # c": "checkbox"},
}


def test_a_card_of_hostile_facts_holds_no_markup_of_theirs(hostile, tmp_path):
    import yaml

    base = tmp_path / "base.md"
    base.write_text(f"---\n{yaml.safe_dump(HOSTILE_CARD)}---\n# base\n")
    card = render_card(gather(hostile, CardOptions("alice/x", base_card=base)))
    assert card_problems(card) == []
    data = ModelCard(card).data.to_dict()
    assert {key: data[key] for key in HOSTILE_CARD} == HOSTILE_CARD, "the metadata is what the original says"
    assert data["quantized_by"] == "alice" and data["library_name"] == "transformers"
    body = ModelCard(card).text
    prose = without_code(body)
    page = as_page(card)
    assert page.tags <= {
        "h1", "h2", "h3", "p", "ul", "li", "strong", "em", "code", "pre", "a", "blockquote", "details", "summary",
        "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert len(page.comments) == 1 and "sha256 of the text above" in page.comments[0]
    allowed = ("https://arxiv.org/abs/", "https://huggingface.co/")
    assert all(a.startswith(allowed) or a in (RECORD, "hf_qep_manifest.json") for a in page.addresses)
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1 and len(re.findall(r"^## ", prose, re.MULTILINE)) == 11
    for rows in re.findall(r"(?:^\|.*\|$\n?)+", prose, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in rows.splitlines()}) == 1
    assert "\u202e" not in prose and "\x1b" not in card and "\x00" not in card


def test_every_sample_stays_in_its_block(hostile):
    card = render_card(gather(hostile, CardOptions("alice/x")))
    part = card.partition("## Samples\n")[2].partition("\n## Reproduce")[0]
    assert without_code(part).count("### Sample") == len(HOSTILE)
    assert json.loads((hostile / SAMPLES).read_text())["items"][0]["prompt"] in part


@given(text=TEXT, note=TEXT, name=TEXT)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_text_leaves_the_card_valid(checkpoint, text, note, name):
    item = {"prompt": text, "baseline": note, "subject": name, "agreement": 0.25, "note": note}
    edit(checkpoint, SAMPLES, lambda samples: samples.update(items=[item]))
    edit(checkpoint, RECORD, lambda record: record.update(notes=[note], tasks=[task(name, 0.8, 0.7, None)]))
    card = render_card(gather(checkpoint, CardOptions("alice/x", base_model="acme/tiny-llama")))
    assert card_problems(card) == []
    assert ModelCard(card).data.base_model == "acme/tiny-llama"


GOOD = """---
base_model: acme/x
base_model_relation: quantized
library_name: transformers
license: mit
tags: [hf-qep]
---
# x

Words.
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("license: mit", "license: mit\nlicense: [", "no YAML"),
        ("library_name: transformers\n", "", "library_name"),
        ("tags: [hf-qep]", "tags: [other]", "tags"),
        ("tags: [hf-qep]", "tags: hf-qep", "tags"),
        ("base_model: acme/x\n", "", "without a `base_model`"),
        ("base_model: acme/x", "base_model: ../x", "no id of the Hub"),
        ("quantized\n", "distilled\n", "base_model_relation"),
        ("license: mit", "license: other", "license_name"),
        ("license: mit", "license: 3", "license"),
        ("license: mit", "language: no", "`no` in quotes"),
        ("license: mit", "model-index: {name: x}", "cannot read"),
        ("---\n# x", "---\n---\n# x", "second ---"),
        ("# x", "x", "no title"),
        ("Words.", "[More Information Needed]", "placeholder"),
        ("Words.", "TODO: words", "placeholder"),
        ("Words.", "{{ words }}", "placeholder"),
        ("Words.", "<script>x</script>", "script"),
        ("Words.", "<img src=x onerror=y>", "runs code"),
        ("Words.", "[a](javascript:b)", "runs code"),
    ],
)
def test_the_lint_finds_what_is_wrong(old, new, message):
    assert card_problems(GOOD) == []
    assert old in GOOD
    assert any(message in problem for problem in card_problems(GOOD.replace(old, new, 1)))


def test_the_lint_wants_finite_numbers_in_the_index():
    entry = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"}, "metrics": [{"type": "m", "value": 1.5}]}
    index = f"model-index: {json.dumps([{'name': 'x', 'results': [entry]}])}\ntags:"
    assert card_problems(GOOD.replace("tags:", index)) == []
    for value in (".nan", "'12'", "true"):
        problems = card_problems(GOOD.replace("tags:", index.replace("1.5", value)))
        assert any("no number" in problem for problem in problems)


def test_code_is_not_prose():
    assert card_problems(GOOD + "\n```\n<script>\n```\n\n`TODO` and ``{{ x }}``\n") == []
    assert card_problems(GOOD + "\n```\nclosed\n```\n<script>\n```\n") != []


def test_text_without_metadata_is_no_card():
    assert "no metadata" in card_problems("# x\n")[0] and "empty" in card_problems("---\n\n---\n# x\n")[0]
