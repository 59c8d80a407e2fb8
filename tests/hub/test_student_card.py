"""The card of a student: every number is in distillation.json, nothing is promised that was not measured."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_qep.errors import CardError, OutputExistsError
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.retention import retention
from hf_qep.evaluation.schema import to_json
from hf_qep.hub.allowed import DISTILLATION
from hf_qep.hub.base import read_metadata
from hf_qep.hub.cards.card import card_problems, render_student_card
from hf_qep.hub.cards.distilled import rendered_again, student_values, unsealed, write_student_card
from hf_qep.hub.cards.facts import gather
from tests.hub.card_checkpoints import numbers_in, student, unexplained_of_student
from tests.hub.students import STUDENT_REPO, WORDS, make_student
from tests.hub.test_card_escape import HOSTILE, as_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student") / "tiny-sorter")


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / DISTILLATION).read_text())


def test_the_command_for_cards_of_quantised_models_names_that_for_students(folder):
    with pytest.raises(CardError, match="is a student.*hf-qep distill report"):
        gather(folder)


def card_of(facts: dict[str, Any], **changes: Any) -> str:
    return render_student_card(student() | changes if not facts else facts | changes)


def test_every_number_is_in_distillation_json(folder, found):
    values = student_values(found, STUDENT_REPO, specialised_for=WORDS, remote_code=True)
    card = (folder / "README.md").read_text()
    assert card == render_student_card(values)
    assert len(numbers_in(card)) > 40
    assert values["others"] and values["changes"] and values["latency_ms"]
    assert unexplained_of_student(card, values) == []
    forged = card.replace("82.5 ± 6.1", "84.5 ± 6.1")
    assert forged != card and unexplained_of_student(forged, values) == ["84.5"]


def test_every_number_of_facts_given_by_hand_is_among_them():
    assert unexplained_of_student(card_of({}), student()) == []


def test_numbers_follow_the_facts():
    score = {"value": 0.6543, "stderr": 0.0321, "n": 777}
    (task,) = student()["tasks"]
    card = card_of({}, tasks=[task | {"start": score}], others=[{"name": "rival", "score": score}])
    assert len(re.findall(r"777 \| 65\.4 ± 3\.2|65\.4 ± 3\.2", card)) == 2
    assert "| rival | 777 | 65.4 ± 3.2 |  |  |" in card


def test_all_models_stand_side_by_side_with_their_errors(folder):
    card = (folder / "README.md").read_text()
    rows = [line for line in card.splitlines() if re.search(r"\d ± \d", line) and line.startswith("|")]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["teacher", "student, before it was taught", "student, labels only", "**this student**"]
    assert all(row.split("|")[2].strip() == "40" for row in rows)
    assert rows[-1].count("%") == 2


def test_what_was_removed_and_added_is_said(folder, found):
    card = (folder / "README.md").read_text()
    section = card.split("## What was removed and added")[1].split("\n## ")[0]
    assert "layers are numbered from 0" in section and "tiny-bert" in section
    for name, (before, after) in ((n, c) for n, c in found["changes"].items() if isinstance(c, list)):
        assert f"| {name} | {before} before, {after} now |" in section
    assert "| attention removed in layers | number 0 |" in section
    assert "Nothing was removed" in card_of({}, changes={}, start=student()["teacher"])
    assert "It was not cut from its teacher" in card_of({}, changes={})


@pytest.mark.parametrize("code", [True, False])
def test_the_snippet_of_a_student_of_its_own_class_says_what_it_needs(code):
    card = card_of({}, remote_code=code)
    snippet = card.split("```python\n")[1].split("```")[0]
    for part in ("import hf_qep", "trust_remote_code=True", "modeling_student"):
        assert (part in snippet) == code
    compile(snippet, "snippet", "exec")
    assert 'from_pretrained("tiny-sorter")' in snippet


@pytest.mark.parametrize(
    ("theirs", "ours", "said", "saves"),
    [
        (
            (7_000_000, 14_000_000),
            (700_000, 1_400_000),
            "10.0 times fewer weights and 10.0 times smaller weight files",
            True,
        ),
        (
            (7_000_000, 14_000_000),
            (3_500_000, 14_000_000),
            "2.00 times fewer weights and weight files no smaller",
            False,
        ),
        ((7_000_000, 14_000_000), (7_100_000, 28_400_000), "no fewer weights and weight files no smaller", False),
    ],
)
def test_what_is_not_smaller_is_not_called_so(theirs, ours, said, saves):
    teacher, own = (student()[who] | dict(zip(("parameters", "bytes"), sizes, strict=True))
                    for who, sizes in (("teacher", theirs), ("student", ours)))  # fmt: skip
    card = card_of({}, teacher=teacher, student=own)
    assert card.count(said) == (2 if saves else 1)
    assert ("Disk space is short" in card) == saves


def test_scores_that_say_little_are_pointed_out():
    (task,) = student()["tasks"]
    weak = {"value": 0.52, "stderr": 0.02, "n": 350}
    kept = to_json(retention(Estimate(**weak), Estimate(**weak), 0.5))
    card = card_of({}, tasks=[task | {"teacher": weak, "student": weak, "retention": kept, "start": weak}])
    assert "On letters it may be guessing" in card
    assert "cannot be computed: the teacher is too near to it" in card and "not computable" in card
    assert "No worse than this student: labels only." in card
    assert "No worse than this student: the student before it was taught." in card
    strong = card_of({})
    assert not re.search("may be guessing|No worse than|cannot be computed", strong)


def test_what_an_item_asks_is_said_where_it_is_not_its_class():
    (task,) = student()["tasks"]
    asked = "one-shot recognition among 17 classes"
    card = card_of({}, tasks=[task | {"scored": asked}])
    assert f"letters, accuracy in %; {asked}; chance: 50.0 %" in card
    (result,) = read_metadata(card)["model-index"][0]["results"]
    metric = result["metrics"][0]
    assert (metric["type"], metric["name"]) == ("accuracy", f"accuracy, {asked}, 350 items")
    assert unexplained_of_student(card, student()) == ["17", "17"], "the classes of an episode are a fact as any other"
    assert card_of({}, tasks=[task | {"scored": None}]) == card_of({})


def test_nothing_is_said_of_speed_that_was_not_measured():
    assert "Speed and memory: not measured." in card_of({}, latency_ms={})
    assert "Memory: not measured." in card_of({})


def test_the_terms_of_one_model_are_said_once():
    card = card_of({}, start=student()["teacher"])
    assert card.count("the licence mit allows") == 1 and "terms of both" not in card
    assert "terms of both" in card_of({})


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "other"])
def test_terms_of_the_first_weights_are_passed_on(licence):
    card = card_of({}, start=student()["start"] | {"licence": licence})
    assert card_problems(card) == []
    data = read_metadata(card)
    assert data["license"] == licence
    assert ("extra_gated_prompt" in data) == (licence != "other")
    assert data.get("license_link") == ("https://huggingface.co/acme/small" if licence == "other" else None)


def test_a_student_of_first_weights_without_a_home_is_a_finetune_of_its_teacher():
    data = read_metadata(card_of({}, start=student()["start"] | {"name": "folder"}))
    assert (data["base_model"], data["base_model_relation"]) == ("acme/large", "finetune")
    nowhere = {who: student()[who] | {"name": "folder"} for who in ("start", "teacher")}
    assert "base_model" not in read_metadata(card_of({}, **nowhere))


def test_a_prompt_of_the_teacher_is_told_with_its_size_and_digest():
    prompt = {"tokens": 8642, "sha256": "0a1b" * 16}
    card = card_of({}, prompt=prompt)
    section = card.split("## How it was taught")[1].split("\n## ")[0]
    assert f"a prompt of 8642 tokens before every item (sha256 `{prompt['sha256']}`); the student reads none" in section
    assert "is not timed" in card and unexplained_of_student(card, student() | {"prompt": prompt}) == []
    assert unexplained_of_student(card, student()) != []
    assert "prompt" not in card_of({}).lower() and card_of({}, prompt=None) == card_of({})


def test_tables_render(folder):
    tokens = MarkdownIt("commonmark").enable("table").parse((folder / "README.md").read_text())
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == 6
    text = " ".join(token.content for token in tokens if token.type == "inline")
    assert "---" not in text and "| " not in text


@given(st.sampled_from(HOSTILE), st.sampled_from(HOSTILE))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_text_is_shown_and_not_obeyed(one, two):
    (task,) = student()["tasks"]
    (data,) = student()["transfer"]
    facts = student() | {
        "specialised_for": one,
        "not_for": two,
        "made_by": one,
        "changes": {one: two, "layers": one},
        "others": [{"name": two, "score": task["student"]}],
        "versions": {one: two},
        "command": one,
        "latency_ms": {two: 3.0},
        "transfer": [data | {"name": one, "labels": two}],
        "tasks": [task | {"name": two, "metric": one, "scored": one}],
        "teacher": student()["teacher"] | {"name": one, "licence": two.strip() or "x"},
        "start": student()["start"] | {"name": two, "revision": one},
        "remote_code": True,
    }
    card = render_student_card(facts)
    assert card_problems(card) == []
    page = as_page(card)
    assert page.tags <= as_page(card_of({}, remote_code=True)).tags
    assert all(address.startswith("https://huggingface.co/") for address in page.addresses)
    assert all("written by hf-qep" in comment for comment in page.comments)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_class": "AutoModel\nimport os"},
        {"auto_class": "AutoModel; x"},
        {"student": student()["student"] | {"bytes": 0}},
        {"teacher": student()["teacher"] | {"parameters": -1}},
        {"prompt": {"tokens": 0, "sha256": "0" * 64}},
        {"prompt": {"tokens": 5, "sha256": "[x](https://evil.example)"}},
        {"prompt": {"tokens": 5}},
    ],
)
def test_facts_that_would_break_the_card_are_refused(change):
    with pytest.raises(CardError):
        render_student_card(student() | change)


# --- from distillation.json


def test_a_card_is_found_again_from_its_file(folder, found):
    card = (folder / "README.md").read_text()
    assert rendered_again(card, found, remote_code=True) == unsealed(card)
    assert re.sub(r"\\(.)", r"\1", re.search(r"exactly this: (.*)\.", card)[1]) == WORDS


def test_a_card_with_a_prompt_is_found_again_and_files_of_before_have_none(folder, found):
    assert "prompt" not in found
    told = found | {"prompt": {"tokens": 77, "sha256": "c0de" * 16}}
    card = render_student_card(student_values(told, STUDENT_REPO, specialised_for=WORDS, remote_code=True))
    assert (
        rendered_again(card, told, remote_code=True) == unsealed(card) != rendered_again(card, found, remote_code=True)
    )


@pytest.mark.parametrize("words", ["[x](https://evil.example)", "<b>best</b>", "*all*", ""])
def test_words_that_a_card_would_not_hold_are_refused(folder, found, words):
    card = (folder / "README.md").read_text()
    escaped = re.search(r"exactly this: (.*)\.", card)[1]
    with pytest.raises(CardError, match="plain words"):
        rendered_again(card.replace(escaped, words), found, remote_code=True)


@pytest.mark.parametrize("key", ["models", "made_of", "retention", "rows", "loss", "training", "changes", "seed"])
def test_a_file_that_lacks_something_is_refused(found, key):
    facts = {name: value for name, value in found.items() if name != key}
    with pytest.raises(CardError):
        render_student_card(student_values(facts, "a/b"))
    with pytest.raises(CardError):
        render_student_card(student_values(facts | {key: 7.5}, "a/b"))


def test_a_student_without_a_score_has_no_card(found):
    models = {who: model | {"score": {}} for who, model in found["models"].items()}
    with pytest.raises(CardError, match="promises nothing"):
        student_values(found | {"models": models}, "a/b")


def test_a_student_of_embeddings_says_what_it_was_asked_and_taught_by(found):
    embeds = found | {"task": "image-embedding", "loss": {"alpha": 0.0, "hidden": 0.0, "relation": 0.5}}
    models = {who: {**m, "score": m["score"] | {"nll": None, "scored": "by eye"}} for who, m in found["models"].items()}
    values = student_values(embeds | {"models": models}, "a/b")
    assert values["transfer"][0]["labels"] == "the teacher's embeddings" and values["tasks"][0]["scored"] == "by eye"
    assert values["pipeline_tag"] == "image-feature-extraction"
    assert student_values(found, "a/b")["tasks"][0]["scored"] is None
    unscored = {who: model | {"score": {}} for who, model in found["models"].items()}
    with pytest.raises(CardError, match="give its test labels"):
        student_values(embeds | {"models": unscored}, "a/b")


def test_first_weights_that_were_not_measured_are_called_so(found):
    models = {who: model for who, model in found["models"].items() if who != "student, before"}
    values = student_values(found | {"models": models}, "a/b")
    assert values["tasks"][0]["start"] is None
    assert "| student, before it was taught |  | not measured |" in render_student_card(values)


def test_first_weights_of_another_model_have_a_licence_of_their_own(found):
    other = found | {"start": "acme/small"}
    assert student_values(other, "a/b")["start"]["licence"] is None
    other["made_of"] = found["made_of"] | {"start_licence": "mit"}
    assert student_values(other, "a/b")["start"]["licence"] == "mit"
    assert student_values(other, "a/b")["teacher"]["licence"] == "apache-2.0"


@pytest.mark.parametrize(
    ("data", "name", "task"),
    [
        ("acme/letters:default:train", "acme/letters", "acme/letters:default:train"),
        ("letters.jsonl", "letters.jsonl", "letters.jsonl"),
    ],
)
def test_data_on_the_hub_are_known_by_their_id(found, data, name, task):
    values = student_values(found | {"data": data}, "a/b")
    assert (values["transfer"][0]["name"], values["tasks"][0]["name"]) == (name, task)
    results = read_metadata(render_student_card(values))["model-index"][0]["results"][0]
    assert results["dataset"] == {"name": task, "type": name if "/" in name else "local"}


def test_scores_are_named_after_the_rows_they_were_made_on(found):
    values = student_values(found | {"test": "held-out.jsonl"}, "a/b")
    assert (values["tasks"][0]["name"], values["transfer"][0]["name"]) == ("held-out.jsonl", "acme/letters")


def test_a_time_that_was_not_taken_is_not_shown(found):
    models = {who: model | {"latency_ms": None} for who, model in found["models"].items()}
    assert "Speed and memory: not measured" in render_student_card(student_values(found | {"models": models}, "a/b"))


def test_a_card_that_was_changed_by_hand_is_kept(tmp_path):
    folder = make_student(tmp_path / "s", mixed=False)
    with (folder / "README.md").open("a") as card:
        card.write("my words\n")
    with pytest.raises(OutputExistsError):
        write_student_card(folder, repo_id=STUDENT_REPO)
    write_student_card(folder, repo_id=STUDENT_REPO, overwrite=True)
    assert "my words" not in (folder / "README.md").read_text()
