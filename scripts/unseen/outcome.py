"""From what every student answered to what can be said: means, spreads, and how sure a difference is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unseen.episodes import interval
from unseen.methods import BASELINES, OURS

BAR = 10.0
"""Points that ours is to be ahead of the best baseline."""


def trials(results: Mapping[str, Any], method: str, measure: str) -> Tensor:
    """Right answers in percent, (seeds, groups, trials)."""
    return 100 * torch.tensor([unit[measure] for unit in results["units"][method].values()])


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the table and the plot show, as a JSON value.

    `methods`: name -> measure -> `mean`, `deviation` (of the means of seeds), and `seconds` of a student; `teacher`:
    measure -> mean; `ahead`: name -> `difference` of ours from it; `best`: the best baseline; `met`: whether ours is
    ahead of that by the BAR at least and the interval is above 0.
    """
    measure = results["measure"]
    measures = list(results["teacher"])
    methods: dict[str, Any] = {}
    for name, units in results["units"].items():
        methods[name] = {each: _spread(trials(results, name, each)) for each in measures}
        methods[name]["seconds"] = sum(unit["seconds"] for unit in units.values()) / len(units)
    teacher = {each: 100 * float(torch.tensor(results["teacher"][each]).mean()) for each in measures}
    ahead = {name: difference(results, OURS, name, measure) for name in methods if name != OURS}
    best = max(BASELINES, key=lambda name: methods[name][measure]["mean"])
    met = ahead[best]["points"] >= BAR and ahead[best]["interval"][0] > 0
    return {"methods": methods, "teacher": teacher, "ahead": ahead, "best": best, "bar": BAR, "met": met}


def difference(results: Mapping[str, Any], ours: str, theirs: str, measure: str) -> dict[str, Any]:
    """`points` that one method is ahead of another, `relative` in percent of the other's, with two intervals."""
    left, right = (trials(results, name, measure) for name in (ours, theirs))
    points = float(left.mean() - right.mean())
    return {
        "points": points,
        "relative": 100 * points / max(float(right.mean()), 1e-9),
        "interval": interval(left.flatten(1), right.flatten(1)),
        "interval_of_groups": interval(left.mean(2), right.mean(2)),
    }


def _spread(values: Tensor) -> dict[str, float]:
    means = values.flatten(1).mean(1)
    return {"mean": float(means.mean()), "deviation": float(means.std()) if len(means) > 1 else 0.0}
