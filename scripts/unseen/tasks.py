"""The two tasks as the pipeline sees them: who the teacher is, what students learn from, and how they are judged."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hf_qep.distill.pictures import centred
from hf_qep.progress import Progress
from unseen import photos
from unseen.episodes import episodes, official
from unseen.lessons import Lesson, glyph_lesson
from unseen.material import Material, load_material
from unseen.presets import Preset, SearchSizes, StudentPlan
from unseen.teacher import train_teacher
from unseen.vit import embed


class Task(Protocol):
    """seeds: of students. plan: how they are taught. search: sizes of the search. measure: key of what counts in what
    `judge` returns, lists of shares of right answers per group of trials."""

    name: str
    seeds: int
    plan: StudentPlan
    search: SearchSizes
    measure: str

    def teacher(self, folder: Path, progress: Progress) -> Any:
        """A trained teacher."""

    def lesson(self, teacher: Any, seed: int) -> Lesson:
        """What students of one seed learn from."""

    def judge(self, model: Any) -> dict[str, list[list[float]]]:
        """Whether each trial was right, or which share of it, by measure: (groups, trials)."""

    def references(self) -> dict[str, float]:
        """Share of right answers of what learns nothing, by name."""


class Characters:
    """Omniglot: some alphabets are seen, others are not."""

    name, measure = "omniglot", "official"

    def __init__(self, preset: Preset, data: Path | None) -> None:
        self.preset, self.data = preset, data
        self.seeds, self.plan, self.search = preset.seeds, preset.student, preset.search

    @cached_property
    def material(self) -> Material:
        """All drawings."""
        return load_material(self.preset, self.data)

    def teacher(self, folder: Path, progress: Progress) -> Any:
        """Trained on all that is no run."""
        return train_teacher(self.material.known, self.preset, folder, progress=progress)

    def lesson(self, teacher: Any, seed: int) -> Lesson:
        """Seen drawings only; the bank holds prototypes of seen and of invented characters."""
        plan = self.plan
        return glyph_lesson(teacher, self.material.seen, copies=plan.copies, invented=plan.bank, seed=seed)

    def judge(self, model: Any) -> dict[str, list[list[float]]]:
        """`official`: the runs. `episodes`: on characters of small2, which the teacher has seen and no student."""

        def look(images: Tensor) -> Tensor:
            return embed(model, centred(images))

        material = self.material
        return {
            "official": official(look, material.runs).float().tolist(),
            "episodes": episodes(look, material.unseen, self.preset.episodes).float().mean(1, keepdim=True).tolist(),
        }

    def references(self) -> dict[str, float]:
        """Share of right answers on the runs of what learns nothing: the nearest drawing by its pixels."""
        runs = self.material.runs
        return {
            "nearest by raw pixels": official(lambda images: images.flatten(1), runs).float().mean().item(),
            "nearest by pixels of centred drawings": official(lambda images: centred(images).flatten(1), runs)
            .float()
            .mean()
            .item(),
        }


def task_called(name: str, preset: Preset, data: Path | None) -> Task:
    """A task by name, `omniglot` or `cifar`."""
    return {"omniglot": Characters, "cifar": photos.Photos}[name](preset, data)
