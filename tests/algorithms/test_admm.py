"""Binary factorisation: recovery of a planted one, what a dense metric gains, monotone refits, empty weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.admm import FactoredWeight, balance, factorise, refit
from hf_qep.algorithms.moments import damped
from tests.algorithms.problems import correlated_problem, objective


def planted(out_features=24, in_features=32, rank=3):
    generator = torch.Generator().manual_seed(0)

    def signs(*shape):
        return torch.rand(*shape, generator=generator) > 0.5

    def scale(size):
        return torch.rand(size, generator=generator) + 0.5

    return FactoredWeight(
        signs(out_features, rank), signs(rank, in_features), scale(out_features), scale(rank), scale(in_features),
        torch.ones(out_features, rank), torch.ones(rank, in_features),
    )  # fmt: skip


def solve(weight, rank, metric=None, seed=0, output_metric=None):
    metric = torch.eye(weight.shape[1]) if metric is None else metric
    return factorise(
        weight, metric, rank, iterations=60, generator=torch.Generator().manual_seed(seed), output_metric=output_metric
    )


def test_a_planted_factorisation_is_found():
    weight = planted().dense()
    found = refit(solve(weight, 3), weight, torch.eye(32), rounds=10)
    assert objective(found.dense(), weight, torch.eye(32)) < 1e-3 * weight.square().sum()


def test_the_start_is_scaled_like_the_weight():
    weight, _ = correlated_problem(32, 40)
    for size in (1e-3, 1.0, 1e3):
        left = (
            objective(solve(size * weight, 16).dense(), size * weight, torch.eye(40)) / (size * weight).square().sum()
        )
        assert left < 0.7, f"{size=} {left=}"


def test_important_columns_are_kept_better():
    weight, _ = correlated_problem(24, 32)
    importance = torch.ones(32)
    importance[:8] = 100
    plain, weighted = solve(weight, 8).dense(), solve(weight, 8, torch.diag(importance)).dense()
    assert (weighted - weight)[:, :8].norm() < 0.8 * (plain - weight)[:, :8].norm()


def test_refits_never_raise_the_objective_and_leave_no_negative_scale():
    weight, hessian = correlated_problem(20, 28)
    hessian = damped(hessian, 0.03)
    start = solve(weight, 12, hessian)
    errors = [objective(refit(start, weight, hessian, rounds=r).dense(), weight, hessian) for r in range(5)]
    assert errors[1] < errors[0] and all(b <= a * (1 + 1e-4) for a, b in zip(errors, errors[1:], strict=False)), errors
    found = refit(start, weight, hessian, rounds=2)
    assert all((s >= 0).all() for s in (found.row_scale, found.middle_scale, found.column_scale))


def test_balancing_keeps_the_weight():
    found = planted()
    found.row_scale *= 1e-5
    torch.testing.assert_close(balance(found).dense(), found.dense())


def test_a_weight_of_zeros_stays_zero():
    weight = torch.zeros(6, 10)
    found = balance(refit(solve(weight, 4), weight, torch.eye(10), rounds=2))
    assert not found.dense().any() and torch.isfinite(found.column_scale).all()


def two_sided(found, weight, hessian, output_metric):
    difference = found.dense().double() - weight.double()
    return ((output_metric.double() @ difference @ hessian.double()) * difference).sum().item()


def test_the_dense_metric_beats_its_diagonal():
    weight, hessian = correlated_problem(48, 64)
    hessian = damped(hessian, 0.03)
    diagonal, dense = (
        objective(refit(solve(weight, 24, metric), weight, hessian, rounds=3).dense(), weight, hessian)
        for metric in (torch.diag(hessian.diagonal()), hessian)
    )
    assert dense < 0.8 * diagonal


def test_the_output_metric_is_what_is_minimised():
    weight, hessian = correlated_problem(40, 48)
    hessian, output_metric = damped(hessian, 0.03), damped(correlated_problem(1, 40, seed=3)[1], 0.03)
    left_out, given_one = (
        refit(solve(weight, 20, hessian, output_metric=metric), weight, hessian, rounds=3, output_metric=output_metric)
        for metric in (None, output_metric)
    )
    assert two_sided(given_one, weight, hessian, output_metric) < 0.9 * two_sided(
        left_out, weight, hessian, output_metric
    )


def test_an_output_metric_of_ones_changes_nothing_but_the_rounding_of_inexact_steps():
    weight, hessian = correlated_problem(32, 48)
    hessian = damped(hessian, 0.03)
    without, identity = (
        objective(solve(weight, 16, hessian, output_metric=metric).dense(), weight, hessian)
        for metric in (None, torch.eye(32))
    )
    assert identity == pytest.approx(without, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    rank=st.integers(1, 20),
    seed=st.integers(0, 999),
    sided=st.booleans(),
    dead=st.booleans(),
)
def test_any_shape_and_rank_is_solved_and_refits_never_raise_the_objective(shape, rank, seed, sided, dead):
    weight, hessian = correlated_problem(*shape, seed=seed)
    hessian = damped(hessian, 0.03)
    output_metric = damped(correlated_problem(1, shape[0], seed=seed + 1)[1], 0.03) if sided else None
    if dead:
        weight[0] = 0
    start = solve(weight, rank, hessian, seed, output_metric)
    metric = torch.eye(shape[0]) if output_metric is None else output_metric
    errors = [
        two_sided(refit(start, weight, hessian, rounds=r, output_metric=output_metric), weight, hessian, metric)
        for r in range(4)
    ]
    nothing = (metric.double() @ weight.double() @ hessian.double() * weight).sum().item()
    assert all(b <= a * (1 + 1e-3) + 1e-5 * nothing for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[1] <= nothing * (1 + 1e-3)
