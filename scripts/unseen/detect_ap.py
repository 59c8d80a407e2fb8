"""Average precision at one overlap, for boxes of one class over a set of images."""

from __future__ import annotations

import numpy as np

OVERLAP = 0.5
"""Least intersection over union of a hit: AP50."""


def average_precision(scores: np.ndarray, hits: np.ndarray, objects: int) -> float:
    """Area under the precision envelope over recall, 0 to 1; NaN without objects.

    scores: (detections,) in any order. hits: (detections,) bool, which of them found an object of their own. objects:
    how many there are to find. Every rank counts, as in PASCAL VOC since 2010; COCO reads the same curve at 101 points.
    Detections of equal score keep their order.
    """
    if not objects:
        return float("nan")
    right = hits[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / objects)


def hits_of(scores: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Which detections are hits, (detections,) bool.

    The best first, each takes the object that it overlaps most among those that none has taken, if by `OVERLAP` or more
    (COCO's rule); a second detection of an object is a miss.
    scores: (detections,). overlap: intersection over union (detections, objects), 0 where the images differ.
    """
    hits, taken = np.zeros(len(scores), dtype=bool), np.zeros(overlap.shape[1], dtype=bool)
    near = np.flatnonzero((overlap >= OVERLAP).any(1))
    for row in near[np.argsort(-scores[near], kind="stable")]:
        free = np.where(taken, 0.0, overlap[row])
        best = int(free.argmax())
        if free[best] >= OVERLAP:
            taken[best] = hits[row] = True
    return hits


def ap50(scores: np.ndarray, overlap: np.ndarray) -> float:
    """Average precision of detections (detections,) by their overlap (detections, objects) with the objects."""
    return average_precision(scores, hits_of(scores, overlap), overlap.shape[1])
