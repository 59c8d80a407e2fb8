"""The work of `hf-qep distill train`."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.cli.distill_job import TEACHER, Opened, default_loss
from hf_qep.cli.distill_report import FACTS, write_facts
from hf_qep.cli.distill_student import Start, begin, load, save
from hf_qep.distill.corrected import calibrate_teacher
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.said import take_said
from hf_qep.distill.samples import DETECTION, EMBEDDING, TaskData
from hf_qep.distill.store import TeacherStore
from hf_qep.distill.student_trainer import TrainReport, train_student
from hf_qep.evaluation.retention import paired_retention
from hf_qep.extras import require
from hf_qep.progress import Progress
from hf_qep.search.latency import Bench
from hf_qep.search.proxies import default_rate
from hf_qep.search.scoring import Scores, score
from hf_qep.students.spec import CandidateSpec

SCORE_BATCH = 32
ADAPTER_RATE = 2e-3


@dataclass(frozen=True)
class Teaching:
    """How a student is taught. loss: fields of DistillLoss that were asked for, None for the task's default. schedule:
    arguments of `train_student`. calibrate: the teacher first. rank: of adapters, 0 for none. baselines: teach from the
    labels alone too. resume: go on with a training that was stopped."""

    loss: dict[str, Any]
    schedule: dict[str, Any]
    calibrate: bool
    rank: int
    baselines: bool
    resume: bool

    def loss_for(self, task: str) -> DistillLoss:
        """The loss of a task."""
        asked = {name: value for name, value in self.loss.items() if value is not None}
        return replace(default_loss(task), **asked)


def train(
    opened: Opened,
    spec: CandidateSpec | None,
    name: str | None,
    teaching: Teaching,
    out: Path,
    *,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Teach a student, measure everybody, save. Returns what is to be shown; it is written to the folder too."""
    start = begin(opened, spec) if name is None else load(opened, name)
    loss = teaching.loss_for(opened.job.task)
    found = {"teacher": _measured(opened.teacher, opened.test, opened)}
    found["student, before"] = _measured(start.student, start.rows(opened.test), opened)
    if teaching.baselines and loss.alpha < 1 and opened.train.labels is not None:
        alone = replace(start, student=copy.deepcopy(start.student))
        _teach(opened, alone, replace(loss, alpha=1.0, hidden=0.0, relation=0.0), teaching, "labels", progress)
        found["student, labels only"] = _measured(alone.student, start.rows(opened.test), opened)
    report = _teach(opened, start, loss, teaching, "student", progress)
    found["student"] = _measured(start.student, start.rows(opened.test), opened)
    save(opened, start, out, overwrite=overwrite)
    rows = {"train": len(opened.train), "judge": len(opened.judge), "test": len(opened.test)}
    facts = {
        "task": opened.job.task,
        "teacher": opened.job.teacher,
        "revision": opened.job.revision,
        "data": opened.job.data,
        "start": start.name or opened.job.teacher,
        "rows": rows,
        "models": {who: measured.to_dict() for who, measured in found.items()},
        "retention": found["student"].of(found["teacher"]),
        "changes": start.changes(opened.shape),
        "loss": loss.to_dict(),
        "schedule": teaching.schedule,
        "training": {"steps": report.steps, "best_epoch": report.best_epoch, "seconds": report.seconds},
    }
    write_facts(out / FACTS, facts, opened)
    return facts


def _teach(
    opened: Opened, start: Start, loss: DistillLoss, teaching: Teaching, name: str, progress: Progress
) -> TrainReport:
    """Train a student in place, by adapters that are merged afterwards if there are to be some."""
    data, held_out = start.rows(opened.train), start.rows(opened.judge)
    keep = None if start.vocabulary is None else start.vocabulary.to_old
    teacher = _store(opened, data, loss, keep, progress) if loss.asks else None
    calibration = None
    if teaching.calibrate and loss.alpha < 1 and _has_classes(held_out):
        said = take_said(opened.teacher, held_out, batch_size=SCORE_BATCH, keep_ids=keep)
        calibration = calibrate_teacher(said, held_out)
    student: Any = start.student
    rate = teaching.schedule["learning_rate"]
    if teaching.rank:
        peft = require("distill", "peft")
        student = peft.get_peft_model(student, peft.LoraConfig(r=teaching.rank, target_modules="all-linear"))
        rate = rate or ADAPTER_RATE
    hidden = getattr(start.student.config, "hidden_size", 64)
    report = train_student(
        student,
        data,
        held_out=held_out if held_out.labels is not None else None,
        teacher=teacher,
        loss=loss,
        calibration=calibration,
        keep_ids=keep,
        output_dir=opened.folder / f"training-{name}" if teaching.resume else None,
        resume=teaching.resume,
        progress=progress,
        **teaching.schedule | {"learning_rate": rate or default_rate(hidden)},
    )
    if teaching.rank:
        start.student = student.merge_and_unload()
    return report


def _has_classes(data: TaskData) -> bool:
    return isinstance(data.labels, Tensor) and (data.answers is not None or data.classes is not None)


def _store(opened: Opened, data: TaskData, loss: DistillLoss, keep: Tensor | None, progress: Progress) -> TeacherStore:
    """What the teacher says about the rows, from the folder where it was asked before."""
    kind = "all" if keep is None else f"{len(keep)}-tokens"
    folder = opened.folder / TEACHER / (kind + ("-hidden" if loss.needs_hidden else ""))
    return TeacherStore.build(
        folder, opened.teacher, data, keep_ids=keep, hidden=loss.needs_hidden, batch_size=SCORE_BATCH, progress=progress
    )


@dataclass(frozen=True)
class _Measured:
    """scores: on the rows of the report, None for a task without classes. latency_ms: of one row."""

    scores: Scores | None
    latency_ms: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        score = {} if self.scores is None else self.scores.summary()
        return {"score": score, "latency_ms": self.latency_ms, "parameters": self.parameters}

    def of(self, teacher: _Measured) -> dict[str, Any] | None:
        """What it has of the teacher's accuracy on the same items, as a JSON value of `Retention`."""
        if self.scores is None or teacher.scores is None:
            return None
        items = [scores.correct.float().tolist() for scores in (teacher.scores, self.scores)]
        return asdict(paired_retention(*items, self.scores.chance)[2])


def _measured(model: PreTrainedModel, test: TaskData, opened: Opened) -> _Measured:
    scored = opened.job.task not in (EMBEDDING, DETECTION) and test.labels is not None
    inputs = {name: value.to(model.device) for name, value in test.rows(slice(0, 1)).inputs.items()}
    bench = Bench(lambda spec: model, lambda spec: inputs)
    latency = bench.medians([opened.shape.identity()])[0]
    return _Measured(score(model, test, SCORE_BATCH) if scored else None, latency, model.num_parameters())
