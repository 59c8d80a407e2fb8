"""A search from an analysed teacher to a result: costs, first guesses, study, ladder, and the finalists measured.

Everything lies in one folder that a person can read, and what lies there is not computed again:

    latency.json    the table of latencies
    library.json    damage of every single change
    study.log       the study (or elsewhere, where a storage is given)
    ladder.jsonl    values of the ladder
    result.json, candidates.jsonl, report.md, pareto.svg
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_qep.distill.samples import CAUSAL_LM
from hf_qep.distill.store import teacher_fingerprint
from hf_qep.errors import CheckpointError
from hf_qep.files import canonical_json, write_text_aside
from hf_qep.progress import SILENT, Progress
from hf_qep.search.costs import MEGABYTE, Choice, Cost, CostModel
from hf_qep.search.halving import Rung, halve
from hf_qep.search.journal import Journal
from hf_qep.search.latency import Bench, LatencyTable
from hf_qep.search.library import Library, measure_library
from hf_qep.search.limits import Limits, Workload
from hf_qep.search.proxies import ProxyContext, proxy
from hf_qep.search.recipes import recipes
from hf_qep.search.results import SearchResult
from hf_qep.search.seeds import seed_choices
from hf_qep.search.space import SearchSpace
from hf_qep.search.study import StudyOptions, search
from hf_qep.search.workload import Activations, bench_for, few_tokens, peak_bytes
from hf_qep.students.materialize import count_parameters
from hf_qep.students.spec import CandidateSpec

LATENCY, LIBRARY, STUDY, LADDER = "latency.json", "library.json", "study.log", "ladder.jsonl"
STEPS = 180
"""Of the longest distillation of the default ladder."""


def ladder_of(steps: int) -> tuple[tuple[str, float], ...]:
    """Distillations behind the study's proxy, each three times as long as the one before, up to `steps` of them.

    A third of the students goes on from each, so that all rungs cost the same (arXiv 1502.07943).
    """
    lengths = dict.fromkeys(max(1, steps // share) for share in (9, 3, 1))
    return tuple((f"short@{length}", 1 / 3) for length in lengths)


@dataclass(frozen=True)
class SearchPlan:
    """What is searched for.

    workload, limits: of the student. study: the proxy that every student is judged by. ladder: further proxies, and the
    share or number of students that goes on from each, as in `halving`. seeds: first guesses of the library, beside the
    usual recipes. climbers: most students of the study that enter the ladder. repeats: timed rounds. storage: of the
    study, see `store.open_study`; a file of the folder by default.
    """

    workload: Workload = field(default_factory=Workload)
    limits: Limits = field(default_factory=Limits)
    options: StudyOptions = field(default_factory=StudyOptions)
    study: str = "healed"
    ladder: tuple[tuple[str, float], ...] = ladder_of(STEPS)
    seeds: int = 8
    climbers: int = 27
    repeats: int = 7
    storage: str | None = None


def run_search(
    context: ProxyContext, space: SearchSpace, plan: SearchPlan, folder: Path, *, progress: Progress = SILENT
) -> SearchResult:
    """Search, or go on with a search in the same folder, and write the result there.

    Raises ConfigError where no student meets the limits (naming the nearest), or where the folder holds a search with
    other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, rungs = proxy(plan.study), [_rung(context, *rung) for rung in plan.ladder]
    bench = bench_for(context.teacher, context.fit, plan.workload, repeats=plan.repeats)
    marks = fingerprint(context, space, plan)
    mark = canonical_json(marks)
    table = _table(space, bench, folder / LATENCY, mark, progress)
    cost = cost_model(context, space, plan.workload, table, bench)
    library = Library.load(folder / LIBRARY, mark)
    measure_library(context, space, library, keep=lambda found: found.save(folder / LIBRARY, mark), progress=progress)
    seeds = seed_choices(space, library.score, cost, plan.limits, count=plan.seeds)
    usual = recipes(space, context.analysis.influence[0], cost, plan.limits)
    seeds = list(dict.fromkeys([*usual, *seeds]))[: plan.options.trials]
    study = search(
        space,
        lambda choice: first(context, choice.spec),
        cost,
        storage=plan.storage or folder / STUDY,
        limits=plan.limits,
        seeds=seeds,
        options=plan.options,
        fingerprint=marks,
        progress=progress,
    )
    climbing = [found.choice for found in study.judged()[: plan.climbers]]
    journal = Journal(folder / LADDER, marks)
    ladder = halve(climbing, rungs, journal=journal, seed=plan.options.seed, progress=progress) if rungs else None
    result = SearchResult.of(study, plan.limits, ladder, settings=marks)
    result = result.measured(measure(bench, [c.choice for c in result.finalists()], cost))
    result.write(folder)
    return result


