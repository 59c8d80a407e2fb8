"""The methods that are compared: which student, and what it is taught by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.said import Said
from hf_qep.distill.samples import EMBEDDING, TaskData
from hf_qep.distill.student_trainer import train_student
from unseen import vit
from unseen.baselines import LOSSES, teach
from unseen.lessons import Lesson
from unseen.presets import StudentPlan
from unseen.shrink import Shrunk, start_of

BANK = "bank"
"""Our loss: KL over the prototypes of the bank, cosine, and relations between rows."""
USUAL, SEARCHED, BLANK = "usual", "searched", "blank"
"""The teacher shrunk alike, from scratch; what the search found, with healed weights; the same shape from scratch."""
OURS = "ours"
BEST = "best baseline, our student"


@dataclass(frozen=True)
class Method:
    """student: one of USUAL, SEARCHED, BLANK. loss: one of LOSSES, or BANK. shown: name in the table."""

    student: str
    loss: str
    shown: str


BASELINES = {
    "ce": Method(USUAL, "ce", "cross-entropy only"),
    "kd": Method(USUAL, "kd", "logits-KD"),
    "feature": Method(USUAL, "feature", "feature-L2 (FitNet, ViLD)"),
    "relation": Method(USUAL, "relation", "relation-KD (RKD)"),
}
PARTS_OF_OURS = {
    "our loss": Method(USUAL, BANK, "our loss on the usual student"),
    "our shape": Method(BLANK, BANK, "our loss on the searched shape, from scratch"),
}
FIRST = BASELINES | PARTS_OF_OURS | {OURS: Method(SEARCHED, BANK, "**ours**")}
"""All that need no result of another one."""


def with_best(best: str) -> dict[str, Method]:
    """All methods, with the loss of the best baseline on our student between the others and ours."""
    loss = BASELINES[best]
    more = Method(SEARCHED, loss.loss, f"best of these losses ({loss.shown}) on our student")
    return BASELINES | {BEST: more} | PARTS_OF_OURS | {OURS: FIRST[OURS]}


def student_for(method: Method, teacher: Any, shrunk: Shrunk, folder: Path, seed: int) -> Any:
    """The student as it begins to learn. folder: of `shrink`."""
    config = teacher.config
    if method.student == USUAL:
        sizes = {"side": config.image_size, "channels": config.num_channels, "width": config.pooler_output_size}
        return vit.build(shrunk.usual, **sizes, seed=seed)
    student = start_of(folder)
    if method.student == BLANK:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            student.apply(student._init_weights)
            vit.place_heads(student)
    return student


def taught(method: Method, student: Any, lesson: Lesson, plan: StudentPlan, seed: int) -> Any:
    """Teach a student in place, and return it in eval mode. All methods get the same rows, steps, batches and rate."""
    if method.loss in LOSSES:
        return teach(student, lesson, method.loss, **schedule(plan, seed), bank_temperature=plan.temperature)
    train_student(
        student,
        TaskData(EMBEDDING, {"pixel_values": lesson.pixels}),
        teacher=Said(embedding=lesson.teacher),
        loss=bank_loss(plan),
        prototypes=lesson.bank,
        **schedule(plan, seed),
    )
    return student.eval()


def bank_loss(plan: StudentPlan) -> DistillLoss:
    """Our loss."""
    return DistillLoss(alpha=0.0, relation=plan.relation, bank_temperature=plan.temperature)


def schedule(plan: StudentPlan, seed: int) -> dict[str, Any]:
    """How long and how fast any student learns."""
    return {"steps": plan.steps, "batch_size": plan.batch, "learning_rate": plan.rate, "seed": seed}
