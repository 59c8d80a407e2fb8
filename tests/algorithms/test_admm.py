"""Binary factorisation: recovery of a planted one, monotone refits, empty weights."""

import torch

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


def solve(weight, rank, importance=None, seed=0):
    importance = torch.ones(weight.shape[1]) if importance is None else importance
    return factorise(weight, importance, rank, iterations=60, generator=torch.Generator().manual_seed(seed))


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
    plain, weighted = solve(weight, 8).dense(), solve(weight, 8, importance).dense()
    assert (weighted - weight)[:, :8].norm() < 0.8 * (plain - weight)[:, :8].norm()


def test_refits_never_raise_the_objective_and_leave_no_negative_scale():
    weight, hessian = correlated_problem(20, 28)
    hessian = damped(hessian, 0.03)
    start = solve(weight, 12, hessian.diagonal())
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
