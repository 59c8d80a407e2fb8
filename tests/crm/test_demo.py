"""The whole demonstration, small: everything runs, nothing runs twice, and the page can be written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from crm import page
from crm.presets import PRESETS
from crm.prompts import asked
from crm.specialist import METHODS
from crm.tabular import BASELINES
from demo_crm import run

from hf_qep.distill.reading import answer_tokens
from hf_qep.distill.records import RecordText
from hf_qep.hub.cards.distilled import write_student_card
from hf_qep.students.saving import load_student


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    work = tmp_path_factory.mktemp("demo")
    return work, run(PRESETS["quick"](), work, Path("nowhere"), ["world"], workers=0, quiet=True)


def test_every_method_has_its_row(done):
    _, results = done
    rows = results["tasks"]["world"]["rows"]
    assert set(rows) == {*BASELINES, *METHODS, page.RAW}
    assert rows["student"]["parameters"] * PRESETS["quick"]().plans["world"].share <= rows[page.TEACHER]["parameters"]
    assert rows[page.TEACHER]["prompt_tokens"] > rows["student"]["prompt_tokens"]
    assert rows[page.TEACHER]["memory_mb"] > rows["student"]["memory_mb"] > rows["student 1-bit"]["memory_mb"]
    assert [point["shots"] for point in results["teacher_skill"]] == [0, 2, 4, 8]
    text = page.measured_part(results)
    assert "| student 1-bit |" in text and "Against the few-shot teacher the student takes 1/" in text


def test_what_was_done_is_not_done_again(done):
    work, results = done
    answers = work / "world" / "answers"
    before = {path.name: path.stat().st_mtime_ns for path in answers.iterdir()}
    lost = answers / "student-without-distillation.0.npz"
    kept = np.load(lost)["test"]
    lost.unlink()
    again = run(PRESETS["quick"](), work, Path("nowhere"), ["world"], workers=0, quiet=True)
    after = {path.name: path.stat().st_mtime_ns for path in answers.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {lost.name}
    np.testing.assert_array_equal(np.load(lost)["test"], kept)
    assert again["tasks"]["world"]["rows"]["student"] == results["tasks"]["world"]["rows"]["student"]


def test_the_student_is_a_folder_for_the_hub(done):
    work, results = done
    for folder in (work / "world" / "student-0", work / "world" / "one-bit-0"):
        facts = json.loads((folder / "distillation.json").read_text())
        assert facts["prompt"]["tokens"] > 0
        card = write_student_card(folder, repo_id="me/deals", specialised_for="deals of one world").read_text()
        assert "the student reads none" in card


def test_the_student_reads_a_deal_as_the_demonstration_does(done):
    """From its folder, its tokenizer and the way rows are written: what a Space does."""
    from transformers import AutoTokenizer

    work, _ = done
    folder = work / "world" / "student-0"
    tokenizer, student = AutoTokenizer.from_pretrained(folder), load_student(folder).eval()
    offered = work / "space" / "deals-world"
    records = RecordText.load(offered / "records.json")
    assert json.loads((offered / "specialist.json").read_text())["teacher"] == "teacher"
    assert (work / "space" / "teacher" / "config.json").exists() and (offered / "teacher_prompt.txt").exists()
    assert json.loads((offered / "examples.json").read_text())[0]["outcome"] in (True, False)
    line = json.loads((work / "world" / "rows" / "test.jsonl").read_text().splitlines()[0])
    from crm.tasks import Sizes, world_table

    plan = PRESETS["quick"]().plans["world"]
    row = world_table(Sizes(plan.sizes.train, plan.sizes.valid, plan.sizes.test)).test.rows[0]
    assert asked(records.text(row)) == line["prompt"]
    ids = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
    with torch.no_grad():
        logits = student(input_ids=ids).logits[0, -1]
    answers = torch.tensor(answer_tokens(tokenizer, (" no", " yes")))
    said = logits[answers].softmax(-1)[1].item()
    assert said == pytest.approx(np.load(work / "world" / "answers" / "student.0.npz")["test"][0], abs=2e-3)
