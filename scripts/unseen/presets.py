"""How much of everything: a test of seconds (`quick`), what the page reports (`default`), the same with five alphabets
seen instead of two (`five`), with students that learn five times as long (`long`), and more for those who have hours
(`full`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unseen.glyphs import SIZE
from unseen.vit import Size


@dataclass(frozen=True)
class TeacherPlan:
    """steps of `pairs` classes with two drawings each, a share `invented` of them made up. rate: of AdamW,
    matrix_rate: of Muon."""

    size: Size = field(default_factory=Size)
    steps: int = 1200
    pairs: int = 128
    invented: float = 0.5
    rate: float = 1e-3
    matrix_rate: float = 0.02
    temperature: float = 0.1


@dataclass(frozen=True)
class SearchSizes:
    """share: of the teacher's latency, and of its parameters, that a student may have. batch: drawings of a step that
    is timed. The rest as in hf_qep.search.run.SearchPlan; rows: that students are healed and judged by."""

    latency: float = 0.5
    parameters: float = 0.5
    batch: int = 32
    trials: int = 48
    climbers: int = 18
    steps: int = 180
    rows: int = 1024
    repeats: int = 9
    hidden: tuple[int, ...] = (64, 96, 128)


@dataclass(frozen=True)
class StudentPlan:
    """copies: distorted drawings of every seen one. bank: invented characters among the prototypes. rate: of AdamW."""

    steps: int = 300
    batch: int = 64
    rate: float = 2e-3
    copies: int = 4
    bank: int = 2048
    relation: float = 1.0
    temperature: float = 0.1


@dataclass(frozen=True)
class Cifar:
    """unseen: classes that no student sees. steps: of the teacher and of each student; shots: per class of a test."""

    unseen: tuple[str, ...] = ("cat", "deer", "ship", "truck")
    teacher_steps: int = 500
    steps: int = 150
    rows: int = 6000
    seeds: int = 3
    shots: int = 5
    rate: float = 1e-3
    trials: int = 16
    size: Size = field(default_factory=lambda: Size(patch=8, layers=4))


@dataclass(frozen=True)
class Preset:
    """One size of the whole demonstration. width: of the embeddings. episodes: on characters that no student saw."""

    name: str
    teacher: TeacherPlan = field(default_factory=TeacherPlan)
    search: SearchSizes = field(default_factory=SearchSizes)
    student: StudentPlan = field(default_factory=StudentPlan)
    cifar: Cifar | None = field(default_factory=Cifar)
    seeds: int = 5
    episodes: int = 200
    width: int = 128
    side: int = SIZE
    seen: tuple[str, ...] = ("Greek", "Latin")
    """Alphabets of small1 that students see."""
    invented: bool = False
    """Whether all characters are made up, so that no data is needed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return asdict(self)


def _quick() -> Preset:
    return Preset(
        "quick",
        TeacherPlan(Size(hidden=32, layers=2, heads=4, ffn=32), steps=20, pairs=32),
        SearchSizes(9.0, 0.9, trials=4, climbers=2, steps=3, rows=64, repeats=3, batch=4, hidden=(24, 32)),
        StudentPlan(steps=6, batch=16, copies=1, bank=32),
        cifar=None,
        seeds=2,
        episodes=4,
        width=32,
        invented=True,
    )


def _full() -> Preset:
    return Preset(
        "full",
        TeacherPlan(Size(layers=6, ffn=384), steps=8000),
        SearchSizes(trials=96, climbers=27, steps=540),
        StudentPlan(steps=2000, copies=8, bank=4096),
        Cifar(teacher_steps=4000, steps=1000, rows=20_000, seeds=5, size=Size(patch=4, layers=6)),
        episodes=1000,
    )


def _five() -> Preset:
    return replace(Preset("five"), seen=("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"), cifar=None)


def _long() -> Preset:
    return replace(Preset("long"), student=StudentPlan(steps=1500), seeds=2, cifar=None)


PRESETS = {"quick": _quick, "default": lambda: Preset("default"), "five": _five, "long": _long, "full": _full}
