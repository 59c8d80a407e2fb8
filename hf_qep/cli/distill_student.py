"""A student as it begins, and as it is saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.cli.distill_job import Opened
from hf_qep.distill.samples import CAUSAL_LM, TaskData
from hf_qep.engine.source import load_float_model, load_quantized, resolve_model
from hf_qep.errors import CheckpointError
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.saving import describe_changes, save_student
from hf_qep.students.spec import CandidateSpec, TeacherShape
from hf_qep.students.vocabulary import FILE_NAME, VocabularyMap, trim_tokenizer


@dataclass
class Start:
    """A student before it learns. spec: None if it was not cut from the teacher. vocabulary: None for the teacher's."""

    student: PreTrainedModel
    spec: CandidateSpec | None
    processor: Any
    vocabulary: VocabularyMap | None = None
    name: str | None = None
    """Where it was loaded from, if it was."""

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


def begin(opened: Opened, spec: CandidateSpec, *, heal: bool = True) -> Start:
    """Cut a student from the teacher of a folder, heal it, and trim its vocabulary last."""
    student = opened.context(batch_size=16).student(spec, healed=heal)
    if spec.vocabulary is None:
        return Start(student, spec, opened.processor)
    student = materialize(student, replace(teacher_shape(student).identity(), vocabulary=spec.vocabulary))
    kept = VocabularyMap(spec.vocabulary, opened.shape.vocab_size)
    return Start(student, spec, trim_tokenizer(opened.processor, spec.vocabulary), kept)


def load(opened: Opened, name: str) -> Start:
    """A student from a folder or the Hub: a float model, or a packed one.

    Raises CheckpointError if it is not on speaking terms with the rows: a vocabulary of its own without a map.
    """
    folder = resolve_model(name, None)
    if "quantization_config" in (folder / "config.json").read_text(encoding="utf-8"):
        student, processor = load_quantized(folder, dtype=torch.float32), opened.processor
    else:
        student, processor = load_float_model(folder, dtype=torch.float32, device=opened.job.device)
    kept = VocabularyMap.load(folder) if (folder / FILE_NAME).is_file() else None
    theirs, ours = (getattr(m.config, "vocab_size", None) for m in (opened.teacher, student))
    if kept is None and theirs != ours:
        raise CheckpointError(
            f"{name!r} has a vocabulary of {ours} tokens and the teacher one of {theirs}; only a student that was cut "
            f"from it, with its {FILE_NAME}, can have another"
        )
    return Start(student.to(opened.job.device), _spec_of(folder), processor or opened.processor, kept, name)


def _spec_of(folder: Path) -> CandidateSpec | None:
    import json

    path = folder / "student.json"
    return CandidateSpec.from_dict(json.loads(path.read_text(encoding="utf-8"))["spec"]) if path.is_file() else None


def save(opened: Opened, start: Start, out: Path, *, overwrite: bool) -> None:
    """Write a student with its tokenizer or image processor."""
    shape = opened.shape
    whole = replace(teacher_shape(start.student).identity()) if start.spec is None else start.spec
    save_student(
        start.student,
        out,
        spec=whole,
        teacher_name=opened.job.teacher,
        shape=None if start.spec is None else shape,
        processor=start.processor,
        vocabulary=start.vocabulary,
        overwrite=overwrite,
    )
