"""How well proxies foretell a long distillation, and whether the search beats the usual ways of pruning.

    python scripts/bench_search.py --work runs/search --tasks deals pictures --threads 1
    python scripts/bench_search.py --work runs/search --table

Candidates are drawn inside five per cent of one latency, that of the teacher with half of its layers: otherwise the
larger one wins and any count of parameters foretells it. The truth is the held-out loss after a long distillation, ten
times as long as the second rung of the ladder, with two seeds; how far the seeds agree is as far as any proxy could
get. The comparison gives uniform width pruning, depth pruning by block influence and the winner of the search the same
latency and the same distillation. `--parts costs` times students, so it wants a machine that does nothing else. Every
number is a line of a journal in the folder, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import search_table
import torch
from search_tasks import TASKS, Task, teacher_of

from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.student_trainer import train_student
from hf_qep.progress import Progress
from hf_qep.search.additions import Aim
from hf_qep.search.analysis import analyse
from hf_qep.search.costs import Choice
from hf_qep.search.journal import Journal
from hf_qep.search.latency import LatencyTable
from hf_qep.search.limits import Limits, Workload
from hf_qep.search.proxies import PROXIES, TAUGHT, ProxyContext, default_rate, proxy
from hf_qep.search.recipes import by_influence
from hf_qep.search.run import SearchPlan, cost_model, ladder_of, measure, run_search
from hf_qep.search.space import SearchSpace
from hf_qep.search.study import StudyOptions
from hf_qep.search.workload import bench_for
from hf_qep.students.family import teacher_shape
from hf_qep.students.spec import CandidateSpec

SPREAD = 0.05
PARTS = ["costs", "proxies", "comparison"]
BATCH = 32


@dataclass
class Setting:
    """One task with everything that its rows of the table share."""

    task: Task
    context: ProxyContext
    space: SearchSpace
    table: LatencyTable
    workload: Workload
    arguments: argparse.Namespace

    def truth(self, spec: CandidateSpec, seed: int, healed: bool = True) -> dict[str, float]:
        """Held-out loss after the long distillation, its standard error over rows, and the seconds it took."""
        began = time.monotonic()
        student = self.context.student(spec, healed=healed)
        train_student(
            student,
            self.task.train,
            teacher=self.context.said("fit"),
            loss=self.context.loss,
            steps=self.arguments.long,
            learning_rate=default_rate(spec.hidden_size),
            batch_size=BATCH,
            seed=seed,
        )
        rows = torch.tensor([Aim(self.task.test.rows(slice(k, k + 64))).mean(student, 64)
                             for k in range(0, len(self.task.test), 64)])  # fmt: skip
        error = rows.std().item() / len(rows) ** 0.5
        return {"loss": rows.mean().item(), "error": error, "seconds": time.monotonic() - began}


def prepare(name: str, arguments: argparse.Namespace, progress: Progress) -> Setting:
    """Teacher, analysis and table of latencies of a task."""
    folder = arguments.work / name
    task = TASKS[name](scale=arguments.scale)
    teacher = teacher_of(task, folder / "teacher", epochs=arguments.epochs)
    context = ProxyContext(
        teacher,
        analyse(teacher, task.fit, batch_size=64, progress=progress),
        task.train,
        task.judge,
        loss=DistillLoss(),
        batch_size=BATCH,
    )
    space = SearchSpace.around(
        teacher_shape(teacher), ffn=32, kv_heads=(1, 2, 3, 4), min_layers=2, max_added=1 if arguments.add else 0
    )
    workload = Workload(batch=32, sequence=20, threads=arguments.threads)
    path = folder / "latency.json"
    table = search_table.kept(path, lambda: measured_table(context, space, workload, progress))
    return Setting(task, context, space, LatencyTable.from_dict(table), workload, arguments)


def measured_table(context: ProxyContext, space: SearchSpace, workload: Workload, progress: Progress) -> dict[str, Any]:
    """The table of latencies as a JSON value."""
    bench = bench_for(context.teacher, context.fit, workload, repeats=9)
    return LatencyTable.measure(space, bench, whole=6, progress=progress).to_dict()


def candidates(setting: Setting, budget: float, count: int) -> list[CandidateSpec]:
    """Students of the space inside five per cent of the budget, as many of each depth as there are."""
    make, found = torch.Generator().manual_seed(0), {}
    for _ in range(40_000):
        spec = setting.space.random(make)
        if abs(setting.table.predict(spec) / budget - 1) <= SPREAD:
            found.setdefault(len(spec.layers), {}).setdefault(spec.key(), spec)
        if sum(min(len(group), count // 4) for group in found.values()) >= count:
            break
    groups = [list(group.values()) for _, group in sorted(found.items())]
    turns = [spec for turn in range(count) for group in groups for spec in group[turn : turn + 1]]
    return turns[:count]


def depth_pruned(setting: Setting) -> CandidateSpec:
    """The teacher with the half of its layers that has the most influence."""
    whole = teacher_shape(setting.context.teacher).identity()
    worth = setting.context.analysis.influence[0]
    kept = by_influence(setting.space, worth, len(worth) // 2)
    return replace(whole, layers=tuple(whole.layers[n] for n in kept))


def uniform_width(setting: Setting, budget: float) -> CandidateSpec:
    """The teacher with all its layers, all narrowed alike, nearest to the budget; heads and units fall together."""
    whole = teacher_shape(setting.context.teacher).identity()
    layer = whole.layers[0]
    options = [
        replace(whole, layers=tuple(replace(x, kv_heads=heads, intermediate_size=units) for x in whole.layers))
        for heads in range(1, layer.kv_heads + 1)
        for units in range(8, layer.intermediate_size + 1, 8)
    ]

    def missed(spec: CandidateSpec) -> tuple[bool, float]:
        first = spec.layers[0]
        uneven = abs(first.kv_heads / layer.kv_heads - first.intermediate_size / layer.intermediate_size)
        far = abs(setting.table.predict(spec) / budget - 1)
        return far > SPREAD, uneven if far <= SPREAD else far

    return min(options, key=missed)


def once(journal: Journal, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A line of the journal, computed if it is not there."""
    if key not in journal:
        journal.add(key, **make())
    return journal.get(key)


