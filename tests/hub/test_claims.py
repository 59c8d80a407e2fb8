"""Numbers of record, card and leaderboard results against each other: an edited one contradicts the rest."""

from __future__ import annotations

import json
import math

import pytest

from hf_qep.evaluation.record import EvalRecord
from hf_qep.hub.claims import card_contradictions, record_contradictions, result_contradictions
from hf_qep.hub.preflight import RECORD, check_folder
from tests.hub.checkpoints import edit_json

CARD = """---
model-index:
- name: x
  results:
  - metrics:
    - {{type: perplexity, name: word perplexity, value: {value}}}
---
# x
"""


@pytest.fixture(scope="module")
def values(finished):
    return json.loads((finished / RECORD).read_text())


def file_bytes(finished) -> int:
    return (finished / "model.safetensors").stat().st_size


def test_a_record_as_written_does_not_contradict_itself(finished, values):
    assert record_contradictions(EvalRecord.from_dict(values), file_bytes(finished)) == []


@pytest.mark.parametrize("model", ["subject", "baseline"])
@pytest.mark.parametrize("number", ["nll", "perplexity", "bits_per_byte"])
@pytest.mark.parametrize("factor", [0.99, 0.5, 1.001])
def test_an_edited_number_of_the_text_contradicts_another(finished, values, model, number, factor):
    changed = json.loads(json.dumps(values))
    changed["text"][model][number]["value"] *= factor
    found = record_contradictions(EvalRecord.from_dict(changed), file_bytes(finished))
    assert found
    assert all("the record contradicts itself" in sentence for sentence in found)
    assert all(("this model" if model == "subject" else "the original") in sentence for sentence in found)


def test_an_edited_size_contradicts_the_files(finished, values):
    record = EvalRecord.from_dict(values)
    (found,) = record_contradictions(record, file_bytes(finished) + 1)
    assert "bytes of the weight files" in found


def test_a_record_that_contradicts_itself_is_not_published(checkpoint):
    edit_json(checkpoint / RECORD, lambda record: record["text"]["subject"]["perplexity"].update(value=3.0))
    assert any("perplexity of this model is 3" in problem for problem in check_folder(checkpoint).problems)


@pytest.mark.parametrize("digits", [4, 5, 17])
def test_a_rounded_number_of_the_record_may_stand_in_the_card(values, digits):
    record = EvalRecord.from_dict(values)
    value = float(f"{record.text.subject.perplexity.value:.{digits}g}")
    assert card_contradictions(CARD.format(value=value), record) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * 0.98,
        lambda v: v - 1,
        lambda v: "7.9",
        lambda v: None,
        lambda v: True,
        lambda v: "[1]",
        lambda v: ".inf",
    ],
)
def test_any_other_number_may_not(values, change):
    record = EvalRecord.from_dict(values)
    value = change(float(f"{record.text.subject.perplexity.value:.5g}"))
    (found,) = card_contradictions(CARD.format(value=json.dumps(value) if value is not True else "true"), record)
    assert "'word perplexity'" in found


def test_the_score_of_the_original_is_no_result_of_this_model(values):
    record = EvalRecord.from_dict(values)
    value = record.text.baseline.perplexity.value
    assert not math.isclose(value, record.text.subject.perplexity.value)
    assert len(card_contradictions(CARD.format(value=value), record)) == 1


@pytest.mark.parametrize(
    "index", ["1", "[]", "[1]", "[{results: 1}]", "[{results: [1]}]", "[{results: [{metrics: 3}]}]"]
)
def test_an_index_of_another_shape_is_no_crash(values, index):
    assert card_contradictions(f"---\nmodel-index: {index}\n---\n", EvalRecord.from_dict(values)) == []


@pytest.fixture
def scored(values):
    """The record with a task in it: 6 of 8 answers right, 7 of 8 by the original."""
    changed = json.loads(json.dumps(values))
    kept = {"value": 0.75 / 0.875, "low": None, "high": None}
    scores = [{"value": value, "stderr": None, "n": 8} for value in (0.875, 0.75)]
    retention = {"raw": kept, "corrected": None, "paired": False, "note": None}
    metric = {"name": "exact_match", "baseline": scores[0], "subject": scores[1], "retention": retention}
    task = {
        "name": "gsm8k",
        "prompt": "own:gsm8k",
        "form": None,
        "num_fewshot": 0,
        "items": 8,
        "available": 8,
        "seed": 0,
    }
    changed["tasks"] = [task | {"chance": None, "majority": None, "metrics": [metric], "note": None}]
    return changed


def test_a_score_that_was_edited_contradicts_what_is_kept_of_it(scored, finished):
    assert record_contradictions(EvalRecord.from_dict(scored), file_bytes(finished)) == []
    scored["tasks"][0]["metrics"][0]["subject"]["value"] = 0.85
    (found,) = record_contradictions(EvalRecord.from_dict(scored), file_bytes(finished))
    assert "what is kept of gsm8k exact_match" in found


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("- value: 0.75\n", True),
        ("- value: 75.0\n", True),
        ("- value: 0.875\n", False),
        ("- {}\n", False),
        ("[]", True),
    ],
)
def test_results_for_leaderboards_are_held_to_the_same(scored, tmp_path, text, good):
    path = tmp_path / "gsm8k.yaml"
    path.write_text(text)
    assert (result_contradictions(path, EvalRecord.from_dict(scored)) == []) == good


@pytest.mark.parametrize("text", ["{", "a: 1", "[1]", "[" * 5000])
def test_a_file_of_results_that_is_none_is_named(values, tmp_path, text):
    path = tmp_path / "gsm8k.yaml"
    path.write_text(text)
    assert "'gsm8k.yaml' is no " in result_contradictions(path, EvalRecord.from_dict(values))[0]


@pytest.mark.parametrize(
    ("kind", "key", "good"),
    [
        ("{type: kl, name: KL to the original", ("kl",), True),
        ("{type: perplexity, name: perplexity", ("kl",), False),
        ("{type: acc, name: accuracy", ("kl",), False),
    ],
)
def test_a_number_is_looked_for_where_its_name_says(values, kind, key, good):
    value = values["text"][key[0]]["value"]
    card = f"---\nmodel-index: [{{results: [{{metrics: [{kind}, value: {value!r}}}]}}]}}]\n---\n"
    assert (card_contradictions(card, EvalRecord.from_dict(values)) == []) == good
