"""What distillation usually does, as losses of one loop that all baselines share.

ce        cross-entropy over the seen classes; the embedding is what goes into the classifier
kd        the same and the teacher's distribution over them at a temperature (arXiv 1503.02531)
feature   the teacher's embedding by its squared distance, both of length 1 (FitNet, arXiv 1412.6550; ViLD, 2104.13921)
relation  distances and angles between the rows of a batch (RKD-DA, arXiv 1904.05068, as for metric learning)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_qep.progress import SILENT, Progress
from unseen.lessons import Lesson

TEMPERATURE, SHARE = 4.0, 0.9
"""Of both sides of `kd`, and the share of the teacher in it."""
DISTANCE, ANGLE = 25.0, 50.0
"""Weights of RKD-DA, those of its paper."""


@dataclass(frozen=True)
class Batch:
    """embedding: of the student (rows, width). logits: over the seen classes (rows, classes). labels: (rows,) int64.
    teacher, teacher_logits: the same of the teacher, whose logits are its cosines to class means over a temperature."""

    embedding: Tensor
    logits: Tensor
    labels: Tensor
    teacher: Tensor
    teacher_logits: Tensor


def ce(batch: Batch) -> Tensor:
    """Cross-entropy, nats."""
    return F.cross_entropy(batch.logits, batch.labels)


def kd(batch: Batch) -> Tensor:
    """(1 - SHARE) CE + SHARE · T² · KL(teacher ‖ student) at temperature T."""
    theirs = (batch.teacher_logits / TEMPERATURE).log_softmax(-1)
    ours = (batch.logits / TEMPERATURE).log_softmax(-1)
    gap = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return (1 - SHARE) * ce(batch) + SHARE * TEMPERATURE**2 * gap


def feature(batch: Batch) -> Tensor:
    """‖s/‖s‖ - t/‖t‖‖²."""
    gap = F.normalize(batch.embedding, dim=-1) - F.normalize(batch.teacher, dim=-1)
    return gap.square().sum(-1).mean()


def relation(batch: Batch) -> Tensor:
    """Huber loss of distances in units of their mean, and of the angles of all triplets."""
    return DISTANCE * _huber(_distances, batch) + ANGLE * _huber(_angles, batch)


LOSSES: dict[str, Callable[[Batch], Tensor]] = {"ce": ce, "kd": kd, "feature": feature, "relation": relation}


def teach(
    student: Any,
    lesson: Lesson,
    loss: str,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    bank_temperature: float = 0.1,
    progress: Progress = SILENT,
) -> Any:
    """Train a student in place by one of LOSSES, and return it in eval mode.

    AdamW without decay, warm-up over a tenth of the steps, then down a cosine, gradients clipped to length 1: as
    `train_student` does it for ours. bank_temperature: of the teacher's logits over the seen classes.
    """
    means, judge = lesson.means(), LOSSES[loss]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(lesson.teacher.shape[1], lesson.classes)
    parameters = [*student.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    with progress.bar(loss, steps) as bar:
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.randperm(len(lesson.labels), generator=generator)
            rows, order = order[:batch_size], order[batch_size:]
            found = student(pixel_values=lesson.pixels[rows]).pooler_output
            theirs = lesson.teacher[rows]
            said = theirs @ means.T / bank_temperature
            judge(Batch(found, head(found), lesson.labels[rows], theirs, said)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            bar.advance()
    return student.eval()


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _huber(what: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    with torch.no_grad():
        wanted = what(batch.teacher)
    return F.smooth_l1_loss(what(batch.embedding), wanted)


def _distances(rows: Tensor) -> Tensor:
    """Distances between different rows, (rows, rows - 1), over their mean."""
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    gaps = (rows.unsqueeze(1) - rows.unsqueeze(0))[apart].square().sum(-1).add(1e-12).sqrt()
    return gaps / gaps.mean()


def _angles(rows: Tensor) -> Tensor:
    """Cosines of the angles at every row between every two others, (rows, rows, rows)."""
    unit = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=-1)
    return unit @ unit.transpose(1, 2)
