from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_qep.algorithms import allocation
from hf_qep.algorithms.allocation import interpolate, spend

option = st.tuples(st.integers(1, 60), st.floats(0, 10))
items = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5)
budgets = st.integers(0, 300)


def totals(options, chosen):
    picked = [item[k] for item, k in zip(options, chosen, strict=True)]
    return sum(bits for bits, _ in picked), sum(error for _, error in picked)


def least(options):
    return sum(min(bits for bits, _ in item) for item in options)


@given(items, budgets)
@settings(max_examples=60, deadline=None)
def test_never_exceeds_the_budget_and_finds_the_least_error_there_is(options, room):
    budget = least(options) + room
    bits, error = totals(options, spend(options, budget))
    assert bits <= budget
    every = (totals(options, chosen) for chosen in itertools.product(*map(range, map(len, options))))
    assert error == pytest.approx(min(found for spent, found in every if spent <= budget))


@given(items, budgets, st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_more_budget_is_never_worse(options, room, more):
    budget = least(options) + room
    before, after = (totals(options, spend(options, b))[1] for b in (budget, budget + more))
    assert after <= before + 1e-9


curves = st.lists(
    st.tuples(st.integers(3, 40), st.floats(0.1, 10), st.integers(2, 30)), min_size=1, max_size=5
)  # step, weight, options


@given(curves, st.floats(0, 1), st.sampled_from([8, 64, 1 << 16]))
@settings(max_examples=60, deadline=None)
def test_what_is_left_over_buys_no_further_step(curves, share, units):
    options = [[(step * k, weight / k) for k in range(1, count + 1)] for step, weight, count in curves]
    most = sum(item[-1][0] for item in options)
    budget = least(options) + int(share * (most - least(options)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MOST_UNITS", units)
        chosen = spend(options, budget)
    bits, _ = totals(options, chosen)
    assert bits <= budget
    open_steps = [step for (step, _, count), k in zip(curves, chosen, strict=True) if k + 1 < count]
    assert not open_steps or budget - bits < min(open_steps)


def test_a_budget_in_coarse_steps_stays_near_the_exact_answer(monkeypatch):
    options = [[(7 * k + i, (1 + i) / k) for k in range(1, 40)] for i in range(12)]
    budget = 2 * least(options)
    exact = totals(options, spend(options, budget))[1]
    monkeypatch.setattr(allocation, "MOST_UNITS", 200)
    assert exact <= totals(options, spend(options, budget))[1] < 1.05 * exact


def test_a_budget_below_the_cheapest_options_is_refused():
    with pytest.raises(ValueError, match="take 30 bits, the budget is 29"):
        spend([[(10, 1.0), (20, 0.5)], [(20, 1.0)]], 29)


def test_more_than_the_dearest_options_is_not_spent():
    assert spend([[(10, 1.0), (20, 0.5)], [(20, 1.0)]], 10**15) == [1, 0]


@given(st.floats(0.2, 3), st.floats(0.01, 100), st.floats(0.5, 500))
def test_a_power_law_is_met_between_and_beyond_its_points(power, factor, x):
    points = {at: factor * at**-power for at in (8, 16, 64)}
    assert interpolate(points, x) == pytest.approx(factor * x**-power)


@given(st.dictionaries(st.integers(1, 100), st.floats(1e-6, 10), min_size=1, max_size=5))
@example({17: 2.0, 18: 1e-6})  # so steep that its continuation to 1 is no float any more
def test_a_measured_curve_never_rises(points):
    values = [interpolate(points, x) for x in range(1, 130)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(values))
    assert all(math.isfinite(value) and value >= 0 for value in values)
