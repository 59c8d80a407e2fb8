"""The work of `hf-qep distill train`."""

from __future__ import annotations

import copy
import hashlib
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_qep.algorithms.calibrated import Calibration
from hf_qep.cli.distill_job import TEACHER, TRAINING, default_loss, public_name
from hf_qep.cli.distill_measured import BEFORE, LABELS_ONLY, Measured, beside, latencies, measured
from hf_qep.cli.distill_opened import Opened
from hf_qep.cli.distill_report import write_facts
from hf_qep.cli.distill_student import Start, begin, load, save
from hf_qep.distill.corrected import calibrate_teacher
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.said import Said
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, TaskData
from hf_qep.distill.store import TeacherStore
from hf_qep.distill.student_trainer import TrainReport, train_student
from hf_qep.errors import ConfigError
from hf_qep.extras import require
from hf_qep.modules import packed_modules
from hf_qep.progress import Progress
from hf_qep.search.costs import Choice
from hf_qep.search.proxies import default_rate
from hf_qep.search.scoring import Scores, can_score, score_said

ADAPTER_RATE = 2e-3
"""Adam's step for adapters, whose weights start near zero."""
ASK_BATCH = 32


@dataclass(frozen=True)
class Teaching:
    """How a student is taught.

    loss: fields of DistillLoss that were asked for, None for the task's default. schedule: arguments of
    `train_student`. calibrate: the teacher first; None where its classes all have rows to do so by. rank: of adapters,
    0 for none. baselines: teach from the labels alone too. resume: go on with a training that was stopped.
    """

    loss: dict[str, Any]
    schedule: dict[str, Any]
    calibrate: bool | None = None
    rank: int = 0
    baselines: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"the rank of adapters must be at least 0, not {self.rank}")

    def loss_for(self, task: str) -> DistillLoss:
        """The loss of a task."""
        asked = {name: value for name, value in self.loss.items() if value is not None}
        return replace(default_loss(task), **asked)


