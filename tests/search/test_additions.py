"""Layers that are added: what they are said to gain they gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_qep.distill.said import take_said
from hf_qep.errors import ConfigError
from hf_qep.search.additions import Aim, score_additions, start_additions, with_copy
from hf_qep.students.family import layers_of, teacher_shape
from hf_qep.students.materialize import materialize
from tests.search.rows import rows_for

FAMILIES = ["llama", "cohere2", "bert_classifier", "vit"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gain_is_the_fall_of_the_loss(tiny_model, family):
    teacher, aim = tiny_model(family), Aim(rows_for(family, count=64), seed=3)
    spec = teacher_shape(teacher).identity()
    found = score_additions(teacher, spec, aim, positions=[0, len(spec.layers)])
    assert found == sorted(found, key=lambda a: -a.gain)
    best = found[0]
    assert best.gain > 0, "random models can always be improved by a step along the gradient"
    judge = aim.halves()[1]
    student = materialize(teacher, with_copy(spec, best.position, best.source))
    before = judge.mean(student, 8)
    assert before == pytest.approx(judge.mean(teacher, 8), rel=1e-5)
    parameters = dict(layers_of(student)[best.position][1].named_parameters())
    for name, tensor in best.start.items():
        parameters[name].data.copy_(tensor)
    assert before - judge.mean(student, 8) == pytest.approx(best.gain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_added_layer_makes_up_for_some_of_what_was_cut(tiny_model, family):
    teacher, data = tiny_model(family), rows_for(family, count=96)
    spec = teacher_shape(teacher).identity()
    spec = with_copy(replace(spec, layers=spec.layers[:1]), 1, 0)
    aim = Aim(data, take_said(teacher, data))
    student = materialize(teacher, spec)
    judge = aim.halves()[1]
    before = judge.mean(student, 8)
    start_additions(student, spec, aim)
    assert judge.mean(student, 8) < before


def test_a_student_without_additions_stays_as_it_is(tiny_model):
    teacher = tiny_model("llama")
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    start_additions(teacher, teacher_shape(teacher).identity(), Aim(rows_for("llama")))
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


def test_a_task_without_anything_to_learn_gains_nothing(tiny_model):
    """Labels drawn at random cannot be predicted; a fit on one half does not help on the other."""
    teacher = tiny_model("vit")
    with torch.no_grad():
        teacher.classifier.weight.mul_(0.01)
        teacher.classifier.bias.zero_()
    found = score_additions(teacher, teacher_shape(teacher).identity(), Aim(rows_for("vit", count=512)), positions=[2])
    assert found[0].gain < 0.02


def test_the_same_seed_gives_the_same_scores(tiny_model):
    teacher, aim = tiny_model("llama"), Aim(rows_for("llama", count=16), seed=1)
    spec = teacher_shape(teacher).identity()
    first, second = (score_additions(teacher, spec, aim, positions=[1]) for _ in range(2))
    assert [a.gain for a in first] == [a.gain for a in second]


def test_one_row_is_not_enough(tiny_model):
    teacher = tiny_model("llama")
    with pytest.raises(ConfigError, match="at least two"):
        score_additions(teacher, teacher_shape(teacher).identity(), Aim(rows_for("llama", count=1)))
