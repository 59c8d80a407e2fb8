"""Healing: what a cut took away and the rest can make up for is made up for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_qep.errors import ConfigError
from hf_qep.search.healing import TeacherStream, heal, passes
from hf_qep.students.family import family_of, layers_of, teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import ATTENTION, MLP
from hf_qep.students.units import kept_units
from tests.search.rows import rows_for

FAMILIES = ["llama", "qwen3", "cohere2", "bert_classifier", "vit"]


def cut(teacher, spec, scores=None):
    shape = teacher_shape(teacher)
    scores = scores or UnitScores.first_units(shape)
    return materialize(teacher, spec, scores), kept_units(spec, shape, scores)


def narrower(teacher, **sizes):
    spec = teacher_shape(teacher).identity()
    return replace(spec, layers=tuple(replace(layer, **sizes) for layer in spec.layers))


def residual_error(student, teacher, data):
    """Distance of the last residual streams, relative."""
    ends = []
    for model in (student, teacher):
        layer, layout = layers_of(model)[-1][1], family_of(model).layout
        ends.append(
            torch.cat([seen.leave for seen in passes(model, layer, layout, TeacherStream(model, data).batches())])
        )
    return ((ends[0] - ends[1]).square().sum() / ends[1].square().sum()).item()


def logits(model, data):
    return model(**data.inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_student_stays_as_it_is(tiny_model, family):
    teacher, data = tiny_model(family), rows_for(family)
    spec = teacher_shape(teacher).identity()
    student, kept = cut(teacher, spec)
    heal(student, spec, kept, TeacherStream(teacher, data))
    assert torch.allclose(logits(student, data), logits(teacher, data), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [{"intermediate_size": 48}, {"kv_heads": 1}], ids=["mlp", "heads"])
def test_a_narrower_student_comes_closer_to_the_residual_stream(tiny_model, family, sizes):
    teacher, data = tiny_model(family), rows_for(family, count=48)
    spec = narrower(teacher, **sizes)
    student, kept = cut(teacher, spec)
    before = residual_error(student, teacher, data)
    heal(student, spec, kept, TeacherStream(teacher, data))
    assert residual_error(student, teacher, data) < 0.9 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_healed_helps_on_rows_that_it_has_not_seen(tiny_model, family):
    teacher, data, others = tiny_model(family), rows_for(family, count=96), rows_for(family, count=32, seed=9)
    spec = narrower(teacher, intermediate_size=64)
    student, kept = cut(teacher, spec)
    before = residual_error(student, teacher, others)
    heal(student, spec, kept, TeacherStream(teacher, data))
    assert residual_error(student, teacher, others) < before


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_units_that_others_repeat_are_not_missed(tiny_model, family):
    teacher, data = tiny_model(family), rows_for(family, count=64)
    layout, width = family_of(teacher).layout, teacher_shape(teacher).layers[0].intermediate_size
    for _, layer in layers_of(teacher):
        for name in layout.mlp_in:
            for parameter in layer.get_submodule(name).parameters():
                parameter.data[width // 2 :] = parameter.data[: width // 2]
    spec = narrower(teacher, intermediate_size=width // 2)
    student, kept = cut(teacher, spec)
    assert not torch.allclose(logits(student, data), logits(teacher, data), atol=1e-2)
    heal(student, spec, kept, TeacherStream(teacher, data), damping=1e-7)
    error = (logits(student, data) - logits(teacher, data)).std() / logits(teacher, data).std()
    assert error < 0.15  # the ridge of few tokens keeps it from nothing


@pytest.mark.parametrize("family", ["llama", "cohere2", "vit"])
def test_the_writer_before_a_dropped_layer_takes_it_over(tiny_model, family):
    teacher, data = tiny_model(family), rows_for(family, count=64)
    spec = teacher_shape(teacher).identity()
    spec = replace(spec, layers=(spec.layers[0], *spec.layers[2:])) if len(spec.layers) > 2 else replace(
        spec, layers=spec.layers[:1]
    )  # fmt: skip
    student, kept = cut(teacher, spec)
    before = residual_error(student, teacher, data)
    heal(student, spec, kept, TeacherStream(teacher, data))
    assert residual_error(student, teacher, data) < before


@pytest.mark.parametrize("family", ["llama", "bert_classifier"])
@pytest.mark.parametrize("part", [ATTENTION, MLP])
def test_a_skipped_sub_block_is_healed_around(tiny_model, family, part):
    teacher, data = tiny_model(family), rows_for(family, count=64)
    spec = teacher_shape(teacher).identity().with_layer(0, skip=frozenset({part}))
    student, kept = cut(teacher, spec)
    before = residual_error(student, teacher, data)
    heal(student, spec, kept, TeacherStream(teacher, data))
    assert residual_error(student, teacher, data) < before


def test_padding_is_not_healed_towards(tiny_model):
    teacher, data = tiny_model("llama"), rows_for("llama", count=32)
    spec = narrower(teacher, intermediate_size=48)
    students = []
    for filler in (5, 77):
        ids = torch.cat([data.inputs["input_ids"], torch.full((32, 3), filler)], 1)
        mask = torch.cat([torch.ones(32, 10), torch.zeros(32, 3)], 1).long()
        labels = torch.cat([data.labels, torch.full((32, 3), -100)], 1)
        padded = replace(data, inputs={"input_ids": ids, "attention_mask": mask}, labels=labels)
        student, kept = cut(teacher, spec)
        students.append(heal(student, spec, kept, TeacherStream(teacher, padded)))
    first, second = (s.state_dict() for s in students)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_the_stream_is_the_same_whether_it_is_kept_or_taken_again(tiny_model):
    teacher, data = tiny_model("cohere2"), rows_for("cohere2")
    kept, again = TeacherStream(teacher, data), TeacherStream(teacher, data, room=0)
    for part in (ATTENTION, MLP):
        pairs = zip(kept.after(0, 1, part), again.after(0, 1, part), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert kept._kept and not again._kept


def test_a_trimmed_vocabulary_is_refused(tiny_model):
    teacher, data = tiny_model("llama"), rows_for("llama")
    spec = replace(teacher_shape(teacher).identity(), vocabulary=tuple(range(100)))
    with pytest.raises(ConfigError, match="before trimming"):
        heal(teacher, spec, None, TeacherStream(teacher, data))


@pytest.mark.parametrize("family", ["llama", "cohere2", "vit", "bert_classifier"])
@pytest.mark.parametrize("part", [ATTENTION, MLP])
def test_a_student_that_skips_something_can_be_a_teacher(tiny_model, family, part):
    whole, data = tiny_model(family), rows_for(family, count=64)
    teacher = materialize(whole, teacher_shape(whole).identity().with_layer(1, skip=frozenset({part})))
    spec = teacher_shape(teacher).identity().with_layer(0, intermediate_size=48)
    student, kept = cut(teacher, spec)
    before = residual_error(student, teacher, data)
    heal(student, spec, kept, TeacherStream(teacher, data))
    assert residual_error(student, teacher, data) < before
