"""Compromises between several objectives, all to be minimised: which are worth keeping, and which to take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Points = Sequence[Sequence[float]] | np.ndarray
"""(points, objectives), finite."""
DIGITS = 9
"""Decimals, in a box of size 1, beyond which two compromises are equally good."""


def dominates(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bool (...): whether a is nowhere worse than b and somewhere better; a, b: (..., objectives), broadcast."""
    return (a <= b).all(-1) & (a < b).any(-1)


def non_dominated(points: Points) -> np.ndarray:
    """Bool (points,): those that no other point dominates. Equal points do not dominate each other."""
    values = _table(points)
    return ~dominates(values[:, None], values[None]).any(0)


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Volume of what the points dominate within the box below `reference`, in the product of the objectives' units.

    points: (points, objectives); those beyond the reference in some objective add nothing. By slices along the last
    objective (Zitzler and Thiele 1998), O(points^objectives): for two or three objectives.
    """
    values, corner = _table(points), np.asarray(reference, dtype=float)
    if values.shape[1] != len(corner):
        raise ValueError(f"{values.shape[1]} objectives, and a reference of {len(corner)}")
    return _volume(values[(values < corner).all(1)], corner)


def _volume(values: np.ndarray, corner: np.ndarray) -> float:
    if not len(values):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - values.min())
    values = values[np.argsort(values[:, -1], kind="stable")]
    tops = np.append(values[1:, -1], corner[-1])
    return sum(
        float(top - here) * _volume(values[: k + 1, :-1], corner[:-1])
        for k, (here, top) in enumerate(zip(values[:, -1], tops, strict=True))
        if top > here
    )


def knee(points: Points) -> int:
    """Index of the point that is the best compromise.

    Objectives are brought to [0, 1] over the points that are not dominated; taken is the one that alone dominates the
    largest volume of that box, among equals the one nearest to the best of every objective, then the first. So no unit
    counts, and neither do the extremes, which pay for one objective with all of another.
    Raises ValueError without points.
    """
    values = _table(points)
    kept = np.flatnonzero(non_dominated(values))
    front = values[kept]
    least, span = front.min(0), np.ptp(front, axis=0)
    unit = (front - least) / np.where(span > 0, span, 1)
    # Points that are equally good in exact arithmetic must not be told apart by rounding, which depends on the unit.
    volume, distance = (np.round(value, DIGITS) for value in ((1 - unit).prod(1), np.linalg.norm(unit, axis=1)))
    return int(kept[np.lexsort((kept, distance, -volume))[0]])


def _table(points: Points) -> np.ndarray:
    values = np.asarray(points, dtype=float)
    if values.ndim != 2 or not values.size:
        raise ValueError("points must be a table with at least one point and one objective")
    if not np.isfinite(values).all():
        raise ValueError("an objective is NaN or Inf")
    return values
