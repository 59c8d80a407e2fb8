from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.errors import ConfigError
from hf_qep.search.costs import Choice
from hf_qep.search.space import SearchSpace
from hf_qep.students.spec import CandidateSpec, LayerSpec, TeacherShape, check_against
from tests.search.shapes import space, teacher

optuna = pytest.importorskip("optuna")

HYBRID = ("sliding_attention", "full_attention", "sliding_attention", "sliding_attention")
UNEVEN = TeacherShape("llama", (LayerSpec(0, 4, 2, 64), LayerSpec(1, 2, 1, 48)), 32, 4, 100)
SPACES = {
    "plain": space(max_added=2, hidden_sizes=(16, 32), vocabularies=(None, (1, 5, 9)), min_layers=2),
    "homogeneous": space(homogeneous=True, max_added=1),
    "hybrid": SearchSpace.around(teacher(types=HYBRID)),
    "detector": SearchSpace.around(teacher(decoder=3), ffn=24, min_layers=2),
    "uneven": SearchSpace.around(UNEVEN, ffn=16, max_added=1, q_per_kv=(1, 2)),
    "classifier": space(head="classifier", num_labels=3, q_per_kv=(1, 2), bits=(None, 1.1)),
}
spaces = pytest.mark.parametrize("room", SPACES.values(), ids=SPACES)
seeds = st.integers(0, 10**6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@spaces
@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_a_student_comes_back_from_its_parameters_and_can_be_cut(room, seed):
    spec = room.random(generator(seed))
    check_against(spec, room.teacher)
    assert room.suggest(optuna.trial.FixedTrial(room.params_of(spec))) == spec
    assert room.random(generator(seed)) == spec


@spaces
def test_what_a_sampler_proposes_is_always_a_student_of_the_space(room):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        choice = room.suggest_choice(trial)
        assert set(trial.params) == {*room.domains(), "bits"}
        check_against(choice.spec, room.teacher)
        fixed = optuna.trial.FixedTrial(room.params_of_choice(choice))
        assert room.suggest_choice(fixed) == choice
        kept = [layer for layer in choice.spec.layers if not layer.added]
        assert len(kept) >= room.min_layers
        assert choice.spec.head == room.head
        if room.homogeneous:
            assert choice.spec.homogeneous
        if room.teacher.layer_types:
            assert any(HYBRID[s.source] == "full_attention" and "attention" not in s.skip for s in kept)


@spaces
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_a_mutation_is_another_student_of_the_space(room, seed):
    draw = generator(seed)
    spec = room.random(draw)
    changed = room.mutate(spec, draw)
    assert changed != spec
    room.params_of(changed)


def test_a_space_with_one_student_has_no_other():
    only = SearchSpace(teacher(1), (32,), (4,), (2,), (64,), skip=False)
    assert only.mutate(only.teacher.identity(), generator(0)) == only.teacher.identity()


@spaces
def test_a_space_comes_back_from_json(room):
    again = SearchSpace.from_dict(json.loads(json.dumps(room.to_dict())))
    assert again == room


def test_the_teacher_itself_is_in_the_space_around_it():
    assert space().params_of(teacher().identity())["layer3.keep"] is True


def test_added_layers_lie_behind_what_stays_before_them():
    room = space(max_added=2)
    params = room.params_of(teacher().identity()) | {"layer1.keep": False}
    params |= {"added0.kind": "copy_zero", "added0.after": 2, "added0.source": 3}
    params |= {"added1.kind": "new_zero", "added1.after": 0, "added1.source": 1, "added1.intermediate_size": 16}
    layers = room.decode(params).layers
    assert [(s.source, s.kind) for s in layers] == [
        (1, "new_zero"), (0, "keep"), (3, "copy_zero"), (2, "keep"), (3, "keep"),
    ]  # fmt: skip
    assert layers[0].intermediate_size == 16


def test_too_few_layers_bring_back_the_first_ones():
    room = space(min_layers=3)
    params = room.params_of(teacher().identity()) | {f"layer{n}.keep": n == 3 for n in range(4)}
    assert [s.source for s in room.decode(params).layers] == [0, 1, 3]


@pytest.mark.parametrize(
    "spec",
    [
        CandidateSpec((LayerSpec(0, 4, 2, 63),), 32),
        CandidateSpec((LayerSpec(0, 4, 2, 64),), 31),
        CandidateSpec((LayerSpec(9, 4, 2, 64),), 32),
        CandidateSpec((LayerSpec(0, 4, 2, 64), LayerSpec(0, 4, 2, 64, "copy_zero")), 32),
        CandidateSpec((LayerSpec(0, 4, 2, 64),), 32, vocabulary=(1, 2)),
        CandidateSpec((LayerSpec(0, 4, 2, 64),), 32, head="none"),
    ],
)
def test_a_student_outside_the_space_is_refused(spec):
    with pytest.raises(ConfigError, match="not in this search space"):
        space().params_of(spec)


def test_bits_outside_the_space_are_refused():
    with pytest.raises(ConfigError, match="bits are not in this search space"):
        space().params_of_choice(Choice(teacher().identity(), 2.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_sizes": (64,)}, "more than the teacher's 32"),
        ({"min_layers": 5}, "min_layers must be from 1 to 4"),
        ({"homogeneous": True, "skip": True}, "skip nothing"),
        ({"homogeneous": True, "ffn": (128,)}, "cannot be shared"),
        ({"ffn": 0}, "step between widths"),
        ({"kv_heads": (0, 2)}, "at least 1"),
        ({"bits": ()}, "at least one value"),
    ],
)
def test_an_impossible_space_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        space(**options)


def test_the_forms_of_a_layer_are_each_there_once():
    room = SPACES["uneven"]
    options = room.layer_options(UNEVEN.layers[1])
    assert len(options) == len(set(options)) == 2 * 1 * 3 * 3
    assert max(layer.intermediate_size for layer in options) == 48
