"""One task from nothing to its results: teacher, lessons, search, and every method with every seed.

Whatever is finished lies in the folder, and a run that was stopped goes on behind it:

    teacher/          the teacher, as `save_student` writes it
    lessons/0.safetensors ...   what students of each seed learn from
    search/, start/, shrunk.json   the search, the student it found before it learns, and what all of them cost
    units.jsonl       a line per method and seed
    student/          ours of seed 0
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_qep.distill.store import teacher_fingerprint
from hf_qep.files import write_text_aside
from hf_qep.progress import SILENT, Progress
from hf_qep.search.journal import Journal
from hf_qep.students.family import teacher_shape
from hf_qep.students.saving import load_student, save_student
from unseen.lessons import Lesson
from unseen.methods import BASELINES, BEST, FIRST, OURS, Method, student_for, taught, with_best
from unseen.presets import Preset
from unseen.shrink import Shrunk, shrink
from unseen.tasks import Task, task_called

TEACHER, LESSONS, UNITS, STUDENT = "teacher", "lessons", "units.jsonl", "student"
PREPARATION = "preparation.json"
"""Beside the weights: how an image becomes `pixel_values`."""


@dataclass(frozen=True)
class Job:
    """What a process needs to know to do any unit of a task."""

    task: str
    preset: Preset
    data: Path | None
    folder: Path

    def made(self) -> Task:
        """The task."""
        return task_called(self.task, self.preset, self.data)


def run_task(job: Job, *, workers: int = 2, progress: Progress = SILENT) -> dict[str, Any]:
    """Results of a task as a JSON value.

    `teacher`: what it scored; `references`: what scores without learning; `shrunk`: shapes and costs; `best`: the best
    baseline; `shown`: names of the methods; `units`: method -> seed -> what `Task.judge` returns, with `seconds`;
    `seconds`: of the stages. Raises ConfigError where the folder was begun with other settings.
    """
    task, clock = job.made(), Clock(job.folder / "seconds.json")
    torch.set_num_threads(workers)
    with clock("teacher"):
        teacher = kept_teacher(job, task, progress)
    score = task.judge(teacher)
    with clock("lessons"):
        missing = [seed for seed in range(task.seeds) if not lesson_path(job, seed).exists()]
        for _ in _pooled(job, _write_lesson, missing, workers):
            pass
    torch.set_num_threads(1)
    with clock("search"):
        pixels, plan = Lesson.load(lesson_path(job, 0)).pixels, task.plan
        shrunk = shrink(teacher, pixels, task.search, job.folder, relation=plan.relation, progress=progress)
    journal = Journal(job.folder / UNITS, _fingerprint(job, task, teacher, shrunk))
    with clock("students"):
        _do(job, journal, FIRST, task.seeds, workers, progress)
        best = max(BASELINES, key=lambda name: _mean(journal, name, task))
        _do(job, journal, {BEST: with_best(best)[BEST]}, task.seeds, workers, progress)
    methods = with_best(best)
    units = {name: {str(s): journal.get(_key(name, s)) for s in range(task.seeds)} for name in methods}
    shown = {name: method.shown for name, method in methods.items()}
    return {
        "task": task.name,
        "measure": task.measure,
        "teacher": score,
        "references": task.references(),
        "shrunk": shrunk.to_dict(),
        "best": best,
        "shown": shown,
        "units": units,
        "seconds": clock.known,
    }


def kept_teacher(job: Job, task: Task, progress: Progress = SILENT) -> Any:
    """The teacher of the folder, trained first if it is not there."""
    if not (job.folder / TEACHER).is_dir():
        teacher = task.teacher(job.folder, progress)
        shape = teacher_shape(teacher)
        save_student(teacher, job.folder / TEACHER, spec=shape.identity(), teacher_name="itself", shape=shape)
        _note_preparation(job.folder / TEACHER, teacher)
    return load_student(job.folder / TEACHER)


class Clock:
    """Seconds of stages, added up over calls in a small file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, stage: str) -> Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.known[self._stage] = self.known.get(self._stage, 0.0) + time.monotonic() - self._began
        write_text_aside(self._path, json.dumps(self.known, indent=2) + "\n")


