"""What the detectors found, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unseen.episodes import interval

OURS = "ours"
KINDS = {"teacher": "the teacher's", "own": "its own", "both": "mean of both"}
"""Prototypes of a class: the teacher's embedding of the clean drawing, the detector's own of canvases that show it."""


def table(results: Mapping[str, Any]) -> str:
    """Markdown: AP50 in percent, mean over seeds and episodes, and how far ours is ahead with its 95 % interval."""
    rows = [
        "| method | AP50 unseen | prototypes | AP50 seen | AP50 any class, unseen | ours ahead, unseen |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary(results).items():
        ahead = f"{row['ahead']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})" if "ahead" in row else ""
        rows.append(
            f"| {name} | {row['unseen']:.1f} ± {row['deviation']:.1f} | {KINDS[row['kind']]} | {row['seen']:.1f} "
            f"| {row['any']:.1f} | {ahead} |"
        )
    return "\n".join(rows)


def summary(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method -> `kind`; `unseen`, `deviation` (over seeds), `seen`, `any` in percent. For the others also `ahead`, by
    how many points ours is ahead, with `low` and `high` of its 95 % bootstrap interval over episodes and seeds.

    Others show the kind of prototype that serves them best on the unseen classes; ours the kind of best AP50 on seen
    ones, so that the choice can only favour the others.
    """
    units = results["units"]
    scores = {name: {kind: _matrix(units[name], "unseen", kind) for kind in _kinds(units[name])} for name in units}
    found: dict[str, dict[str, Any]] = {}
    for name, by_kind in scores.items():
        judged_by = {k: _matrix(units[name], "seen", k) for k in by_kind} if name == OURS else by_kind
        kind = max(by_kind, key=lambda k, by=judged_by: float(by[k].mean()))
        values = by_kind[kind]
        found[name] = {
            "kind": kind,
            "unseen": float(values.mean()),
            "deviation": float(values.mean(1).std()) if len(values) > 1 else 0.0,
            "seen": float(_matrix(units[name], "seen", kind).mean()),
            "any": 100 * float(torch.tensor([u["any"]["unseen"] for u in units[name].values()]).mean()),
        }
    ours = scores[OURS][found[OURS]["kind"]]
    for name, row in found.items():
        if name != OURS:
            theirs = scores[name][row["kind"]]
            row["low"], row["high"] = interval(ours, theirs)
            row["ahead"] = float(ours.mean() - theirs.mean())
    return found


def _matrix(units: Mapping[str, Any], part: str, kind: str) -> Tensor:
    """AP50 in percent, (seeds, episodes)."""
    return 100 * torch.tensor([one["ap"][part][kind] for one in units.values()])


def _kinds(units: Mapping[str, Any]) -> list[str]:
    return list(next(iter(units.values()))["ap"]["unseen"])
