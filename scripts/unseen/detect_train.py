"""Training of one detector by one method: the same canvases, steps and box losses, another loss of the embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_qep.algorithms.divergences import forward_kl
from hf_qep.distill.hidden import row_relation
from unseen.detect_model import Detector, SetLoss, Shape
from unseen.detect_scenes import Look, paint

UNLABELLED = -1
"""Label of a drawing of no class that is seen."""


@dataclass(frozen=True)
class Method:
    """Weights of what an embedding learns from.

    labels: cross-entropy over the seen classes. seen: KL to the teacher over its prototypes of the seen classes. For
    both, the student's class vectors are learned, or where `fixed` they are the teacher's prototypes. squared: squared
    distance to the teacher's embedding. bank: KL to the teacher over the whole bank. relation: distances between the
    objects of a batch (RKD). cosine: 1 - cos to the teacher's embedding.
    """

    labels: float = 0.0
    seen: float = 0.0
    fixed: bool = False
    squared: float = 0.0
    bank: float = 0.0
    relation: float = 0.0
    cosine: float = 0.0

    @property
    def taught(self) -> bool:
        """Whether the embeddings lie in the teacher's space."""
        return bool(self.fixed or self.squared or self.bank or self.cosine)


METHODS = {
    "ce": Method(labels=1.0),
    "logits-kd": Method(labels=0.5, seen=0.5),
    "logits-kd, teacher's classes": Method(labels=0.5, seen=0.5, fixed=True),
    "feature-l2": Method(squared=5.0),
    "ours": Method(bank=1.0, relation=1.0, cosine=1.0),
}
"""Baselines first. The third one is a stronger logits-kd: its class vectors are the teacher's, so that its embeddings
lie in the teacher's space as ours do. Weights are not tuned; rate and steps were chosen on other canvases."""


@dataclass(frozen=True)
class Lessons:
    """What is painted and what the teacher says of it.

    drawings: (rows, 1, size, size) float32. labels: (rows,) int64, UNLABELLED for drawings of no class. wanted: (rows,
    width) float32 of length 1, the teacher's embeddings of the clean drawings. prototypes: (classes, width), of the
    seen classes. bank: (m, width).
    """

    drawings: Tensor
    labels: Tensor
    wanted: Tensor
    prototypes: Tensor
    bank: Tensor


@dataclass(frozen=True)
class Schedule:
    """steps of `batch` canvases. rate: the largest of one cycle. temperature: of every softmax of cosines."""

    steps: int = 400
    batch: int = 32
    rate: float = 5e-3
    temperature: float = 0.07


class EmbeddingLoss(torch.nn.Module):
    """Loss of the embeddings of matched tokens by a method."""

    def __init__(self, method: Method, lessons: Lessons, temperature: float) -> None:
        super().__init__()
        self.method, self.lessons, self.temperature = method, lessons, temperature
        free = (method.labels or method.seen) and not method.fixed
        self.classes = torch.nn.Parameter(torch.randn_like(lessons.prototypes)) if free else None

    def forward(self, found: Tensor, rows: Tensor) -> Tensor:
        """found: (objects, width) of length 1. rows: (objects,) the drawing of each. Returns a scalar."""
        method, wanted, labels = self.method, self.lessons.wanted[rows], self.lessons.labels[rows]
        prototypes, bank = self.lessons.prototypes, self.lessons.bank
        classes = prototypes if self.classes is None else F.normalize(self.classes, dim=1)
        total = found.new_zeros(())
        if method.labels and (labels != UNLABELLED).any():
            said = self._log_p(found, classes)
            total = total + method.labels * F.cross_entropy(said, labels, ignore_index=UNLABELLED)
        if method.seen:
            total = total + method.seen * self._kl(wanted, prototypes, found, classes)
        if method.bank:
            total = total + method.bank * self._kl(wanted, bank, found, bank)
        if method.squared:
            total = total + method.squared * (found - wanted).square().sum(1).mean()
        if method.relation:
            total = total + method.relation * row_relation(found, wanted).mean()
        if method.cosine:
            total = total + method.cosine * (1 - (found * wanted).sum(1)).mean()
        return total

    def _log_p(self, embeddings: Tensor, prototypes: Tensor) -> Tensor:
        return (embeddings @ prototypes.T / self.temperature).log_softmax(-1)

    def _kl(self, wanted: Tensor, theirs: Tensor, found: Tensor, ours: Tensor) -> Tensor:
        return forward_kl(self._log_p(wanted, theirs), self._log_p(found, ours)).mean()


def train(method: Method, lessons: Lessons, shape: Shape, look: Look, schedule: Schedule, seed: int) -> Detector:
    """A detector in evaluation mode. seed: of its first weights and of the canvases, the same ones for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(shape, look.side, lessons.wanted.shape[1])
        embedding = EmbeddingLoss(method, lessons, schedule.temperature)
    boxes, make = SetLoss(), Generator().manual_seed(seed)
    learned = [*detector.parameters(), *embedding.parameters()]
    optimiser = torch.optim.AdamW(learned, schedule.rate, weight_decay=1e-2)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.rate, schedule.steps)
    detector.train()
    for _ in range(schedule.steps):
        chosen = torch.randint(len(lessons.drawings), (schedule.batch, look.objects), generator=make)
        scenes = paint(lessons.drawings, chosen, look, make)
        found = detector(scenes.images)
        loss, (canvas, token), objects = boxes(found, scenes)
        loss = loss + embedding(found.embeddings[canvas, token], scenes.rows[objects])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        pace.step()
    return detector.eval()
