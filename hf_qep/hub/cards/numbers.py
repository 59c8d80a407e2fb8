"""Numbers of a card: how each that is not in the record or the manifest follows from them, and how it is written.

Rounding happens here and nowhere else, so that every number of a card can be looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hf_qep.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from hf_qep.evaluation.retention import Interval
    from hf_qep.evaluation.tasks import TaskMetric, TaskResult
    from hf_qep.hub.cards.facts import CardFacts

NOT_MEASURED = "not measured"
Value = float | int | None

FORMULAS: dict[str, tuple[str, Callable[[CardFacts], Value]]] = {
    "size_ratio": ("bytes of the original's weight files / of these", lambda f: _ratio(f.float_bytes, f.file_bytes)),
    "memory_ratio": ("bytes of the original's weights in memory / of these", lambda f: _ratio(*_memory(f))),
    "coverage": ("weights in quantised linears / all weights", lambda f: f.made.linear_weights / f.made.model_weights),
    "float_part": ("bytes of tensors that stay float", lambda f: f.made.weight_bytes - _packed_bytes(f)),
    "packed_part": ("bytes of the quantised linears' tensors", lambda f: _packed_bytes(f)),
    "perplexity_ratio": ("perplexity of this / of the original", lambda f: _ratio(*_perplexities(f))),
    "decode_ratio": ("new tokens per second of this / of the original", lambda f: _ratio(*_speeds(f, "decode"))),
    "prefill_ratio": ("prompt tokens per second of this / of the original", lambda f: _ratio(*_speeds(f, "prefill"))),
    "disagreement": (
        "1 - agreement of the first choice",
        lambda f: 1 - f.text.top1_agreement.value if f.text else None,
    ),
    "recovery": ("mean over tasks of score / original's score", lambda f: _mean(_kept(f, "raw"))),
    "recovery_above_chance": ("the same of scores minus chance", lambda f: _mean(_kept(f, "corrected"))),
    "solve_seconds": ("sum of the manifest's seconds by phase", lambda f: sum(f.made.seconds.values()) or None),
    "layers": ("quantised matrices", lambda f: len(f.made.layers)),
    "tasks": ("tasks that both scores can be compared on", lambda f: len(_kept(f, "raw"))),
}
"""Name -> (meaning, function of the facts); None where what it needs was not measured."""


def derived(facts: CardFacts) -> dict[str, Value]:
    """All formulas."""
    return {name: function(facts) for name, (_, function) in FORMULAS.items()}


def main_metric(task: TaskResult) -> TaskMetric:
    """The score that stands for a task: normalised accuracy where there is one, else the first."""
    return next((m for m in task.metrics if m.name == "acc_norm"), task.metrics[0])


def near_chance(task: TaskResult, metric: TaskMetric) -> bool:
    """Whether the quantised model may be guessing: less than two standard errors above chance."""
    score = metric.subject
    return task.chance is not None and (score.stderr is None or score.value - task.chance <= 2 * score.stderr)


def shown(value: Value, digits: int = 3) -> str:
    """A number with so many significant digits, thousands separated, or "not measured"."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 12)}f}"


def estimate(value: Estimate | None, *, factor: float = 1.0) -> str:
    """A measurement with its standard error, rounded to two digits of that error."""
    if value is None:
        return NOT_MEASURED
    found = value.scaled(factor)
    if not found.stderr:
        return shown(found.value)
    decimals = min(12, max(0, 1 - math.floor(math.log10(found.stderr))))
    return f"{found.value:,.{decimals}f} ± {found.stderr:,.{decimals}f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as per cent."""
    return NOT_MEASURED if value is None else f"{100 * value:.{decimals}f} %"


def interval(part: Interval | None) -> str:
    """A retention in per cent with its 95 % interval."""
    if part is None:
        return "not computable"
    ends = "" if part.low is None or part.high is None else f" [{100 * part.low:.1f}, {100 * part.high:.1f}]"
    return f"{percent(part.value)}{ends}"


def size(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return NOT_MEASURED
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{shown(count / scale)} {unit}"
    return f"{count} bytes"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _packed_bytes(facts: CardFacts) -> int:
    return sum(layer.stored_bits for layer in facts.made.layers) // 8


def _memory(facts: CardFacts) -> tuple[int | None, int | None]:
    cost = facts.record.cost
    return (cost.baseline.weight_bytes, cost.subject.weight_bytes) if cost else (None, None)


def _perplexities(facts: CardFacts) -> tuple[float | None, float | None]:
    pair = (facts.text.subject.perplexity, facts.text.baseline.perplexity) if facts.text else (None, None)
    return pair[0].value if pair[0] else None, pair[1].value if pair[1] else None


def _speeds(facts: CardFacts, what: str) -> tuple[float | None, float | None]:
    cost = facts.record.cost
    speeds = (cost.subject.speed, cost.baseline.speed) if cost else (None, None)
    found = [getattr(speed, what) if speed else None for speed in speeds]
    return found[0].value if found[0] else None, found[1].value if found[1] else None


def _kept(facts: CardFacts, kind: str) -> list[float]:
    """Retention of the main score of each task for which there is one."""
    parts = [getattr(main_metric(task).retention, kind) for task in facts.record.tasks if task.metrics]
    return [part.value for part in parts if part is not None]
