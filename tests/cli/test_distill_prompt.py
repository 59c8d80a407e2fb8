"""`hf-qep distill` of a teacher that reads a prompt: it answers behind it, its student does without."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from hf_qep.cli.distill_job import Job, read_prompt
from hf_qep.cli.distill_opened import open_job, open_new
from hf_qep.cli.distill_student import begin
from hf_qep.cli.distill_train import Lesson, Teaching
from hf_qep.distill.losses import DistillLoss
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.progress import SILENT
from hf_qep.search.costs import Choice
from tests.cli.distilling import CAUSAL, distil, refused
from tests.tiny_models import BOS

PROMPT = "Which digit is larger?\r\nis 4 > 2?yes\nis 1 > 7?no\n"
TEACHING = Teaching(
    asdict(DistillLoss(alpha=0.5)), {"epochs": 1.0, "batch_size": 16, "seed": 0, "learning_rate": 0.002}, False
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, teacher_folder, rows_file, question_work):
    """A folder whose teacher reads a prompt, a student of it with a trimmed vocabulary, and what commands printed."""
    folder = tmp_path_factory.mktemp("prompted")
    prompt, spec = folder / "prompt.txt", folder / "cut" / "student.json"
    prompt.write_bytes(PROMPT.encode())
    distil("materialize", question_work.folder, "--pick", "fast", "--out", folder / "cut")
    words = ("--data", rows_file, "--out", folder / "work", *CAUSAL, "--teacher-prompt", prompt)
    analysis = distil("analyze", teacher_folder("llama"), *words)
    words = ("--spec", spec, "--out", folder / "student", "--epochs", 1)
    facts = distil("train", folder / "work", *words)
    return SimpleNamespace(work=folder / "work", student=folder / "student", analysis=analysis, facts=facts, spec=spec)


def lesson(work, spec) -> Lesson:
    opened = open_job(work)
    choice: Choice = opened.chosen("fast", spec)
    return Lesson(opened, begin(opened, choice), TEACHING, SILENT)


@pytest.fixture(scope="module")
def taught(asked):
    return lesson(asked.work, asked.spec)


def test_the_teacher_answers_as_behind_the_whole_text(taught):
    opened, data = taught.opened, taught.opened.test
    prompt = opened.processor(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for row, said in zip(data.rows(slice(0, 3)).inputs["input_ids"], taught.said("test").log_p, strict=False):
            tokens = row[row != opened.processor.pad_token_id][:-1]  # the last one is the answer
            logits = opened.teacher(input_ids=torch.cat([prompt[0], tokens])[None]).logits[0, -1]
            wanted = logits[list(data.answers)].log_softmax(-1)
            assert torch.allclose(said.float(), wanted, atol=2e-3)


def test_what_is_stored_and_measured_is_not_what_the_bare_teacher_says(asked, taught, question_work):
    bare = lesson(question_work.folder, asked.spec)
    assert torch.equal(taught.parts["test"].inputs["input_ids"], bare.parts["test"].inputs["input_ids"])
    assert not torch.allclose(taught.said("test").log_p, bare.said("test").log_p, atol=1e-3)
    assert asked.analysis["teacher"]["nll"] != question_work.analysis["teacher"]["nll"]
    assert asked.analysis["layers"] == question_work.analysis["layers"], "what is cut is judged without the prompt"


def test_answers_of_another_prompt_or_of_none_are_refused(asked, question_work, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(asked.work, work)
    job = Job.load(work)
    for prompt in (None, PROMPT + "is 3 > 2?yes\n"):
        replace(job, prompt=prompt).save(work)
        with pytest.raises(ConfigError, match="another teacher"):
            lesson(work, asked.spec).said("test")


def test_a_lesson_measures_the_teacher_with_and_without_its_prompt(taught):
    asked, bare = taught.measure(taught.opened.asked), taught.measure(taught.opened.teacher)
    assert asked.distance == 0 < bare.distance
    assert asked.parameters == bare.parameters == taught.opened.teacher.num_parameters()
    assert not torch.equal(asked.scores.nll, bare.scores.nll)


def test_a_student_learns_what_the_prompt_makes_of_the_teacher(taught):
    before = taught.measure(taught.start.student)
    towards = DistillLoss(alpha=0.0, label_correction=False)
    student, report = taught.teach(taught.start.student, towards, "prompted")
    assert report.after["loss"] <= report.before["loss"]
    assert taught.measure(student).distance <= before.distance
    taught.forget()


def test_the_file_says_which_prompt_it_was_and_not_what_it_says(asked):
    text = (asked.student / "distillation.json").read_text()
    digest = hashlib.sha256(PROMPT.encode()).hexdigest()
    assert json.loads(text)["prompt"] == {"tokens": 1 + len(PROMPT.replace("\r", "?")), "sha256": digest}
    assert "Which digit" not in text
    assert asked.facts["models"]["teacher"]["distance"] == 0 < asked.facts["models"]["teacher"]["latency_ms"]


def test_a_training_without_a_prompt_says_so(question_work, asked, tmp_path):
    words = ("train", question_work.folder, "--spec", asked.spec, "--out", tmp_path / "s", "--epochs", 1)
    assert distil(*words)["prompt"] is None
    distil("report", tmp_path / "s", "--card")
    assert "prompt" not in (tmp_path / "s" / "README.md").read_text().lower()


def test_the_card_has_the_sentence(asked):
    distil("report", asked.student, "--card")
    card = (asked.student / "README.md").read_text()
    found = asked.facts["prompt"]
    said = (
        f"read a prompt of {found['tokens']} tokens before every item (sha256 `{found['sha256']}`); the student reads"
    )
    assert said in card.split("## How it was taught")[1].split("\n## ")[0]
    assert "prompt was read beforehand and is not timed" in card


def test_rows_leave_room_for_the_prompt(teacher_folder, rows_file, tmp_path):
    # 128 positions: a prompt of 118 characters and the token that begins it leave 9 of the 10 to 11 tokens of a row.
    job = Job(str(teacher_folder("llama")), "causal-lm", str(rows_file), answers=("yes", "no"), prompt="x" * 118)
    opened = open_new(tmp_path, job)
    assert len(opened.prompt_ids) == 119 and opened.train.inputs["input_ids"].shape[1] == 9
    with torch.no_grad():
        opened.asked(**opened.train.rows(slice(0, 2)).inputs)


def test_the_token_that_begins_a_text_is_put_in_front_where_the_tokenizer_does_not(teacher_folder, rows_file, tmp_path):
    job = Job(str(teacher_folder("llama")), "causal-lm", str(rows_file), answers=("yes", "no"), prompt="abc")
    assert open_new(tmp_path, job).prompt_ids.tolist().count(BOS) == 1
    folder = tmp_path / "plain"
    shutil.copytree(teacher_folder("llama"), folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    assert BOS not in tf.AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
    ids = open_new(tmp_path, replace(job, teacher=str(folder))).prompt_ids.tolist()
    assert ids[0] == BOS and len(ids) == 4


def test_folders_of_before_have_no_prompt(question_work, tmp_path):
    values = json.loads((question_work.folder / "job.json").read_text())
    values.pop("prompt")
    (tmp_path / "job.json").write_text(json.dumps(values))
    assert Job.load(tmp_path) == Job.load(question_work.folder)
    (tmp_path / "job.json").write_text(json.dumps(values | {"propmt": "x"}))
    with pytest.raises(CheckpointError):
        Job.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "hint"), [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfe", "UTF-8"), (b"x" * 126, "shorten it")]
)
def test_prompts_that_cannot_be(teacher_folder, rows_file, tmp_path, content, hint):
    (tmp_path / "p.txt").write_bytes(content)
    words = ("--data", rows_file, "--out", tmp_path / "w", *CAUSAL, "--teacher-prompt", tmp_path / "p.txt")
    assert hint in refused("analyze", teacher_folder("llama"), *words)
    assert not (tmp_path / "w").exists()


def test_a_prompt_that_is_not_there_or_of_another_task(teacher_folder, rows_file, tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.txt"):
        read_prompt(tmp_path / "gone.txt")
    (tmp_path / "p.txt").write_text("Say which.")
    words = ("--data", rows_file, "--out", tmp_path / "w", "--teacher-prompt", tmp_path / "p.txt")
    said = refused("analyze", teacher_folder("bert_classifier"), *words, "--task", "text-classification")
    assert "only a teacher of causal-lm reads a prompt" in said
