"""How much of everything: a test of a minute (`quick`), half an hour without the control (`small`), what the page
reports (`default`), and more for those who have a day (`full`)."""

from __future__ import annotations

from dataclasses import dataclass

from crm.names import ALONE, FEW_SHOT, ONE_BIT, STUDENT, TUNED
from crm.specialist import Mix, Plan
from crm.tasks import BANK, PIPELINE, WORLD, Sizes
from crm.teacher import TeacherPlan


@dataclass(frozen=True)
class Preset:
    """teacher: its training. plans: of each task, in the order in which workers take them. skill: worlds that the
    teacher is tried in. samples: of the bootstrap. repeats: of timings."""

    teacher: TeacherPlan
    plans: dict[str, Plan]
    skill: int
    samples: int = 1000
    repeats: int = 15


def _seeds(few: int, student: int, tuned: int, one_bit: int) -> dict[str, int]:
    return {FEW_SHOT: few, STUDENT: student, ALONE: student, ONE_BIT: one_bit, TUNED: tuned}


IMITATION = Mix(0.0, as_it_answers=True)
BANK_MIXES = (IMITATION, Mix(0.3, as_it_answers=True), Mix(0.5))
"""Where the share of "yes" drifts, a teacher that is put right by old labels loses what it knew."""
_CONTROL = {FEW_SHOT: 1, STUDENT: 1}


def _control() -> Plan:
    return Plan(Sizes(None, None, None), _CONTROL, trials=12, proxy_steps=30, climbers=3, epochs=3)


def _quick() -> Preset:
    world = Plan(
        Sizes(240, 120, 160),
        _seeds(1, 1, 1, 1),
        tuned_rows=96,
        tuned_epochs=1,
        widths=(16, 32),
        ffn=(32,),
        least_layers=1,
        trials=3,
        proxy_steps=4,
        climbers=2,
        epochs=1,
        bits_epochs=1,
        room=256,
        share=3,
        mixes=(Mix(0.5),),
    )
    teacher = TeacherPlan(512, 64, 128, 2, 2, 1, 1024, 256, 4, 12, tokenizer_worlds=60)
    return Preset(teacher, {WORLD: world}, skill=3, samples=50, repeats=3)


def _small() -> Preset:
    few = {"judge_rows": 128, "trials": 8, "proxy_steps": 30, "climbers": 2, "tuned_rows": 1_000, "tuned_epochs": 1}
    seeds = _seeds(1, 1, 1, 1)
    bank = Plan(Sizes(4_000, 1_000, None), seeds, epochs=5, mixes=(IMITATION,), **few)
    world = Plan(Sizes(5_000, 1_000, 2_000), seeds, epochs=6, mixes=(Mix(0.8),), **few)
    return Preset(TeacherPlan(), {BANK: bank, WORLD: world}, skill=20)


def _default() -> Preset:
    seeds = _seeds(3, 3, 1, 3)
    bank = Plan(Sizes(12_000, 2_000, None), seeds, tuned_rows=10_200, tuned_epochs=1, epochs=4, mixes=BANK_MIXES)
    world = Plan(Sizes(8_000, 2_000, 3_000), seeds, tuned_rows=6_800, epochs=6)
    return Preset(TeacherPlan(), {BANK: bank, WORLD: world, PIPELINE: _control()}, skill=60)


def _full() -> Preset:
    seeds, more = _seeds(3, 3, 3, 3), {"tuned_rows": 26_000, "trials": 64, "climbers": 27}
    bank = Plan(Sizes(None, None, None), seeds, epochs=4, mixes=BANK_MIXES, **more)
    world = Plan(Sizes(32_000, 4_000, 9_000), seeds, **more)
    return Preset(TeacherPlan(), {BANK: bank, WORLD: world, PIPELINE: _control()}, skill=200)


PRESETS = {"quick": _quick, "small": _small, "default": _default, "full": _full}
