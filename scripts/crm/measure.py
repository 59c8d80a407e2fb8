"""Time and memory of an answer: one thread, one deal at a time, and what each really has to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from crm.names import ALONE, FEW_SHOT, ONE_BIT, STUDENT, TUNED
from crm.specialist import Specialist
from torch import Tensor

from hf_qep.accounting import bits_report
from hf_qep.cli.distill_student import Start, load
from hf_qep.distill.samples import IGNORED, TaskData
from hf_qep.modules import packed_modules
from hf_qep.search.costs import MEGABYTE
from hf_qep.search.latency import Bench, forward
from hf_qep.search.workload import peak_bytes

MANY = 32
"""Deals at once where many are to be judged."""
PASSES = 5
"""Of a model in a row: after one of another size the first pass finds the processor's caches cold."""
SECONDS_OF_A_MILLION = 1e6 / 1e3 / 3600
"""Milliseconds per deal -> hours per million deals."""


@dataclass(frozen=True)
class Timed:
    """A model and what it reads: one deal alone, what it needs for one deal, and many deals of that kind."""

    model: Any
    alone: Tensor
    needed: Tensor


def measure(task: Specialist, repeats: int) -> dict[str, dict[str, float]]:
    """Costs of each method by the names of the page, beside `many_ms`, per deal where many are judged at once.

    All models are timed in turn, so that a busy machine hits all alike.
    """
    timed = {name: one for name, one in _models(task).items() if one is not None}
    works = {
        "latency_equal_ms": {name: one.alone for name, one in timed.items()},
        "latency_real_ms": {name: one.needed for name, one in timed.items()},
        "many_ms": {name: one.alone.expand(MANY, -1) for name, one in timed.items()},
    }
    found: dict[str, dict[str, float]] = {name: {} for name in timed}
    for work, inputs in works.items():
        for name, ms in _medians(task, timed, inputs, repeats).items():
            found[name][work] = ms / (MANY if work == "many_ms" else 1)
    for name, one in timed.items():
        needed = {"input_ids": one.needed, "use_cache": False}
        with torch.inference_mode():
            peak = peak_bytes(one.model, lambda m=one.model, x=needed: forward(m, x))
        packed = bool(packed_modules(one.model))
        report = bits_report(one.model) if packed else None
        found[name] |= {
            "memory_mb": peak / MEGABYTE,
            "prompt_tokens": one.needed.shape[1],
            "cost_per_million": found[name]["latency_real_ms"] * SECONDS_OF_A_MILLION,
            "parameters": report["model_weights"] if report else one.model.num_parameters(),
        }
    return found


def _models(task: Specialist) -> Mapping[str, Timed | None]:
    opened = task.opened
    deal = _typical(opened.test)
    prompt = getattr(opened.asked, "prompt_ids", deal[:, :0].flatten())
    found: dict[str, Timed | None] = {
        FEW_SHOT: Timed(opened.teacher, deal, torch.cat([prompt.unsqueeze(0), deal], 1)),
        TUNED: Timed(opened.teacher, deal, deal) if task.plan.seeds.get(TUNED) else None,
    }
    for name, folder in ((STUDENT, "student-0"), (ALONE, "student-0"), (ONE_BIT, "one-bit-0")):
        if task.plan.seeds.get(name):
            found[name] = _student(load(opened, str(task.folder / folder)), opened.test)
    return found


def _student(start: Start, test: TaskData) -> Timed:
    deal = _typical(start.rows(test))
    return Timed(start.student.eval(), deal, deal)


def _typical(data: TaskData) -> Tensor:
    """The tokens (1, tokens) int64 of a deal of median length, without its answer."""
    lengths = data.inputs["attention_mask"].sum(1)
    row = int(lengths.argsort()[len(lengths) // 2])
    length = int((data.labels[row] != IGNORED).nonzero()[0])
    return data.inputs["input_ids"][row : row + 1, :length]


def _medians(task: Specialist, timed: dict[str, Timed], inputs: dict[str, Tensor], repeats: int) -> dict[str, float]:
    models, reads = iter([one.model for one in timed.values()]), iter(inputs[name] for name in timed)
    bench = Bench(
        lambda _: next(models),
        lambda _: {"input_ids": next(reads), "use_cache": False},
        _passes,
        repeats=repeats,
        threads=1,
    )
    found = bench.medians([task.opened.shape.identity()] * len(timed))
    return {name: ms / PASSES for name, ms in zip(timed, found, strict=True)}


def _passes(model: Any, inputs: Mapping[str, Any]) -> None:
    for _ in range(PASSES):
        forward(model, inputs)
