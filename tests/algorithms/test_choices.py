from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.choices import choose


@st.composite
def problems(draw, *, even=False):
    """(scores, resources, limits, lower limits) with numbers that sums represent exactly."""
    items = draw(st.integers(1, 4))
    sizes = [draw(st.integers(1, 4))] * items if even else [draw(st.integers(1, 4)) for _ in range(items)]

    def table():
        return [[draw(st.integers(-40, 40)) / 4 for _ in range(size)] for size in sizes]

    resources = {"ms": table(), "mb": table()}
    limits = {"ms": draw(st.integers(-80, 120)) / 4, "mb": draw(st.integers(-80, 120)) / 4}
    lower = {"mb": draw(st.integers(-160, 0)) / 4} if draw(st.booleans()) else {}
    return table(), resources, limits, lower


def total(table, selection):
    return sum(item[option] for item, option in zip(table, selection, strict=True))


def allowed(problem, uniform=()):
    """Every selection that meets the limits, with its score, best first."""
    scores, resources, limits, lower = problem
    found = []
    for selection in itertools.product(*(range(len(item)) for item in scores)):
        used = {name: total(table, selection) for name, table in resources.items()}
        if any(used[n] > most for n, most in limits.items()) or any(used[n] < least for n, least in lower.items()):
            continue
        if all(len({selection[i] for i in group}) == 1 for group in uniform):
            found.append((total(scores, selection), selection))
    return sorted(found)


def check_k_best(problem, count, uniform=()):
    scores, resources, limits, lower = problem
    found = choose(scores, resources, limits, lower_limits=lower, uniform=uniform, count=count)
    best = allowed(problem, uniform)[:count]
    assert [total(scores, s) for s in found] == pytest.approx([score for score, _ in best])
    assert len({tuple(s) for s in found}) == len(found)
    assert {tuple(s) for s in found} <= {s for _, s in allowed(problem, uniform)}


@given(problems(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_best_ones_are_those_of_an_exhaustive_search(problem, count):
    check_k_best(problem, count)


@given(problems(even=True), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_uniform_items_take_the_same_option_and_lose_nothing_else(problem, count):
    check_k_best(problem, count, uniform=[range(min(2, len(problem[0])))])


@given(problems(), st.integers(2, 3))
@settings(max_examples=40, deadline=None)
def test_each_further_selection_is_the_best_that_is_far_enough_from_those_before(problem, distance):
    scores, resources, limits, lower = problem
    found = choose(scores, resources, limits, lower_limits=lower, count=4, distance=distance)
    for k, selection in enumerate(found):
        far = [
            score
            for score, other in allowed(problem)
            if all(sum(a != b for a, b in zip(other, earlier, strict=True)) >= distance for earlier in found[:k])
        ]
        assert total(scores, selection) == pytest.approx(far[0])


def test_no_selection_where_the_limits_cannot_be_met():
    assert choose([[1, 2]], {"ms": [[5, 6]]}, {"ms": 4}) == []


def test_an_infinite_score_forbids_an_option():
    assert choose([[math.inf, 3], [1, math.inf]], count=5) == [[1, 0]]


def test_quantities_of_very_different_size_keep_their_limits():
    scores = [[0.0, 1.0]] * 3
    resources = {"bytes": [[3e9 + 1, 1e9]] * 3, "ms": [[1e-3, 2e-3]] * 3}
    found = choose(scores, resources, {"bytes": 7e9 + 1, "ms": 5e-3})
    assert sorted(found[0]) == [0, 1, 1]
    assert choose(scores, resources, {"bytes": 7e9 + 1, "ms": 4e-3}) == []


def test_a_limit_missed_by_less_than_the_solver_sees_is_still_missed():
    assert choose([[0.0, 1.0]], {"ms": [[1.0 + 1e-7, 0.5]]}, {"ms": 1.0}) == [[1]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"limits": {"ms": 1}}, "no table"),
        ({"resources": {"ms": [[1], [2]]}, "limits": {"ms": 1}}, "items and options"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose([[1, 2]], **arguments)
