"""Annealed signs: against enumeration, against their start, against themselves in other chunks and with more copies."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.annealing import Schedule, _Rows, quasi_quantum_annealing
from hf_qep.algorithms.moments import damped
from hf_qep.algorithms.signs import SignWeight, descend
from hf_qep.methods import qqa, sign
from hf_qep.methods.problem import LayerProblem
from tests.algorithms.problems import correlated_problem, objective

SHORT = Schedule(steps=40)
COPIES = Schedule(steps=40, replicas=4, warmth=0.5, temperature=1e-3, diversity=0.01)


def problem(out_features, in_features, seed=0):
    """In float64, so that other chunks round alike."""
    weight, hessian = correlated_problem(out_features, in_features, seed=seed)
    return weight.double(), damped(hessian, 0.01).double()


def nearest(weight, groups=1):
    scale = weight.abs().unflatten(1, (groups, -1)).mean(2)
    return SignWeight(weight >= 0, scale, torch.ones_like(weight[0]))


def anneal(start, weight, hessian, schedule=SHORT, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return quasi_quantum_annealing(start, weight, hessian, generator=generator, schedule=schedule, **options)


def row_errors(signs, start, weight, hessian):
    difference = torch.where(signs, 1.0, -1.0) * start.spread_rows() * start.column_scale - weight
    return ((difference @ hessian) * difference).sum(-1)


def annealed_signs(start, weight, hessian, schedule, seed=0):
    """Before they are polished."""
    size = (start.spread_rows() * start.column_scale).expand_as(weight)
    return _Rows(weight, size, hessian).anneal(start.signs, schedule, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_copies_that_drive_each_other_apart_reach_the_optimum_of_every_row(seed):
    weight, hessian = problem(64, 9, seed)
    start = nearest(weight)
    codes = torch.tensor(list(itertools.product([False, True], repeat=9)))
    best = row_errors(codes.unsqueeze(1), start, weight, hessian).min(0).values

    def optimal_rows(signs):
        errors = row_errors(signs, start, weight, hessian)
        assert (errors >= best * (1 - 1e-9)).all()
        return (errors <= best * (1 + 1e-9)).sum().item()

    many = Schedule(steps=400, gamma=(0.0, 1.0), warmth=0.0, replicas=32)
    apart = optimal_rows(annealed_signs(start, weight, hessian, replace(many, diversity=0.01)))
    alone = optimal_rows(annealed_signs(start, weight, hessian, many))
    one = optimal_rows(annealed_signs(start, weight, hessian, Schedule()))
    flips = optimal_rows(descend(start, weight, hessian, sweeps=20, refit_columns=False).signs)
    assert apart == 64 > alone > one > flips


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.sampled_from([1, 2, 4]),
    refit=st.booleans(),
    schedule=st.builds(
        Schedule,
        steps=st.integers(0, 30),
        rate=st.sampled_from([0.01, 0.2, 5.0]),
        gamma=st.sampled_from([(0.0, 0.7), (-2.0, 0.1), (3.0, 0.0)]),
        power=st.sampled_from([2, 4]),
        warmth=st.sampled_from([0.0, 0.5, 1.0]),
        temperature=st.sampled_from([0.0, 1.0]),
        replicas=st.integers(1, 3),
        diversity=st.sampled_from([0.0, 0.5]),
    ),
)
def test_no_schedule_ends_above_its_start_whatever_it_does(seed, groups, refit, schedule):
    weight, hessian = problem(5, 24, seed)
    start = descend(nearest(weight, groups), weight, hessian, sweeps=2, refit_columns=refit)
    before = start.dense().clone()
    found = anneal(start, weight, hessian, schedule, seed, refit_columns=refit)
    assert torch.equal(start.dense(), before)
    assert objective(found.dense(), weight, hessian) <= objective(before, weight, hessian) * (1 + 1e-5)
    signs = annealed_signs(start, weight, hessian, schedule, seed)
    first = row_errors(start.signs, start, weight, hessian)
    assert (row_errors(signs, start, weight, hessian) <= first * (1 + 1e-9)).all()


def test_annealing_goes_on_where_no_flip_helps_any_more():
    weight, hessian = problem(32, 64)
    start = descend(nearest(weight), weight, hessian, sweeps=40)
    further = descend(start, weight, hessian, sweeps=40)
    found = anneal(start, weight, hessian, Schedule())
    assert objective(found.dense(), weight, hessian) < 0.93 * objective(further.dense(), weight, hessian)


@pytest.mark.parametrize("schedule", [SHORT, COPIES], ids=["one copy", "four copies with noise"])
@pytest.mark.parametrize("chunk", [1, 300, 4096])
def test_rows_do_not_depend_on_the_chunk_they_are_in(schedule, chunk):
    weight, hessian = problem(13, 40)
    whole = anneal(nearest(weight), weight, hessian, schedule)
    assert torch.equal(anneal(nearest(weight), weight, hessian, schedule, chunk=chunk).signs, whole.signs)


def test_the_generator_decides_and_without_noise_nothing_does():
    weight, hessian = problem(16, 48)
    start = nearest(weight)
    first, again, other = (annealed_signs(start, weight, hessian, COPIES, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    calm = [annealed_signs(start, weight, hessian, SHORT, seed) for seed in (1, 2)]
    assert torch.equal(*calm)


def test_the_gradient_is_that_of_the_objective():
    weight, hessian = problem(6, 12)
    start, schedule = nearest(weight, 3), Schedule(power=4, replicas=3, diversity=0.2)
    size = start.spread_rows() * start.column_scale
    rows = _Rows(weight, size, hessian)
    spins = (
        2 * torch.rand(3, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    ).requires_grad_()
    own = size.square() * hessian.diagonal()
    unit = own.mean(1)
    penalty = (own * (1 - spins**4)).sum(2)
    energy = (rows.error(spins) + 0.7 * penalty) / unit
    loss = 0.8 * energy.mean(0).sum() - 0.2 * 3 * spins.std(0).sum()
    expected = 3 * torch.autograd.grad(loss, spins)[0]
    torch.testing.assert_close(rows.gradient(spins.detach(), 0.7, schedule), expected)


def test_at_gamma_one_no_single_spin_has_curvature_left():
    weight, hessian = problem(4, 10)
    start, spins = nearest(weight, 2), torch.zeros(1, 4, 10, dtype=torch.float64)
    rows = _Rows(weight, (start.spread_rows() * start.column_scale).expand_as(weight), hessian)
    schedule = Schedule()
    for column in range(10):
        moved = spins.clone()
        moved[..., column] = 0.6
        change = rows.gradient(moved, 1.0, schedule) - rows.gradient(spins, 1.0, schedule)
        assert change[..., column].abs().max() < 1e-9 < change.abs().max()


def test_diversity_drives_copies_apart_and_its_absence_lets_them_agree():
    weight, hessian = problem(16, 32)
    start = nearest(weight)
    rows = _Rows(weight, (start.spread_rows() * start.column_scale).expand_as(weight), hessian)
    spins = 0.1 * torch.randn(4, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = spins - spins.mean(0)
    plain, pushed = (
        rows.gradient(spins, 0.0, Schedule(replicas=4, diversity=diversity)) / (1 - diversity)
        for diversity in (0.0, 0.3)
    )
    # Against the gradient means away from the mean of the copies, in every spin; the mean itself is not moved.
    assert (((plain - pushed) * apart) > 0).all()
    torch.testing.assert_close(pushed.mean(0), plain.mean(0))


def test_zero_rows_and_columns_stay_finite_and_keep_their_signs():
    weight, hessian = correlated_problem(6, 32, seed=8)
    weight[2], weight[:, 5] = 0, 0
    hessian[7], hessian[:, 7] = 0, 0
    found = anneal(nearest(weight, 2), weight, damped(hessian, 0.01))
    assert torch.isfinite(found.dense()).all() and not found.dense()[2].any()
    nothing = anneal(nearest(weight * 0), weight * 0, damped(hessian * 0, 0.01))
    assert not nothing.dense().any() and nothing.signs.all()


@pytest.mark.parametrize("column_scale", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
def test_the_method_improves_on_sign_in_the_same_format(group_size, column_scale):
    weight, hessian = correlated_problem(40, 64, seed=1)
    spec = qqa.spec(1.0, group_size, 40, 64)
    assert spec == sign.spec(1.0, group_size, 40, 64)
    spec = type(spec)(group_size=group_size, column_scale=column_scale)
    errors = {}
    for method in (sign, qqa):
        parts = method.solve(LayerProblem(weight, hessian, spec, 0.01, torch.Generator().manual_seed(0)))
        assert set(parts) == {"signs", "row_scale"} | ({"column_scale"} if column_scale else set())
        dense = SignWeight(parts["signs"], parts["row_scale"], parts.get("column_scale", torch.ones(64))).dense()
        errors[method] = objective(dense, weight, damped(hessian, 0.01))
    assert errors[qqa] < 0.95 * errors[sign]
