"""A student as it begins, and as it is saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.cli.distill_job import public_name
from hf_qep.cli.distill_opened import Opened, check_head
from hf_qep.distill.checks import check_data, check_teacher
from hf_qep.distill.said import embedding_of, forward_inputs
from hf_qep.distill.samples import CAUSAL_LM, EMBEDDING, TaskData
from hf_qep.engine.headers import read_json
from hf_qep.engine.source import licence_of, load_float_model, load_processor, load_quantized, resolve_model
from hf_qep.engine.source import snapshot_revision as revision_of
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import write_aside
from hf_qep.search.costs import Choice
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.saving import FILE_NAME as NOTE
from hf_qep.students.saving import describe_changes, save_student
from hf_qep.students.spec import CandidateSpec, TeacherShape
from hf_qep.students.vocabulary import FILE_NAME, VocabularyMap, trim_tokenizer


@dataclass
class Start:
    """A student before it learns.

    spec: None if it was not cut from the teacher. vocabulary: None for the teacher's. name: where it was loaded from,
    if it was. bits: per weight of the blocks as the search stored them, None for floats. origin: name of the first
    weights where they are not the teacher's; revision, licence: of those.
    """

    student: PreTrainedModel
    spec: CandidateSpec | None
    processor: Any
    vocabulary: VocabularyMap | None = None
    name: str | None = None
    bits: float | None = None
    origin: str | None = None
    revision: str | None = None
    licence: str | None = None

    def key(self) -> str:
        """A name for files about it."""
        return self.spec.key() if self.name is None else hashlib.sha256(self.name.encode()).hexdigest()[:16]

    @property
    def keep_ids(self) -> Tensor | None:
        """The teacher's ids of its tokens, None if it has all of them."""
        return None if self.vocabulary is None else self.vocabulary.to_old

    def changes(self, shape: TeacherShape) -> dict[str, Any]:
        """What was done to the teacher, for people."""
        return {} if self.spec is None else describe_changes(self.spec, shape)

    def rows(self, data: TaskData) -> TaskData:
        """Rows in the student's vocabulary."""
        if self.vocabulary is None:
            return data
        inputs = dict(data.inputs) | {"input_ids": self.vocabulary.encode(data.inputs["input_ids"])}
        labels, answers = data.labels, data.answers
        if data.task == CAUSAL_LM and isinstance(labels, Tensor):
            labels = self.vocabulary.encode(labels)
        if answers is not None:
            answers = tuple(self.vocabulary.encode(torch.tensor(answers)).tolist())
        return replace(data, inputs=inputs, labels=labels, answers=answers)


def begin(opened: Opened, choice: Choice, *, heal: bool = True) -> Start:
    """Cut a student from the teacher of a folder, heal it, and trim its vocabulary last."""
    spec = choice.spec
    student = opened.context(batch_size=16).student(spec, healed=heal)
    if spec.vocabulary is None:
        return Start(student, spec, opened.processor, bits=choice.bits)
    student = materialize(student, replace(teacher_shape(student).identity(), vocabulary=spec.vocabulary))
    kept = VocabularyMap(spec.vocabulary, opened.shape.vocab_size)
    return Start(student, spec, trim_tokenizer(opened.processor, spec.vocabulary), kept, bits=choice.bits)


def load(opened: Opened, name: str) -> Start:
    """A student from a folder or the Hub: a float model, or a packed one.

    Raises CheckpointError if it has a vocabulary of its own without a map, ConfigError if it cannot do the task, read
    the rows or answer as the teacher does.
    """
    folder = resolve_model(name, None)
    if "quantization_config" in read_json(folder / "config.json"):
        student, processor = load_quantized(folder, dtype=torch.float32), load_processor(folder)
    else:
        student, processor = load_float_model(folder, dtype=torch.float32, device=opened.job.device)
    kept = VocabularyMap.load(folder) if (folder / FILE_NAME).is_file() else None
    _check_vocabulary(opened, student, kept, name)
    note = read_json(folder / NOTE) if (folder / NOTE).is_file() else None
    spec = None if note is None else CandidateSpec.from_dict(note["spec"])
    start = Start(student.to(opened.job.device), spec, processor or opened.processor, kept, name)
    if note is None or note.get("teacher") != public_name(opened.job.teacher):
        start.origin, start.revision, start.licence = public_name(name), revision_of(folder), licence_of(folder)
    _check_answers(opened, start)
    return start


def _check_vocabulary(opened: Opened, student: PreTrainedModel, kept: VocabularyMap | None, name: str) -> None:
    theirs, ours = (getattr(m.config, "vocab_size", None) for m in (opened.teacher, student))
    sizes = (theirs, theirs) if kept is None else (kept.size, len(kept.kept))
    if sizes != (theirs, ours):
        raise CheckpointError(
            f"{public_name(name)!r} has a vocabulary of {ours} tokens and the teacher one of {theirs}; only a student "
            f"that was cut from it, with its {FILE_NAME}, can have another"
        )


@torch.no_grad()
def _check_answers(opened: Opened, start: Start) -> None:
    task, student = opened.job.task, start.student
    check_head(student, task, public_name(start.name or ""))
    check_data(start.rows(opened.train), student)
    check_teacher(student, opened.teacher, task, start.keep_ids if task == CAUSAL_LM else None)
    if task == EMBEDDING:
        batch = next(opened.train.rows(slice(0, 1)).batches(1, student.device))
        ours, theirs = (embedding_of(m(**forward_inputs(batch))).shape[-1] for m in (student, opened.teacher))
        if ours != theirs:
            raise ConfigError(f"the student's embeddings are {ours} wide and the teacher's {theirs}; make them equal")


def save(opened: Opened, start: Start, out: Path, *, overwrite: bool) -> None:
    """Write a student with its tokenizer or image processor."""
    if start.spec is not None:
        save_student(
            start.student,
            out,
            spec=start.spec,
            teacher_name=public_name(opened.job.teacher),
            shape=opened.shape,
            processor=start.processor,
            vocabulary=start.vocabulary,
            overwrite=overwrite,
        )
        return
    with write_aside(out, overwrite=overwrite) as aside:
        start.student.save_pretrained(aside)
        start.processor.save_pretrained(aside)
        if start.vocabulary is not None:
            start.vocabulary.save(aside)
