"""Flips and refits: against enumeration, against the objective, against themselves with other blocks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.moments import damped
from hf_qep.algorithms.signs import SignWeight, absorb_signs, balance, descend
from tests.algorithms.problems import correlated_problem, objective, plus_minus


def nearest(weight, groups=1):
    scale = weight.abs().unflatten(1, (groups, -1)).mean(2)
    return SignWeight(weight >= 0, scale, torch.ones(weight.shape[1]))


def flip_gains(found, weight, hessian):
    """Change of the objective by each single flip, in float64."""
    t, H = found.dense().double(), hessian.double()
    x = (weight.double() - t) @ H + t * H.diagonal()
    return 4 * t * x


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.sampled_from([1, 2, 4]), refit=st.booleans())
def test_no_sweep_raises_the_objective(seed, groups, refit):
    weight, hessian = correlated_problem(6, 40, seed=seed)
    hessian = damped(hessian, 0.01)
    state, errors = nearest(weight, groups), []
    for _ in range(4):
        errors.append(objective(state.dense(), weight, hessian))
        state = descend(state, weight, hessian, sweeps=1, refit_columns=refit)
    assert all(b <= a * (1 + 1e-4) for a, b in zip(errors, errors[1:], strict=False)), errors


def test_descent_ends_where_no_single_flip_helps():
    weight, hessian = correlated_problem(12, 50, seed=5)
    hessian = damped(hessian, 0.01)
    found = descend(nearest(weight), weight, hessian, sweeps=60, refit_columns=False)
    gains = flip_gains(found, weight, hessian)
    assert gains.min() > -1e-3 * objective(found.dense(), weight, hessian)


@pytest.mark.parametrize("seed", range(3))
def test_flips_reach_most_of_the_gain_of_enumeration(seed):
    weight, hessian = correlated_problem(16, 9, seed=seed)
    start = nearest(weight)
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)))
    candidates = start.row_scale.unsqueeze(1) * codes
    difference = candidates - weight.unsqueeze(1)
    best = ((difference @ hessian) * difference).sum(2).min(1).values.sum().item()
    before = objective(start.dense(), weight, hessian)
    after = objective(descend(start, weight, hessian, sweeps=20, refit_columns=False).dense(), weight, hessian)
    assert best * (1 - 1e-4) <= after
    assert before - after > 0.8 * (before - best), f"{before=:.3f} {after=:.3f} {best=:.3f}"


@pytest.mark.parametrize("block", [16, 48, 256])
def test_lazy_blocks_change_no_flip(block):
    weight, hessian = correlated_problem(8, 77, seed=4)
    hessian = damped(hessian, 0.05)
    first = descend(nearest(weight), weight, hessian, sweeps=1, refit_columns=False, block=16)
    other = descend(nearest(weight), weight, hessian, sweeps=1, refit_columns=False, block=block)
    assert torch.equal(first.signs, other.signs)


def test_kept_columns_stay_and_refitted_scales_are_not_negative():
    weight, hessian = correlated_problem(8, 32, seed=6)
    hessian = damped(hessian, 0.01)
    kept = descend(nearest(weight, 2), weight, hessian, sweeps=2, refit_columns=False)
    assert torch.equal(kept.column_scale, torch.ones(32))
    refitted = descend(nearest(weight, 2), weight, hessian, sweeps=2)
    assert (refitted.column_scale >= 0).all() and (refitted.row_scale >= 0).all()


def test_the_scales_returned_are_those_of_the_weight_that_was_optimised():
    weight, hessian = correlated_problem(8, 32, seed=7)
    hessian = damped(hessian, 0.01)
    found = descend(nearest(weight, 4), weight, hessian, sweeps=3)
    again = descend(found, weight, hessian, sweeps=1)
    assert objective(again.dense(), weight, hessian) <= objective(found.dense(), weight, hessian) * (1 + 1e-4)
    assert objective(found.dense(), weight, hessian) < objective(nearest(weight, 4).dense(), weight, hessian) / 2


def test_zero_rows_columns_and_weights_stay_finite():
    weight, hessian = correlated_problem(6, 32, seed=8)
    weight[2], weight[:, 5] = 0, 0
    hessian[7], hessian[:, 7] = 0, 0
    found = descend(nearest(weight, 2), weight, damped(hessian, 0.01), sweeps=3)
    assert torch.isfinite(found.dense()).all() and not found.dense()[2].any()
    nothing = descend(nearest(weight * 0), weight * 0, damped(hessian * 0, 0.01), sweeps=1)
    assert not nothing.dense().any()


def test_absorbing_signs_and_balancing_keep_the_weight():
    generator = torch.Generator().manual_seed(0)
    signs = torch.rand(5, 8, generator=generator) > 0.5
    row, column = torch.randn(5, 2, generator=generator) * 1e-4, torch.randn(8, generator=generator)
    expected = row.repeat_interleave(4, 1) * column * plus_minus(signs)
    absorbed = absorb_signs(signs, row, column)
    torch.testing.assert_close(absorbed.dense(), expected)
    balanced = balance(absorbed)
    torch.testing.assert_close(balanced.dense(), expected)
    means = [s.log().mean().item() for s in (balanced.row_scale, balanced.column_scale)]
    assert means[0] == pytest.approx(means[1], abs=1e-4)
