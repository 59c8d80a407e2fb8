"""Few-shot open-vocabulary scoring: an episode names classes by one drawing each, and AP50 is taken over them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers.loss.loss_for_object_detection import box_iou, center_to_corners_format

from unseen.detect_ap import ap50
from unseen.detect_model import Detector, Found
from unseen.detect_scenes import Look, Scenes, paint


@dataclass(frozen=True)
class Episode:
    """Canvases with objects of a few classes.

    scenes: its `rows` are rows of the drawings it was made of. answers: (objects,) int64, the class of each, 0 to
    ways - 1. support: (ways,) int64, the drawing that names each class; it is on no canvas of the episode.
    """

    scenes: Scenes
    answers: Tensor
    support: Tensor


@dataclass(frozen=True)
class Deal:
    """How episodes are made. ways: classes. canvases: of an episode. count: episodes."""

    ways: int = 20
    canvases: int = 40
    count: int = 20


def deal(
    drawings: Tensor, labels: Tensor, naming: Tensor, shown: Tensor, how: Deal, look: Look, generator: Generator
) -> list[Episode]:
    """Episodes of random classes. drawings: (rows, 1, size, size). labels: (rows,). naming, shown: bool (rows,), which
    drawings may name a class and which may be on canvases; every class needs one that names and another that shows."""
    made, classes = [], labels.unique()
    for _ in range(how.count):
        picked = classes[torch.randperm(len(classes), generator=generator)[: how.ways]]
        support = torch.stack([_one_of(naming & (labels == c), generator) for c in picked])
        usable = shown & torch.isin(labels, picked)
        usable[support] = False
        pool = usable.nonzero()[:, 0]
        chosen = pool[torch.randint(len(pool), (how.canvases, look.objects), generator=generator)]
        scenes = paint(drawings, chosen, look, generator)
        answers = (labels[scenes.rows].unsqueeze(1) == picked).int().argmax(1)
        made.append(Episode(scenes, answers, support))
    return made


@torch.no_grad()
def look_at(detector: Detector, images: Tensor, batch: int = 64) -> Found:
    """What the detector says of canvases (n, 1, side, side)."""
    parts = [detector(part) for part in images.split(batch)]
    return Found(*(torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "boxes", "embeddings")))


def own_prototypes(detector: Detector, drawings: Tensor, look: Look, views: int, generator: Generator) -> Tensor:
    """The detector's own embeddings of drawings, (n, width) of length 1.

    Mean over `views` canvases that show the drawing alone, of the token whose box overlaps it most.
    """
    chosen = torch.arange(len(drawings)).repeat_interleave(views).unsqueeze(1)
    scenes = paint(drawings, chosen, replace(look, objects=1), generator)
    found = look_at(detector, scenes.images)
    where = center_to_corners_format(found.boxes[scenes.owner]), center_to_corners_format(scenes.boxes)
    tokens = [int(box_iou(boxes, wanted.unsqueeze(0))[0].argmax()) for boxes, wanted in zip(*where, strict=True)]
    seen = found.embeddings[scenes.owner, tokens]
    total = torch.zeros(len(drawings), seen.shape[1]).index_add_(0, scenes.rows, seen)
    return F.normalize(total, dim=1)


@dataclass(frozen=True)
class Judged:
    """An episode as a detector saw it.

    objectness: (detections,). embeddings: (detections, width). overlap: of boxes and objects (detections, objects).
    answers: (objects,). Every token of every canvas is a detection: none is left out and none suppressed.
    """

    objectness: Tensor
    embeddings: Tensor
    overlap: np.ndarray
    answers: np.ndarray

    def ap(self, prototypes: Tensor, temperature: float) -> float:
        """AP50, mean over the classes that are on the canvases, of classes named by prototypes (ways, width).

        Score of a detection for a class: the probability that it is an object, times the softmax over the classes of
        the cosine of embedding and prototype over the temperature.
        """
        chances = (self.embeddings @ prototypes.T / temperature).softmax(1)
        scores = (self.objectness.unsqueeze(1) * chances).numpy()
        classes = np.unique(self.answers)
        return float(np.mean([ap50(scores[:, c], self.overlap[:, self.answers == c]) for c in classes]))

    def ap_of_any(self) -> float:
        """AP50 of finding objects, whatever their class."""
        return ap50(self.objectness.numpy(), self.overlap)


def judge(detector: Detector, episode: Episode) -> Judged:
    """Look at all canvases of an episode."""
    scenes, found = episode.scenes, look_at(detector, episode.scenes.images)
    boxes, wanted = center_to_corners_format(found.boxes.flatten(0, 1)), center_to_corners_format(scenes.boxes)
    image = torch.arange(len(scenes.images)).repeat_interleave(found.boxes.shape[1])
    overlap = box_iou(boxes, wanted)[0].masked_fill(image.unsqueeze(1) != scenes.owner, 0)
    objectness = found.logits.softmax(-1)[..., 0].flatten()
    return Judged(objectness, found.embeddings.flatten(0, 1), overlap.numpy(), episode.answers.numpy())


def _one_of(allowed: Tensor, generator: Generator) -> Tensor:
    rows = allowed.nonzero()[:, 0]
    return rows[torch.randint(len(rows), (), generator=generator)]