def _rung(context: ProxyContext, name: str, keep: float) -> Rung:
    judge = proxy(name)
    return Rung(name, lambda choice: judge(context, choice.spec), keep)


def cost_model(
    context: ProxyContext,
    space: SearchSpace,
    workload: Workload,
    table: LatencyTable | None = None,
    bench: Bench | None = None,
) -> CostModel:
    """Cost of students of a teacher. table: None counts no latency. bench: measures activations; None guesses them."""
    teacher, generates = context.teacher, context.fit.task == CAUSAL_LM
    return CostModel(
        space.teacher,
        workload,
        lambda spec: count_parameters(teacher, spec),
        None if table is None else lambda choice: table.predict(choice.spec),
        decoder=generates,
        window=getattr(teacher.config, "sliding_window", None),
        positions=workload.sequence if generates else 0,
        activations=None if bench is None else Activations(bench, space.teacher, few_tokens(teacher)),
    )


def _peak(bench: Bench, spec: CandidateSpec) -> tuple[int, int]:
    """Bytes at the peak of a step of a real student, and its parameters."""
    model, inputs = bench.build(spec).eval(), bench.inputs(spec)
    with torch.inference_mode():
        return peak_bytes(model, lambda: bench.step(model, inputs)), sum(p.numel() for p in model.parameters())


def measure(bench: Bench, choices: Sequence[Choice], cost: CostModel) -> dict[str, Cost]:
    """Costs of real students, by key: latency as timed, memory as counted, parameters as built.

    Students whose blocks are to be quantised are measured as floats; their memory stays that of the model of costs.
    """
    times, found = bench.medians([choice.spec for choice in choices]), {}
    for choice, ms in zip(choices, times, strict=True):
        peak, parameters = _peak(bench, choice.spec)
        memory = peak / MEGABYTE if choice.bits is None else cost(choice).memory_mb
        found[choice.key()] = Cost(ms, memory, float(parameters))
    return found


def fingerprint(context: ProxyContext, space: SearchSpace, plan: SearchPlan) -> dict[str, Any]:
    """What the values of a search depend on, as JSON values by part."""
    return {
        "teacher": teacher_fingerprint(context.teacher),
        "fit": context.fit.fingerprint(),
        "judge": context.judge.fingerprint(),
        "space": canonical_json(space.to_dict()),
        "workload": plan.workload.to_dict(),
        "short": {name: getattr(context, name) for name in ("learning_rate", "batch_size", "seed")},
        "loss": context.loss.to_dict(),
        "ladder": [plan.study, *map(list, plan.ladder)],
    }


def _table(space: SearchSpace, bench: Bench, path: Path, marks: str, progress: Progress) -> LatencyTable:
    """The table of the folder, else a new one."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fingerprint"] != marks:
            raise CheckpointError(f"{str(path)!r} is of another search; remove it, or give another folder")
        return LatencyTable.from_dict(found["table"])
    table = LatencyTable.measure(space, bench, progress=progress)
    write_text_aside(path, canonical_json({"fingerprint": marks, "table": table.to_dict()}))
    return table
