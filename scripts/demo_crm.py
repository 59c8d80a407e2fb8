"""A student of a hundredth that beats its few-shot teacher at the outcome of deals: everything from nothing.

    python scripts/demo_crm.py --preset small --work runs/crm
    python scripts/demo_crm.py --preset default --work runs/crm-default --page

A generalist learns from thousands of made-up sales worlds. For each task (the UCI bank table, a synthetic world that
it has not seen, and a pipeline without a rule as the control) a student with a hundredth of its parameters is searched
for, cut from it, taught, packed to one bit, and judged beside the usual methods. Presets: `quick` shows in a minute
that everything runs, `small` takes more than half an hour on two cores, `default` is what the page reports, `full` is
for those who have a day. Whatever is in the folder is not computed again: a run that was stopped goes on with the same
command.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from crm.measure import measure
from crm.names import ALONE, FEW_SHOT, ONE_BIT, RAW, STUDENT, TUNED
from crm.offer import offer
from crm.page import write_page
from crm.presets import PRESETS, Preset
from crm.scores import Scored, as_answered, score, summary
from crm.skill import skill
from crm.specialist import METHODS, Specialist
from crm.tabular import BASELINES, Table
from crm.tasks import BANK, PIPELINE, WORLD, general_text, table_of, target_bayes
from crm.teacher import load, pretrain
from libraries import silence
from search_table import kept

from hf_qep.errors import ConfigError, QepError
from hf_qep.files import write_text_aside
from hf_qep.kernels.processor import processor_name
from hf_qep.progress import Progress

HERE = Path(__file__).resolve().parent
PAGE = HERE / "crm" / "README.md"
PAIRS = [(STUDENT, FEW_SHOT), (STUDENT, RAW), (STUDENT, TUNED), (STUDENT, ALONE), (STUDENT, "gradient boosting")]
PAIRS += [(ONE_BIT, STUDENT), (ONE_BIT, FEW_SHOT)]
PAUSE = 1.0


def run(preset: Preset, work: Path, data: Path, tasks: Sequence[str], workers: int, quiet: bool) -> dict[str, Any]:
    """Everything that is not in the folder yet; the results as `crm.page` takes them."""
    progress, began = Progress(quiet), time.monotonic()
    teacher = work / "teacher"
    if not (teacher / "config.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        pretrain(preset.teacher, general_text(data), teacher, progress)
    seconds = {"teacher": round(time.monotonic() - began)}
    jobs = {name: _specialist(preset, name, work, data) for name in tasks}
    _work(preset, jobs, work, data, workers, progress)
    seconds["tasks"] = round(time.monotonic() - began) - seconds["teacher"]
    model, tokenizer = load(teacher)
    shown = kept(work / "skill.json", lambda: skill(model, tokenizer, worlds=preset.skill, progress=progress))
    results = {
        "tasks": {name: _judged(job, preset) for name, job in jobs.items()},
        "teacher_skill": shown,
        "machine": _machine(workers) | {f"seconds for {part}": value for part, value in _added(work, seconds).items()},
        "command": f"python scripts/{Path(__file__).name} {' '.join(sys.argv[1:])}".strip(),
    }
    for job in jobs.values():
        offer(job, work / "space")
    write_text_aside(work / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _specialist(preset: Preset, name: str, work: Path, data: Path) -> Specialist:
    plan = preset.plans[name]
    table: Table = table_of(name, data, plan.sizes, work / "cache")
    return Specialist(table, work / "teacher", work / name, plan)


def _run_task(preset: Preset, name: str, work: Path, data: Path) -> None:
    """One task in a process of its own, on one thread."""
    torch.set_num_threads(1)
    silence()
    _specialist(preset, name, work, data).run()


def _work(
    preset: Preset, jobs: dict[str, Specialist], work: Path, data: Path, workers: int, progress: Progress
) -> None:
    """All tasks, `workers` at a time; the bar counts what methods have said. Without workers, one after the other."""
    units = [path for job in jobs.values() for path in job.units()]
    missing = [path for path in units if not path.exists()]
    if not missing or not workers:
        for job in jobs.values() if missing else ():
            job.run()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool, progress.bar("methods", len(missing), "method") as bar:
        running: list[Future[None]] = [pool.submit(_run_task, preset, name, work, data) for name in jobs]
        done = 0
        while not all(future.done() for future in running):
            time.sleep(PAUSE)
            now = sum(path.exists() for path in missing)
            bar.advance(now - done)
            done = now
            if failed := next((f for f in running if f.done() and f.exception()), None):
                pool.shutdown(wait=False, cancel_futures=True)
                failed.result()
    for future in running:
        future.result()


def _judged(job: Specialist, preset: Preset) -> dict[str, Any]:
    """One task's results: quality, costs, and how the student compares."""
    table = job.table
    methods: dict[str, list[Scored]] = {}
    for name in [*BASELINES, *METHODS]:
        said = job.answers(name)
        if said:
            methods[name] = [score(valid, table.valid.yes, test, table.test.yes) for valid, test in said]
        if name == FEW_SHOT and said:
            methods[RAW] = [as_answered(test, table.test.yes) for _, test in said]
    found = summary(methods, [pair for pair in PAIRS if set(pair) <= set(methods)], samples=preset.samples)
    costs = kept(job.folder / "costs.json", lambda: measure(job, preset.repeats))
    for name, row in found["rows"].items():
        row |= {key: value for key, value in costs.get(name.removesuffix(", as it answers"), {}).items()}
        if name in BASELINES:
            row |= job.facts_of(name)
    if table.name == WORLD:
        found["bayes"] = target_bayes()
    note = f"Made up: {table.sizes()}." if table.name == WORLD else table.explain()
    return found | {"note": note + job.told(), "control": table.name == PIPELINE}


