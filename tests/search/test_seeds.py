from __future__ import annotations

import itertools

import pytest

from hf_qep.search.costs import Choice
from hf_qep.search.limits import Limits
from hf_qep.search.seeds import seed_choices
from hf_qep.search.space import SearchSpace
from hf_qep.students.spec import ATTENTION, CandidateSpec
from tests.search.shapes import IMPORTANCE, count, prices, space, teacher

pytest.importorskip("scipy")

LIMITS = Limits(latency_ms=4.0, memory_mb=0.06)
HYBRID = ("sliding_attention", "full_attention", "sliding_attention")


def damage(stack, layer, form):
    """More where more goes, and where the layer matters; attention counts less."""
    if form is None:
        return IMPORTANCE[layer.source]
    lost = 0.6 if "mlp" in form.skip else 0.6 * (1 - (form.intermediate_size / 64) ** 0.5)
    lost += 0.4 if ATTENTION in form.skip else 0.4 * (1 - form.heads / 8)
    return IMPORTANCE[layer.source] * lost


def every_student(room):
    """All students without added layers."""
    forms = [(None, *room.layer_options(layer)) for layer in room.teacher.layers]
    for picked in itertools.product(*forms):
        layers = tuple(form for form in picked if form is not None)
        if len(layers) >= room.min_layers:
            yield CandidateSpec(layers, room.hidden_sizes[0])


def total(room, spec):
    kept = {layer.source: layer for layer in spec.layers}
    return sum(damage(0, layer, kept.get(layer.source)) for layer in room.teacher.layers)


@pytest.mark.parametrize("least", [1, 2])
def test_the_first_ones_are_the_best_there_are(least):
    room, cost = space(3, kv_heads=(2, 4), ffn=32, min_layers=least), prices(3)
    found = seed_choices(room, damage, cost, LIMITS, count=4)
    fitting = [s for s in every_student(room) if not LIMITS.violations(cost(Choice(s)))]
    assert [total(room, c.spec) for c in found] == pytest.approx(sorted(total(room, s) for s in fitting)[:4])
    for choice in found:
        room.params_of_choice(choice)


def test_a_peak_that_does_not_add_up_is_allowed_for():
    room, cost = space(3), prices(3)
    tight = Limits(memory_mb=cost(Choice(room.teacher.identity())).memory_mb - 0.004)
    found = seed_choices(room, damage, cost, tight, count=3)
    assert found and all(not tight.violations(cost(choice)) for choice in found)


def test_homogeneous_students_are_homogeneous():
    found = seed_choices(space(homogeneous=True), damage, prices(), LIMITS, count=6)
    assert len(found) == 6 and all(choice.spec.homogeneous for choice in found)
    assert len({choice.spec.layers[0].sizes() for choice in found}) > 1


def test_a_layer_with_full_attention_stays():
    room = SearchSpace.around(teacher(3, types=HYBRID))
    for choice in seed_choices(room, lambda s, layer, form: float(form is not None), prices(3), Limits(), count=3):
        assert any(s.source == 1 and ATTENTION not in s.skip for s in choice.spec.layers)


def test_both_stacks_of_a_detector_are_cut():
    room = SearchSpace.around(teacher(3, decoder=2), min_layers=1)
    limits = Limits(latency_ms=4)
    found = seed_choices(room, damage, prices(3), limits, count=2)
    assert found and all(choice.spec.decoder_layers for choice in found)
    assert all(not limits.violations(prices(3)(choice)) for choice in found)


def test_bits_and_vocabularies_all_get_their_best_before_any_second():
    room = space(vocabularies=(None, (1, 2, 3)), bits=(None, 1.0))
    found = seed_choices(room, damage, prices(), LIMITS, count=4)
    assert len({(choice.bits, choice.spec.vocabulary) for choice in found}) == 4


def test_nothing_where_nothing_fits():
    assert seed_choices(space(), damage, prices(), Limits(parameters=count(teacher().identity())["embeddings"])) == []
