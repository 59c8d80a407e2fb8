"""Detection of objects whose class was never seen: the same detector, taught by every method, over several seeds.

The detector is an encoder-only DETR (`unseen.detect_model`). It learns on canvases with drawings of seen classes and
of no class; it is judged on canvases with classes that it never saw, each named by one drawing.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_qep.errors import UnknownNameError
from hf_qep.progress import SILENT, Progress
from hf_qep.search.journal import Journal
from unseen.detect_model import Detector, Shape
from unseen.detect_scenes import Look
from unseen.detect_score import Deal, Episode, Judged, deal, judge, own_prototypes
from unseen.detect_table import summary, table
from unseen.detect_train import METHODS, UNLABELLED, Lessons, Schedule, train
from unseen.episodes import Embed
from unseen.glyphs import Glyphs

__all__ = ["Material", "PRESETS", "run_detection", "summary", "table"]

JOURNAL = "detection.jsonl"
HELD_OUT = 16
"""Drawers above this number draw what is judged of the seen classes; the others draw what is learned."""
TEMPERATURES = (0.05, 0.1, 0.2, 0.4)
"""Of the scores; the best one on seen classes is taken, for each method, seed and kind of prototype."""
EPISODES_SEED = 2_000_003
"""Of the canvases that are judged, the same for every seed of training."""


@dataclass(frozen=True)
class Material:
    """seen: classes to learn. unseen: classes to be judged on. other: drawings of no class, (rows, 1, size, size)
    float32, ink 1; every method learns boxes from them, and every one but `ce` what the teacher says of them."""

    seen: Glyphs
    unseen: Glyphs
    other: Tensor


@dataclass(frozen=True)
class Preset:
    """Sizes of everything. tuning: episodes of seen classes that choose the temperature; views: canvases of a drawing
    whose embeddings make the detector's own prototype; seeds: how many."""

    seeds: int = 5
    shape: Shape = field(default_factory=Shape)
    look: Look = field(default_factory=Look)
    schedule: Schedule = field(default_factory=Schedule)
    unseen: Deal = field(default_factory=Deal)
    seen: Deal = field(default_factory=lambda: Deal(count=10))
    tuning: Deal = field(default_factory=lambda: Deal(count=4))
    views: int = 8


def _quick() -> Preset:
    few = Deal(ways=4, canvases=6, count=2)
    return Preset(2, Shape((8, 16, 16)), Look(side=48), Schedule(steps=6, batch=8), few, few, few, views=2)


PRESETS = {"quick": _quick, "default": Preset}


@dataclass(frozen=True)
class Exam:
    """Episodes of one part, and the drawings (rows, 1, size, size) and teacher's embeddings (rows, width) of it."""

    episodes: list[Episode]
    drawings: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Job:
    """All that every unit needs; nothing of it depends on the seed, so that all are judged on the same canvases."""

    preset: Preset
    lessons: Lessons
    exams: dict[str, Exam]