def _added(work: Path, seconds: dict[str, int]) -> dict[str, int]:
    """Seconds of this run on top of those of earlier ones in the folder; what took none is left out."""
    path = work / "seconds.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    total = {part: before.get(part, 0) + value for part, value in seconds.items()}
    write_text_aside(path, json.dumps(total) + "\n")
    return {part: value for part, value in total.items() if value}


def _machine(workers: int) -> dict[str, Any]:
    name = processor_name() or platform.machine()
    return {"processor": name, "cores": os.cpu_count(), "tasks at once": workers, "torch": torch.__version__}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; one per preset")
    parser.add_argument("--data", type=Path, help="folder with crm/ and text/; what is missing is fetched or left out")
    parser.add_argument("--tasks", nargs="+", choices=[BANK, WORLD, PIPELINE], help="left out: all of the preset")
    parser.add_argument("--workers", type=int, default=2, help="tasks at once, each on one thread; 0: in this process")
    parser.add_argument("--page", action="store_true", help="write the measured part of scripts/crm/README.md")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    """Parse the command line and run."""
    arguments = _arguments()
    silence()
    preset = PRESETS[arguments.preset]()
    data = arguments.data or Path(os.environ.get("HF_QEP_DATA", HERE.parents[1] / "shared" / "data"))
    try:
        tasks = arguments.tasks or [name for name in preset.plans if _is_there(name, data)]
        if missing := set(tasks) - set(preset.plans):
            raise ConfigError(f"the preset {arguments.preset} has no {', '.join(sorted(missing))}")
        results = run(preset, arguments.work, data, tasks, arguments.workers, arguments.quiet or arguments.json)
        if arguments.page:
            write_page(results, PAGE)
    except QepError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(results, indent=1))
    elif not arguments.quiet:
        from crm.page import measured_part

        print(measured_part(results))


def _is_there(name: str, data: Path) -> bool:
    """The control is not published; without its file it is left out."""
    return name != PIPELINE or (data / "crm" / "maven-sales-pipeline-negative-control.csv").exists()


if __name__ == "__main__":
    main()
