"""What becomes HTML: escaped, complete, honest."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import views
from lanes import Lane
from scores import charts_of, scores

from hf_qep.evaluation.record import EvalRecord
from tests.space.conftest import HOSTILE


class Tags(HTMLParser):
    """Names of tags and attributes, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("hostile", [*HOSTILE, "' onmouseover='x", '"><svg onload=x>', "&lt;img&gt;"])
def test_text_of_models_and_visitors_stays_text(live_models, hostile):
    state = Lane("one_bit", "done", text=hostile, notes=(hostile,), tokens=3)
    for html in (views.lane(state, live_models), views.notice(hostile), views.problem(hostile)):
        found = Tags(html)
        assert not {"img", "script", "svg", "h1", "b"} & set(found.names)
        assert not [name for name, _ in found.attributes if name.startswith("on")]
        assert hostile in found.text


@pytest.mark.parametrize(
    "name", ["acme/<b>x</b>", "javascript:alert(1)//a", "a'b/c", "../x", "acme/x\n", "hf_qep/demo_model"]
)
def test_only_a_plain_hub_id_becomes_a_link(name):
    assert "<a" not in views.link(name)
    assert "<b" not in views.link(name)


def test_a_hub_id_becomes_a_link_to_the_hub():
    assert "href='https://huggingface.co/acme/tiny'" in views.link("acme/tiny")


def test_the_licence_of_each_model_is_said_plainly(settings_for, pair, tmp_path):
    import shutil

    from models import Models

    folder = tmp_path / "tiny-llama-1bit"
    shutil.copytree(pair[1], folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# x\n")
    said = Tags(views.footer(Models(settings_for(model_id=str(folder))))).text
    assert "Licence of tiny-llama-1bit: cc-by-nc-4.0." in said
    assert "Licence of tiny-llama: its card names none." in said


def test_what_was_not_measured_is_a_dash():
    found = Tags(views._metrics(Lane("original")))
    assert found.text.count(views.NOT_MEASURED) == 5


def test_the_delta_line_speaks_only_of_what_both_lanes_measured():
    original = Lane("original", "done", tokens=11, seconds=1.0, first_token=0.5, weight_bytes=1000, ids=(1, 2, 3))
    one_bit = Lane("one_bit", "done", tokens=11, seconds=2.0, first_token=0.25, weight_bytes=250, ids=(1, 2, 9))
    said = " ".join(views.differences((original, one_bit)))
    for part in ("25%", "0.5 times as fast", "250 ms instead of 500 ms", "first 2 of 3 tokens"):
        assert part in said
    recorded = Lane("original", "recorded", text="x")
    assert views.differences((recorded, one_bit)) == []


def test_every_number_of_the_scores_tab_is_in_the_record(live_models):
    record = live_models.record
    html = scores(record, "")
    text = Tags(html).text
    assert f"{record.text.baseline.perplexity.value:.4g}" in text
    assert f"{record.text.subject.perplexity.value:.4g}" in text
    assert f"{record.text.kl.value:.4g}" in text
    assert f"{record.bits.model:.3f}" in text
    found = Tags(html)
    assert {"table", "caption", "th", "svg"} <= set(found.names)
    labels = [value for name, value in found.attributes if name == "aria-label"]
    assert any(f"{record.text.subject.perplexity.value:.4g}" in label for label in labels), "a picture without words"


def test_task_scores_are_drawn_with_their_chance_level(live_models):
    values = live_models.record.to_dict()
    score = {"value": 0.5, "stderr": 0.05, "n": 100}
    kept = {"raw": None, "corrected": None, "paired": False, "note": None}
    metric = {"name": "acc", "baseline": score, "subject": {**score, "value": 0.3}, "retention": kept}
    task = {"name": "<i>quiz</i>", "prompt": "own:quiz", "num_fewshot": 0, "items": 100, "seed": 0, "chance": 0.25}
    task |= {"form": None, "available": None, "majority": None, "note": None, "metrics": [metric]}
    values["tasks"] = [task]
    record = EvalRecord.from_dict(values)
    html = scores(record, "")
    assert [chart.title for chart in charts_of(record)][-1] == "Tasks"
    assert "class='chance'" in html
    assert "<i>" not in html


def test_without_a_record_the_tab_says_what_makes_one():
    assert "hf-qep eval" in scores(None, "there is no evaluation record 'hf_qep_eval.json'; run: hf-qep eval")