def train(
    opened: Opened,
    choice: Choice | None,
    name: str | None,
    teaching: Teaching,
    out: Path,
    *,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Teach a student, measure everybody, save. Returns what is to be shown; it is written to the folder too.

    choice: what to cut from the teacher. name: folder or Hub id of the student, instead.
    """
    loss = teaching.loss_for(opened.job.task)
    _check_wishes(opened, teaching, loss)
    start = load(opened, name) if choice is None else begin(opened, choice)
    lesson = Lesson(opened, start, teaching, progress)
    found = {"teacher": lesson.measure(opened.asked), BEFORE: lesson.measure(start.student)}
    if teaching.baselines and loss.alpha < 1:  # else the student itself learns from the labels alone
        alone = copy.deepcopy(start.student)
        student, _ = lesson.teach(alone, replace(loss, alpha=1.0, hidden=0.0, relation=0.0), "labels")
        found[LABELS_ONLY] = lesson.measure(student)
    start.student, report = lesson.teach(start.student, loss, "student")
    found["student"] = lesson.measure(start.student)
    timed = {"teacher": (opened.asked, opened.test), "student": (start.student, start.rows(opened.test))}
    times = latencies(timed, opened.shape)
    save(opened, start, out, overwrite=overwrite)
    facts = _facts(opened, start, found, times) | {
        "loss": loss.to_dict(),
        "schedule": teaching.schedule | {"learning_rate": lesson.rate(), "lora_rank": teaching.rank},
        "calibration": None if lesson.calibration is None else asdict(lesson.calibration),
        "training": asdict(report),
    }
    first = {"start_revision": start.revision, "start_licence": start.licence}
    facts = write_facts(out, facts, opened.source, **first)
    lesson.forget()
    return facts


def _check_wishes(opened: Opened, teaching: Teaching, loss: DistillLoss) -> None:
    """What would only fail after hours."""
    if opened.job.task == EMBEDDING and (teaching.baselines or loss.alpha):
        raise ConfigError(f"{EMBEDDING} has no labels to learn from; leave --baselines and --alpha")
    if opened.train.labels is None and loss.alpha:
        raise ConfigError("the rows have no labels to learn from; give --alpha 0")
    if teaching.calibrate and (loss.alpha == 1 or not _has_classes(opened.judge)):
        raise ConfigError("a teacher is calibrated where it is asked and its classes are known; leave --calibrate")


def _facts(opened: Opened, start: Start, found: dict[str, Measured], times: dict[str, float]) -> dict[str, Any]:
    job, teacher = opened.job, public_name(opened.job.teacher)
    return {
        "task": job.task,
        "teacher": teacher,
        "data": public_name(job.data),
        "test": None if job.test is None else public_name(job.test),
        "prompt": opened.prompt_facts(),
        "start": start.origin or teacher,
        "rows": {name: len(part) for name, part in opened.parts.items()},
        **beside(found, times),
        "spec": None if start.spec is None else start.spec.key(),
        "bits": start.bits,
        "changes": start.changes(opened.shape),
    }


class Lesson:
    """A student's rows, and what the teacher says about them, behind its prompt if it has one.

    opened, start: the teacher with its rows, and the student. parts: `train`, `judge` and `test`, the rows in the
    student's vocabulary. tokens: the teacher's ids of its tokens (vocabulary,) int64, None for all. calibration: of
    the teacher, once there was a training that asked it.
    """

    def __init__(self, opened: Opened, start: Start, teaching: Teaching, progress: Progress) -> None:
        self.opened, self.start, self.teaching, self.progress = opened, start, teaching, progress
        self.folders: list[Path] = []
        self.parts = {name: start.rows(part) for name, part in opened.parts.items()}
        # Only a language model answers with tokens; another reads all of the teacher's and answers with its classes.
        self.tokens = start.keep_ids if opened.job.task == CAUSAL_LM else None
        self.calibration: Calibration | None = None

    def measure(self, model: Any) -> Measured:
        """A model on the rows of the report, which nothing is chosen by: the teacher, with or without its prompt, or a
        student in the vocabulary of this one."""
        if model is self.opened.asked:
            return measured(model, self.opened.test, None, self.progress, self._own_scores())
        if model is self.opened.teacher:
            return measured(model, self.opened.test, self.said("test", kept=False), self.progress)
        return measured(model, self.parts["test"], self.said("test"), self.progress)

    def _own_scores(self) -> Scores | None:
        """The teacher's, from what it said about the rows, or None where it has to be asked again."""
        said = self.said("test") if can_score(self.parts["test"]) else None
        whole = self.tokens is None or self.parts["test"].answers is not None
        return score_said(said, self.parts["test"]) if said is not None and said.index is None and whole else None

    def teach(self, student: Any, loss: DistillLoss, who: str) -> tuple[Any, TrainReport]:
        """The student after its training, by adapters that are merged afterwards if there are to be some.

        who: names its checkpoints, which `forget` removes. Raises ConfigError if student, loss and rows do not belong
        together.
        """
        data, judge = self.parts["train"], self.parts["judge"]
        teacher: Any = None
        judged: Said | None = None
        if judge.labels is None:
            teacher = self.opened.asked  # only one that is asked now can judge rows without labels
        elif loss.asks:
            teacher = self.said("train", hidden=loss.needs_hidden)
            judged = self.said("judge") if loss.alpha < 1 and judge.task not in (EMBEDDING, DETECTION) else None
            self.calibration = None if judged is None else self._calibrated(judged)
        adapted = self._adapted(student) if self.teaching.rank else student
        folder = self._folder(who)
        report = train_student(
            adapted,
            data,
            held_out=judge,
            held_out_said=judged,
            teacher=teacher,
            loss=loss,
            calibration=self.calibration if loss.asks else None,
            keep_ids=self.tokens,
            output_dir=folder,
            resume=folder.exists(),
            progress=self.progress,
            **self.teaching.schedule | {"learning_rate": self.rate()},
        )
        return adapted.merge_and_unload() if self.teaching.rank else student, report

    def rate(self) -> float:
        """The highest rate of the optimiser."""
        width = getattr(self.start.student.config, "hidden_size", 64)
        return self.teaching.schedule["learning_rate"] or (ADAPTER_RATE if self.teaching.rank else default_rate(width))

    def said(self, part: str, *, hidden: bool = False, kept: bool = True) -> Said:
        """What the teacher says about the rows of a part, from the folder where it was asked before.

        hidden: also its last hidden state. kept: only about the student's tokens. Raises ConfigError if the folder
        holds answers of another teacher, behind another prompt or to other rows.
        """
        tokens = self.tokens if kept else None
        mark = "" if tokens is None else f"-{_digest(tokens)}"
        folder = self.opened.folder / TEACHER / f"{part}{mark}{'-hidden' if hidden else ''}"
        data = (self.opened.parts if tokens is None else self.parts)[part]
        options = {"keep_ids": tokens, "hidden": hidden, "batch_size": ASK_BATCH, "progress": self.progress}
        return TeacherStore.build(folder, self.opened.asked, data, **options).said

    def forget(self) -> None:
        """Remove the checkpoints of trainings that have come to their end."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, who: str) -> Path:
        """Where the training keeps its last epoch; empty unless it is to go on."""
        folder = self.opened.folder / TRAINING / f"{self.start.key()}-{who}"
        self.folders.append(folder)
        if not self.teaching.resume:
            shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _calibrated(self, said: Said) -> Calibration | None:
        """The teacher's temperature and bias by what it said about the rows to judge by, None where it is left as it
        is."""
        if self.teaching.calibrate is False or not _has_classes(self.parts["judge"]):
            return None
        try:
            return calibrate_teacher(said, self.parts["judge"])
        except ConfigError as error:
            if self.teaching.calibrate:
                raise
            warnings.warn(f"the teacher is taught from as it is, without calibration: {error}", stacklevel=2)
            return None

    def _adapted(self, student: Any) -> Any:
        """The student with adapters of peft around its linears."""
        if packed_modules(student):
            raise ConfigError("a packed student trains its signs and scales, not adapters; leave --lora-rank")
        peft = require("distill", "peft")
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and transformers do not always agree on names
            torch.manual_seed(self.teaching.schedule["seed"])
            config = peft.LoraConfig(r=self.teaching.rank, target_modules="all-linear")
            return peft.get_peft_model(student, config)


def _has_classes(data: TaskData) -> bool:
    return isinstance(data.labels, Tensor) and (data.answers is not None or data.task != CAUSAL_LM)


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()[:8]
