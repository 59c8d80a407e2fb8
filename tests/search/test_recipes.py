"""The usual recipes as first guesses."""

from __future__ import annotations

from hf_qep.search.limits import Limits
from hf_qep.search.recipes import by_influence, recipes
from hf_qep.search.space import SearchSpace
from tests.search.shapes import prices, teacher

INFLUENCE = [0.9, 0.1, 0.4, 0.2]


def test_without_limits_every_depth_keeps_its_width_and_its_most_influential_layers():
    space = SearchSpace.around(teacher())
    found = recipes(space, INFLUENCE, prices(), Limits())
    kept = [[layer.source for layer in choice.spec.layers] for choice in found]
    assert kept == [[0, 1, 2, 3], [0, 2, 3], [0, 2], [0]]
    assert all(layer in space.teacher.layers for choice in found for layer in choice.spec.layers)


def test_under_a_limit_deeper_students_are_narrower_and_all_are_as_wide_as_they_can_be():
    space, cost = SearchSpace.around(teacher()), prices()
    most = cost(recipes(space, INFLUENCE, cost, Limits())[2]).parameters
    found = recipes(space, INFLUENCE, cost, Limits(parameters=most))
    assert all(cost(choice).parameters <= most for choice in found)
    widths = {}
    for choice in found:
        widths.setdefault(len(choice.spec.layers), []).append(choice.spec.layers[0].intermediate_size)
    assert max(widths[4]) < max(widths[2]) == space.teacher.layers[0].intermediate_size
    for choice in found:
        assert space.decode(space.params_of(choice.spec)) == choice.spec


def test_a_layer_with_full_attention_stays():
    types = ("sliding_attention", "sliding_attention", "sliding_attention", "full_attention")
    assert by_influence(SearchSpace.around(teacher(types=types)), INFLUENCE, 2) == [0, 3]