def run_detection(
    material: Material,
    teacher_embed: Embed,
    bank: Tensor,
    *,
    preset: str = "default",
    seeds: Sequence[int] | None = None,
    folder: Path,
    workers: int = 2,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Every method with every seed; what is in the journal of `folder` already is not done again.

    teacher_embed: clean drawings (n, 1, size, size) to embeddings (n, width). bank: the teacher's embeddings (m, width)
    of anything at all. seeds: instead of the preset's 0, 1, ... workers: processes of one thread each.
    Returns a JSON value: `preset`, `parameters`, `bank`, `units`: method -> seed -> `ap` (part -> kind of prototype ->
    AP50 of every episode), `any` (part -> AP50 of every episode whatever the class), `temperature` (kind -> chosen),
    `seconds` (CPU time of `train` and `judge`).
    Raises UnknownNameError for an unknown preset, ConfigError if the folder was begun with other settings.
    """
    if preset not in PRESETS:
        raise UnknownNameError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    sizes = PRESETS[preset]()
    job = prepare(material, teacher_embed, bank, sizes)
    journal = Journal(folder / JOURNAL, {"preset": asdict(sizes), "methods": _methods(), "material": _digest(job)})
    wanted = [(name, seed) for seed in (seeds or range(sizes.seeds)) for name in METHODS]
    missing = [unit for unit in wanted if _key(*unit) not in journal]
    with progress.bar("detection", len(wanted), "detector") as bar:
        bar.advance(len(wanted) - len(missing))
        for (name, seed), found in _done(job, missing, workers):
            journal.add(_key(name, seed), **found)
            bar.advance(detail=f"{name}, seed {seed}")
    units: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    for name, seed in wanted:
        units[name][str(seed)] = journal.get(_key(name, seed))
    detector = Detector(sizes.shape, sizes.look.side, job.lessons.wanted.shape[1])
    parameters = sum(p.numel() for p in detector.parameters())
    return {"preset": asdict(sizes), "parameters": parameters, "bank": len(bank), "units": units}


def prepare(material: Material, teacher_embed: Embed, bank: Tensor, sizes: Preset) -> Job:
    """What is learned and what is judged. The teacher sees every drawing once, clean, and no canvas."""
    seen, unseen = material.seen, material.unseen
    of_seen, of_unseen, of_other = (_unit(teacher_embed(x)) for x in (seen.images, unseen.images, material.other))
    learned = seen.drawers <= HELD_OUT
    labels = seen.labels[learned]
    sums = torch.zeros(len(seen.characters), of_seen.shape[1]).index_add_(0, labels, of_seen[learned])
    lessons = Lessons(
        torch.cat([seen.images[learned], material.other]),
        torch.cat([labels, torch.full((len(material.other),), UNLABELLED)]),
        torch.cat([of_seen[learned], of_other]),
        _unit(sums),
        _unit(bank),
    )
    make, everything = Generator().manual_seed(EPISODES_SEED), torch.ones(len(unseen), dtype=torch.bool)
    look = sizes.look
    exams = {
        "unseen": deal(unseen.images, unseen.labels, everything, everything, sizes.unseen, look, make),
        "seen": deal(seen.images, seen.labels, learned, ~learned, sizes.seen, look, make),
        "tuning": deal(seen.images, seen.labels, learned, ~learned, sizes.tuning, look, make),
    }
    of_part = {name: (unseen.images, of_unseen) if name == "unseen" else (seen.images, of_seen) for name in exams}
    return Job(sizes, lessons, {name: Exam(episodes, *of_part[name]) for name, episodes in exams.items()})


def unit(job: Job, name: str, seed: int) -> dict[str, Any]:
    """Train a detector by one method and judge it."""
    began, sizes = time.process_time(), job.preset
    detector = train(METHODS[name], job.lessons, sizes.shape, sizes.look, sizes.schedule, seed)
    trained = time.process_time()
    make = Generator().manual_seed(seed)
    seen = {part: _named(detector, exam, sizes, METHODS[name].taught, make) for part, exam in job.exams.items()}
    kinds = list(seen["tuning"][0][1])
    temperature = {kind: max(TEMPERATURES, key=lambda t: sum(_aps(seen["tuning"], kind, t))) for kind in kinds}
    parts = [part for part in job.exams if part != "tuning"]
    return {
        "ap": {part: {kind: _aps(seen[part], kind, temperature[kind]) for kind in kinds} for part in parts},
        "any": {part: [judged.ap_of_any() for judged, _ in seen[part]] for part in parts},
        "temperature": temperature,
        "seconds": {"train": trained - began, "judge": time.process_time() - trained},
    }


def _named(
    detector: Detector, exam: Exam, sizes: Preset, taught: bool, make: Generator
) -> list[tuple[Judged, dict[str, Tensor]]]:
    """Every episode as the detector saw it, with the prototypes of its classes by kind."""
    found = []
    for episode in exam.episodes:
        own = own_prototypes(detector, exam.drawings[episode.support], sizes.look, sizes.views, make)
        kinds = {"own": own}
        if taught:
            teacher = exam.wanted[episode.support]
            kinds |= {"teacher": teacher, "both": _unit(own + teacher)}
        found.append((judge(detector, episode), kinds))
    return found


def _aps(seen: list[tuple[Judged, dict[str, Tensor]]], kind: str, temperature: float) -> list[float]:
    return [judged.ap(prototypes[kind], temperature) for judged, prototypes in seen]


def _done(job: Job, missing: list[tuple[str, int]], workers: int) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Results of units, in their order."""
    if workers < 2 or len(missing) < 2:
        yield from ((one, unit(job, *one)) for one in missing)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _begin, (job,)) as pool:
        yield from zip(missing, pool.map(_unit_of_worker, missing), strict=True)


_JOB: list[Job] = []


def _begin(job: Job) -> None:
    torch.set_num_threads(1)
    _JOB.append(job)


def _unit_of_worker(one: tuple[str, int]) -> dict[str, Any]:
    return unit(_JOB[0], *one)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.detach().float(), dim=1)


def _key(name: str, seed: int) -> str:
    return f"{name}/{seed}"


def _methods() -> dict[str, Any]:
    return {name: asdict(method) for name, method in METHODS.items()}


def _digest(job: Job) -> str:
    """Of what is learned and judged, so that results of another teacher are not taken for these."""
    lessons, exam = job.lessons, job.exams["unseen"]
    parts = (lessons.drawings, lessons.labels, lessons.wanted, lessons.bank, exam.drawings, exam.wanted)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
