"""A float student of a few kB as `hf-qep distill train` leaves it, with its card."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_qep.engine.manifest import file_table, versions
from hf_qep.evaluation.retention import paired_retention
from hf_qep.hub.allowed import DISTILLATION, weight_bytes
from hf_qep.hub.cards.distilled import write_student_card
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.saving import describe_changes, save_student
from hf_qep.students.vocabulary import VocabularyMap
from tests.students.specs import mixed_spec
from tests.students.teachers import batch, teacher
from tests.tiny_models import build_tokenizer

TEACHER, STUDENT_REPO = "acme/tiny-bert", "alice/tiny-sorter"
WORDS = "sorting 7 kinds of *letters*"
AUTO = "AutoModelForSequenceClassification"
ITEMS = 40


def make_student(
    folder: Path, *, mixed: bool = True, teacher_name: str = TEACHER, repo_id: str = STUDENT_REPO, **changes: Any
) -> Path:
    """A student of the tiny Bert with classes. mixed: its layers differ in size, so it carries its code. changes: keys
    of distillation.json that are other than usual."""
    model = teacher("bert_classifier")
    shape = teacher_shape(model)
    spec = mixed_spec(shape) if mixed else replace(shape.identity(), layers=shape.layers[1:])
    student = materialize(model, spec)
    vocabulary = VocabularyMap(tuple(range(shape.vocab_size)), shape.vocab_size)
    names = {"spec": spec, "shape": shape, "teacher_name": teacher_name, "vocabulary": vocabulary}
    save_student(student, folder, tokenizer=build_tokenizer(), **names)
    facts = distillation(student, model, describe_changes(spec, shape), folder)
    facts |= {"teacher": teacher_name, "spec": spec.key(), "test": None}
    write_distillation(folder, facts | {"start": teacher_name} | changes)
    write_student_card(folder, repo_id=repo_id, specialised_for=WORDS)
    return folder


def write_distillation(folder: Path, facts: dict[str, Any]) -> None:
    """distillation.json, with the digests of all files that lie there before it."""
    (folder / DISTILLATION).unlink(missing_ok=True)
    files = {name: entry for name, entry in file_table(folder).items() if name != "README.md"}
    (folder / DISTILLATION).write_text(json.dumps({"files": files} | facts))


def distillation(student: Any, model: Any, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a training has found, with scores that were never measured."""
    right = {"teacher": 36, "student, before": 22, "student, labels only": 27, "student": 33}
    items = {who: [float(i < count) for i in range(ITEMS)] for who, count in right.items()}
    parameters = {who: (model if who == "teacher" else student).num_parameters() for who in right}
    return {
        "task": "text-classification",
        "revision": None,
        "data": "acme/letters:default:train",
        "rows": {"train": 311, "judge": 52, "test": ITEMS},
        "models": {
            who: {"score": score(marks), "latency_ms": 3.25 + number, "parameters": parameters[who]}
            for number, (who, marks) in enumerate(items.items())
        },
        "retention": asdict(paired_retention(items["teacher"], items["student"], 0.55)[2]),
        "changes": changes,
        "loss": {"alpha": 0.5, "hidden": 0.0, "relation": 0.0},
        "schedule": {"seed": 3, "epochs": 4},
        "training": {"steps": 88, "best_epoch": 2, "seconds": 812.5},
        "made_of": {
            "revision": None,
            "licence": "apache-2.0",
            "teacher_bytes": 4 * model.num_parameters() + 4096,
            "student_bytes": weight_bytes(folder),
            "auto_class": AUTO,
        },
        "seed": 3,
        "versions": versions(),
    }


def score(marks: list[float]) -> dict[str, Any]:
    """A score as `Scores.summary` gives it."""
    values = torch.tensor(marks)
    error = values.std().item() / len(marks) ** 0.5
    means = {"nll": 0.5, "nll_stderr": 0.05, "accuracy": values.mean().item(), "accuracy_stderr": error}
    return {"answers": len(marks), **means, "auc": 0.75, "majority": 0.55}


def save_expected(folder: Path, path: Path) -> None:
    """Inputs and the outputs of the student in a folder."""
    from hf_qep.students.saving import load_student

    inputs = batch("bert_classifier")
    with torch.no_grad():
        torch.save((inputs, load_student(folder)(**inputs).logits), path)
