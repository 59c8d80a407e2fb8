"""A student is trained for a task, from its checks to its report.

One call for every kind of student: all its weights train, or its adapters (peft), or, where it is packed, latents of
its signs and its scales. The epoch with the lowest loss on the held-out rows is kept: of labels and teacher together
where it is known what the teacher says about them, else of their labels. Nothing is left behind on disk unless a folder
is given; a training that was stopped goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_qep.algorithms.calibrated import Calibration
from hf_qep.distill.checks import check_judged, check_run
from hf_qep.distill.hidden import projections_for
from hf_qep.distill.learning import Learning, learning, quiet_trainer, randomness_kept, trainer_arguments
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.objective import Objective
from hf_qep.distill.said import Said
from hf_qep.distill.samples import DETECTION, TaskData
from hf_qep.distill.store import TeacherStore
from hf_qep.errors import ConfigError
from hf_qep.files import check_output, write_text_aside
from hf_qep.progress import SILENT, Progress

if TYPE_CHECKING:
    from hf_qep.distill.trainer import StudentTrainer

SETTINGS = "training.json"
MEASURED = ("loss", "nll", "accuracy", "auc")


@dataclass(frozen=True)
class TrainReport:
    """What a training did.

    steps: of the optimiser. before, after: of the held-out rows, `loss` and where labels are known `nll` in nats,
    `accuracy` and `auc`; None without such rows. best_epoch: the one that was kept, 0 if none was better than the
    start, None without held-out rows, when the last state is kept. seconds: of everything.
    """

    steps: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    best_epoch: int | None
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; see `train_student`. Raises ConfigError for values that are out of range."""

    epochs: float
    steps: int | None
    learning_rate: float
    batch_size: int
    accumulate: int
    warmup: float
    seed: int
    dropout: bool

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "learning_rate",
            "batch_size",
            "accumulate",
            *(["steps"] if self.steps is not None else []),
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` of a training must be above 0, not {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"`warmup` is a share of the steps, at least 0 and below 1, not {self.warmup!r}")

    def total(self, rows: int, processes: int) -> int:
        """Steps of the optimiser."""
        each = math.ceil(math.ceil(rows / (self.batch_size * processes)) / self.accumulate)
        return self.steps or math.ceil(self.epochs * each)


def train_student(
    student: Any,
    data: TaskData,
    *,
    held_out: TaskData | None = None,
    held_out_said: Said | None = None,
    teacher: nn.Module | TeacherStore | Said | None = None,
    loss: DistillLoss | None = None,
    epochs: float = 3.0,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    accumulate: int = 1,
    warmup: float = 0.1,
    seed: int = 0,
    dropout: bool = False,
    prototypes: Tensor | None = None,
    calibration: Calibration | None = None,
    keep_ids: Tensor | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
) -> TrainReport:
    """Train a student in place, where it lies.

    student: a model with the head of the task, plain, with adapters of peft, or packed. held_out: rows to judge by;
    without labels they need a teacher that is a model. held_out_said: what the teacher said about them; what the
    student is to learn then judges it, not the labels alone. teacher: a model, or what one said about every row of
    `data`; None where the loss asks none. steps: instead of epochs. learning_rate: the highest, after a share `warmup`
    of the steps, then down a cosine; packed students have rates of their own. batch_size: rows of one process and
    batch, `accumulate` batches are a step. prototypes: (classes, width), for embeddings. calibration: of the teacher.
    keep_ids: see `said.LiveTeacher`. output_dir: empty folder for checkpoints, one per epoch, from the last of which
    `resume` goes on. Randomness of torch, numpy and Python is as before afterwards.

    Raises ConfigError where student, teacher, rows and loss do not belong together, or a training with other settings
    is resumed; OutputExistsError if output_dir holds something and nothing is resumed.
    """
    started, loss = time.monotonic(), loss or DistillLoss()
    schedule = Schedule(epochs, steps, learning_rate, batch_size, accumulate, warmup, seed, dropout)
    said = check_run(student, data, held_out, teacher, loss, keep_ids, prototypes)
    judged = check_judged(held_out, held_out_said, loss, student)
    settings = {"data": data.fingerprint(), "loss": loss.to_dict(), "schedule": asdict(schedule)}
    with (
        randomness_kept(),
        _folder(output_dir, resume, settings) as (folder, checkpoint),
        _as_it_was(said),
        learning(student) as learns,
        quiet_trainer(),
    ):
        projections = projections_for(student, said, data.task, loss, seed)
        objects = student.config.num_labels if data.task == DETECTION else None
        objective = Objective(loss, data.task, data.answers, prototypes, calibration, projections, objects)
        arguments = _arguments(student, folder, schedule, learns, held_out is not None, output_dir is not None)
        trainer = _trainer(student, arguments, data, held_out, objective, said, judged, keep_ids, learns, dropout)
        total = schedule.total(len(data), trainer.args.world_size)
        found = _run(trainer, learns, checkpoint, total, progress)
    return TrainReport(trainer.state.global_step, *found, time.monotonic() - started)


def _trainer(
    student: Any,
    arguments: Any,
    data: TaskData,
    held_out: TaskData | None,
    objective: Objective,
    teacher: nn.Module | Said | None,
    judged: Said | None,
    keep_ids: Tensor | None,
    learns: Learning,
    dropout: bool,
) -> StudentTrainer:
    from hf_qep.distill.trainer import StudentTrainer, TaskRows  # transformers' Trainer loads peft and datasets

    return StudentTrainer(
        model=student,
        args=arguments,
        train_dataset=TaskRows(data),
        eval_dataset=None if held_out is None else TaskRows(held_out, numbered=judged is not None),
        objective=objective,
        teacher=teacher,
        held_out_said=judged,
        keep_ids=keep_ids,
        parameter_groups=learns.groups,
        dropout=dropout,
    )


def _run(
    trainer: StudentTrainer, learns: Learning, checkpoint: str | None, total: int, progress: Progress
) -> tuple[dict[str, float] | None, dict[str, float] | None, int | None]:
    """Train and keep the best; measurements before and after, and the epoch that was kept."""
    from transformers import PrinterCallback

    from hf_qep.distill.trainer import KeepBest, StepBar

    trainer.remove_callback(PrinterCallback)
    before = _measured(trainer)
    with progress.bar("training", total) as bar:
        trainer.add_callback(StepBar(bar))
        if before is not None:
            trainer.best = KeepBest(learns.tensors, before["loss"], lambda *_: None)
            trainer.add_callback(trainer.best)
        with torch.enable_grad():
            trainer.train(resume_from_checkpoint=checkpoint)
    best = trainer.best
    if best is not None:
        trainer.remove_callback(best)
        best.restore()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    learns.finish()
    after = _measured(trainer)
    if best is None or before is None or after is None:
        return None, None, None
    if best.epoch and after["loss"] < before["loss"]:
        return before, after, best.epoch
    learns.undo()  # rounding to what is stored can undo a small gain
    return before, before, 0


def _measured(trainer: StudentTrainer) -> dict[str, float] | None:
    if trainer.eval_dataset is None:
        return None
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in MEASURED if f"eval_{name}" in found}


def _arguments(student: Any, folder: str, schedule: Schedule, learns: Learning, judged: bool, saved: bool) -> Any:
    return trainer_arguments(
        student,
        folder,
        batch_size=schedule.batch_size,
        betas=learns.betas,
        seed=schedule.seed,
        num_train_epochs=schedule.epochs,
        max_steps=schedule.steps or -1,
        learning_rate=schedule.learning_rate,
        gradient_accumulation_steps=schedule.accumulate,
        warmup_steps=schedule.warmup,
        max_grad_norm=1.0 if learns.groups is None else 0.0,  # rates of packed students are in units of their scales
        eval_strategy="epoch" if judged else "no",
        save_strategy="epoch" if saved else "no",
        save_total_limit=1,
    )


@contextmanager
def _folder(output_dir: str | Path | None, resume: bool, settings: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Where checkpoints go, and the one to go on from."""
    from transformers.trainer_utils import get_last_checkpoint

    if output_dir is None:
        if resume:
            raise ConfigError("a training is resumed from its output_dir; give the one it had")
        with tempfile.TemporaryDirectory(prefix="hf_qep_") as folder:
            yield folder, None
        return
    path = Path(output_dir)
    if resume and (path / SETTINGS).exists():
        _check_settings(json.loads((path / SETTINGS).read_text(encoding="utf-8")), settings)
    elif int(os.environ.get("RANK", 0)) == 0:  # the first of several processes
        check_output(path)
        write_text_aside(path / SETTINGS, json.dumps(settings, indent=2) + "\n")
    yield str(path), get_last_checkpoint(str(path)) if resume and path.exists() else None


def _check_settings(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    other = [name for name, value in wanted.items() if found.get(name) != json.loads(json.dumps(value))]
    if other:
        raise ConfigError(f"the training that is resumed had another {', '.join(other)}; use a new output_dir")


@contextmanager
def _as_it_was(teacher: nn.Module | Said | None) -> Iterator[None]:
    """A teacher that is a model trains, and is in training mode, afterwards if it did and was before."""
    if not isinstance(teacher, nn.Module):
        yield
        return
    mode, before = teacher.training, [p for p in teacher.parameters() if p.requires_grad]
    try:
        yield
    finally:
        teacher.train(mode)
        for parameter in before:
            parameter.requires_grad_(True)
