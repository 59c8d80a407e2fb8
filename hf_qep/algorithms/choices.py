"""One option for each of several items under limits on several resources: multiple-choice selection with k best.

min Σ score[i, o] x[i, o] over x in {0, 1} with Σ_o x[i, o] = 1 for every item i, and for every resource r
lower[r] <= Σ use[r][i, o] x[i, o] <= upper[r]. A mixed-integer linear programme for HiGHS (`scipy.optimize.milp`).
Further solutions come from no-good cuts: each found one, y, adds Σ_i x[i, y_i] <= items - distance (Balas and Jeroslow
1972). `allocation.spend` is the case of one resource in whole units, and needs no solver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_qep.extras import require

Table = Sequence[Sequence[float]]
"""A number for each option of each item; items may have different numbers of options."""
_SPAN = 1e3
"""Largest score after scaling: HiGHS stops within an absolute 1e-6 of the optimum."""
_SLACK = 1e-12
"""Relative excess over a limit that is rounding of the sum, not a violation."""


def choose(
    scores: Table,
    resources: Mapping[str, Table] | None = None,
    limits: Mapping[str, float] | None = None,
    *,
    lower_limits: Mapping[str, float] | None = None,
    uniform: Sequence[Sequence[int]] = (),
    count: int = 1,
    distance: int = 1,
) -> list[list[int]]:
    """The `count` selections with the least sum of scores, best first, each one option index per item.

    scores: least is best; infinite means that the option must not be taken. resources: what each option uses, by name.
    limits, lower_limits: largest and smallest sum of a resource. uniform: groups of items that take the same option
    index. distance: items in which any two of the selections differ, at least; with more than 1 they are found one
    after the other, each the best that is far enough from those before it. Fewer come back where no more exist, none
    where no selection meets the limits. Raises ValueError for tables that do not match or limits without a resource.
    """
    resources, limits, lower = resources or {}, limits or {}, lower_limits or {}
    _check(scores, resources, {**limits, **lower}, uniform, count, distance)
    if not scores:
        return [[]]
    starts = np.cumsum([0, *map(len, scores)])
    rows = _structure(starts, uniform)
    for name in {**limits, **lower}:
        use = np.concatenate([np.asarray(item, dtype=float) for item in resources[name]])
        rows.append(_scaled(use, lower.get(name), limits.get(name)))
    found: list[list[int]] = []
    while len(found) < count and (selection := _solve(scores, starts, rows)) is not None:
        kept = _meets(selection, resources, limits, lower)
        if kept:
            found.append(selection)
        cut = np.zeros(starts[-1])
        cut[starts[:-1] + np.array(selection)] = 1
        rows.append((cut, -np.inf, len(scores) - (distance if kept else 1)))
    return found


Row = tuple[np.ndarray, float, float]
"""Coefficients (variables,), least and largest value of their sum."""


def _structure(starts: np.ndarray, uniform: Sequence[Sequence[int]]) -> list[Row]:
    """One option per item, the same one within each uniform group."""
    rows: list[Row] = []
    for begin, end in zip(starts, starts[1:], strict=False):
        row = np.zeros(starts[-1])
        row[begin:end] = 1
        rows.append((row, 1, 1))
    for first, *others in uniform:
        for other in others:
            for option in range(starts[first + 1] - starts[first]):
                row = np.zeros(starts[-1])
                row[starts[first] + option], row[starts[other] + option] = 1, -1
                rows.append((row, 0, 0))
    return rows


def _scaled(use: np.ndarray, least: float | None, most: float | None) -> Row:
    """A row with a largest coefficient of 1: bytes and milliseconds meet the same tolerance of the solver."""
    scale = np.abs(use).max() or 1.0
    return use / scale, -np.inf if least is None else least / scale, np.inf if most is None else most / scale


def _solve(scores: Table, starts: np.ndarray, rows: list[Row]) -> list[int] | None:
    """The best selection, or None if there is none."""
    optimize: Any = require("distill", "scipy.optimize")
    flat = np.concatenate([np.asarray(item, float) for item in scores])
    allowed = np.isfinite(flat)
    cost = np.where(allowed, flat, 0.0)
    cost *= _SPAN / (np.abs(cost).max() or 1.0)
    matrix = np.stack([row for row, _, _ in rows])
    constraints = optimize.LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
    solved = optimize.milp(
        cost,
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, allowed.astype(float)),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return [int(np.argmax(solved.x[a:b])) for a, b in zip(starts, starts[1:], strict=False)]


def _meets(selection: list[int], resources: Mapping[str, Table], limits: Mapping, lower: Mapping) -> bool:
    """Whether the limits hold to the last digit: the solver allows itself a millionth."""
    for name in {**limits, **lower}:
        used = math.fsum(item[option] for item, option in zip(resources[name], selection, strict=True))
        most, least = limits.get(name, math.inf), lower.get(name, -math.inf)
        if used > most + _SLACK * abs(most) or used < least - _SLACK * abs(least):
            return False
    return True


def _check(
    scores: Table, resources: Mapping[str, Table], limited: Mapping, uniform: Sequence, count: int, distance: int
) -> None:
    shape = [len(item) for item in scores]
    if not all(shape):
        raise ValueError("every item needs at least one option")
    if any(math.isnan(score) or score == -math.inf for item in scores for score in item):
        raise ValueError("a score is NaN or minus infinity")
    for name in limited:
        if name not in resources:
            raise ValueError(f"there is a limit on {name!r} and no table of what the options use of it")
        if [len(item) for item in resources[name]] != shape:
            raise ValueError(f"the table of {name!r} does not have the items and options of the scores")
        if not all(math.isfinite(use) for item in resources[name] for use in item):
            raise ValueError(f"the table of {name!r} holds NaN or Inf")
    if any(len({shape[i] for i in group}) > 1 for group in uniform):
        raise ValueError("items that take the same option need equal numbers of options")
    if count < 1 or distance < 1:
        raise ValueError(f"count and distance must be at least 1, not {count} and {distance}")