def _do(job: Job, journal: Journal, methods: dict[str, Method], seeds: int, workers: int, progress: Progress) -> None:
    """All units that the journal lacks."""
    wanted = [(name, method, seed) for seed in range(seeds) for name, method in methods.items()]
    missing = [unit for unit in wanted if _key(unit[0], unit[2]) not in journal]
    with progress.bar(f"{job.task}: students", len(wanted), "student") as bar:
        bar.advance(len(wanted) - len(missing))
        for (name, _, seed), found in zip(missing, _pooled(job, _unit, missing, workers), strict=True):
            journal.add(_key(name, seed), **found)
            bar.advance(detail=f"{name}, seed {seed}")


def _unit(unit: tuple[str, Method, int]) -> dict[str, Any]:
    """Teach one student and judge it."""
    name, method, seed = unit
    job, task, teacher = _WORKER["job"], _WORKER["task"], _WORKER["teacher"]
    began, folder = time.monotonic(), job.folder
    shrunk = Shrunk.from_dict(json.loads((folder / "shrunk.json").read_text(encoding="utf-8")))
    student = student_for(method, teacher, shrunk, folder, seed)
    taught(method, student, Lesson.load(lesson_path(job, seed)), task.plan, seed)
    seconds = time.monotonic() - began
    if (name, seed) == (OURS, 0):
        options = {"spec": shrunk.spec, "teacher_name": TEACHER, "shape": teacher_shape(teacher), "overwrite": True}
        save_student(student, folder / STUDENT, **options)
        _note_preparation(folder / STUDENT, student)
    return task.judge(student) | {"seconds": seconds}


def _write_lesson(seed: int) -> None:
    job = _WORKER["job"]
    _WORKER["task"].lesson(_WORKER["teacher"], seed).save(lesson_path(job, seed))


def _pooled(job: Job, function: Any, items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`function` of every item in its order, in processes of one thread each, or here where one is enough."""
    items = list(items)
    if workers < 2 or len(items) < 2:
        _begin(job)
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _begin, (job,)) as pool:
        yield from pool.map(function, items)


_WORKER: dict[str, Any] = {}


def _begin(job: Job) -> None:
    torch.set_num_threads(1)
    _WORKER.update(job=job, task=job.made(), teacher=load_student(job.folder / TEACHER))


def lesson_path(job: Job, seed: int) -> Path:
    """What students of a seed learn from."""
    return job.folder / LESSONS / f"{seed}.safetensors"


def _note_preparation(folder: Path, model: Any) -> None:
    config = model.config
    note = {"side": config.image_size, "channels": config.num_channels, "embedding": "pooler_output, by cosine"}
    note |= (
        {"ink": 1.0, "ground": 0.0, "centred": "hf_qep.distill.pictures.centred"} if config.num_channels == 1 else {}
    )
    write_text_aside(folder / PREPARATION, json.dumps(note, indent=2) + "\n")


def _fingerprint(job: Job, task: Task, teacher: Any, shrunk: Shrunk) -> dict[str, Any]:
    """What every line of the journal depends on."""
    lesson = hashlib.sha256(lesson_path(job, 0).read_bytes()).hexdigest()
    settings = {"preset": job.preset.to_dict(), "plan": asdict(task.plan), "spec": shrunk.spec.to_dict()}
    return settings | {"teacher": teacher_fingerprint(teacher), "usual": shrunk.usual.to_dict(), "lesson": lesson}


def _mean(journal: Journal, name: str, task: Task) -> float:
    found = [journal.get(_key(name, seed))[task.measure] for seed in range(task.seeds)]
    return float(torch.tensor(found).mean())


def _key(name: str, seed: int) -> str:
    return f"{name}/{seed}"