def foretelling(setting: Setting, journal: Journal, budget: float, progress: Progress) -> None:
    """Proxies and truth of every candidate."""
    arguments = setting.arguments
    specs = candidates(setting, budget, arguments.candidates)
    with progress.bar(f"{setting.task.name}: candidates", len(specs), "candidate") as bar:
        for spec in specs:
            key = spec.key()
            journal.get(f"spec/{key}") or journal.add(f"spec/{key}", spec=spec.to_dict())
            for name in judged(arguments.short):
                once(journal, f"proxy/{name}/{key}", lambda n=name, s=spec: timed_proxy(setting, n, s))
            for seed in range(arguments.seeds):
                once(journal, f"truth/{seed}/{key}", lambda k=seed, s=spec: setting.truth(s, k))
            bar.advance()


def judged(steps: int) -> list[str]:
    """Names of all proxies, with the rungs of the default ladder."""
    cheap = [name for name in PROXIES if name not in TAUGHT]
    rungs = [name for name, _ in ladder_of(steps)]
    return [*cheap, *rungs, rungs[-2].replace("short", "short_kl")]


def timed_proxy(setting: Setting, name: str, spec: CandidateSpec) -> dict[str, float]:
    """Value of a proxy and the seconds it took."""
    setting.context.stream, setting.context.said("fit"), setting.context.said("judge")  # shared by all, not timed
    began = time.monotonic()
    return {"value": proxy(name)(setting.context, spec), "seconds": time.monotonic() - began}


def comparing(setting: Setting, journal: Journal, budget: float, progress: Progress) -> None:
    """Our search and the usual recipes at one latency, taught equally long."""
    arguments = setting.arguments
    folder = arguments.work / setting.task.name / "search"
    options = StudyOptions(trials=arguments.trials, seed=0)
    limits, rungs = Limits(latency_ms=budget), ladder_of(arguments.short)
    plan = SearchPlan(setting.workload, limits, options, ladder=rungs, repeats=9)
    result = run_search(setting.context, setting.space, plan, folder, progress=progress)
    ours = result.pick("accurate").choice.spec
    rivals = {
        "search": (ours, True),
        "depth by influence": (depth_pruned(setting), False),
        "depth by influence, healed": (depth_pruned(setting), True),
        "uniform width": (uniform_width(setting, budget), False),
        "uniform width, healed": (uniform_width(setting, budget), True),
    }
    bench = bench_for(setting.context.teacher, setting.context.fit, setting.workload, repeats=15)
    specs = list(dict.fromkeys(spec for spec, _ in rivals.values()))
    cost = cost_model(setting.context, setting.space, setting.workload, setting.table)
    times = measure(bench, [Choice(spec) for spec in specs], cost)
    for name, (spec, healed) in rivals.items():
        found = times[Choice(spec).key()]
        once(journal, f"rival/{name}", lambda s=spec, c=found: {"spec": s.to_dict(), "cost": c.to_dict()})
        for seed in range(arguments.seeds):
            once(journal, f"rival/{name}/{seed}", lambda s=spec, k=seed, h=healed: setting.truth(s, k, h))


def held_out_costs(setting: Setting, journal: Journal) -> None:
    """Cost model against students that it was not fitted to."""
    make = torch.Generator().manual_seed(77)
    specs = [setting.space.random(make) for _ in range(12)]
    bench = bench_for(setting.context.teacher, setting.context.fit, setting.workload, repeats=15)
    cost = cost_model(setting.context, setting.space, setting.workload, setting.table, bench)
    found = measure(bench, [Choice(spec) for spec in specs], cost)
    for spec in specs:
        key, predicted = Choice(spec).key(), cost(Choice(spec))
        journal.add(f"cost/{key}", predicted=predicted.to_dict(), measured=found[key].to_dict())


def main() -> None:
    """Parse the command line, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for teachers and results")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--short", type=int, default=180, help="steps of the last rung of the ladder")
    parser.add_argument("--long", type=int, default=600, help="steps of the distillation that is the truth")
    parser.add_argument("--trials", type=int, default=96, help="students that the search judges")
    parser.add_argument("--add", action="store_true", help="let the search add a layer")
    parser.add_argument("--epochs", type=int, default=12, help="of the teacher")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows, for a trial run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--json", type=Path, help="write the tables here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    progress = Progress()
    for name in [] if arguments.table else arguments.tasks:
        marks = {k: v for k, v in vars(arguments).items() if k in ("long", "epochs", "scale", "add")}
        journal = Journal(arguments.work / name / "results.jsonl", {k: str(v) for k, v in marks.items()})
        setting = prepare(name, arguments, progress)
        budget = setting.table.predict(depth_pruned(setting))
        if "costs" in arguments.parts:
            once(journal, "costs are measured", lambda s=setting, j=journal: held_out_costs(s, j) or {})
        if "proxies" in arguments.parts:
            foretelling(setting, journal, budget, progress)
        if "comparison" in arguments.parts:
            comparing(setting, journal, budget, progress)
    search_table.show(arguments.work, arguments.tasks, arguments.json)


if __name__ == "__main__":
    main()
