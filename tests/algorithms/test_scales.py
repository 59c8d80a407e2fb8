"""Exact refits against gradients in float64, and the scales of plain rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms import scales, svid
from hf_qep.algorithms.rtn import group_means
from tests.algorithms.problems import correlated_problem, objective, plus_minus


def gradient_share(build, free, weight, hessian, output_metric=None):
    """Gradient of the objective with respect to `free` at the answer, relative to the gradient at zero."""
    output_metric = torch.eye(len(weight)) if output_metric is None else output_metric

    def gradient(at):
        at = at.double().requires_grad_()
        difference = build(at) - weight.double()
        ((output_metric.double() @ difference @ hessian.double()) * difference).sum().backward()
        return at.grad.norm()

    return (gradient(free.clone()) / gradient(torch.zeros_like(free))).item()


@pytest.mark.parametrize("group_size", [None, 8, 4])
def test_row_scales_are_a_stationary_point(group_size):
    weight, hessian = correlated_problem(6, 16)
    direction = plus_minus(weight >= 0) * torch.rand(16)
    found = scales.row_scales(weight, direction, hessian, group_size)

    def build(a):
        return a.repeat_interleave(16 // a.shape[1], 1) * direction.double()

    assert gradient_share(build, found, weight, hessian) < 1e-3


def test_row_scales_do_not_depend_on_the_chunk(monkeypatch):
    weight, hessian = correlated_problem(10, 16)
    direction = plus_minus(weight >= 0)
    whole = scales.row_scales(weight, direction, hessian, 4)
    monkeypatch.setattr(scales, "ROW_CHUNK", 3)
    torch.testing.assert_close(scales.row_scales(weight, direction, hessian, 4), whole)


def test_column_scale_is_a_stationary_point():
    weight, hessian = correlated_problem(6, 16)
    direction = plus_minus(weight >= 0) * torch.rand(6, 1)
    found = scales.column_scale(weight, direction, hessian)
    assert gradient_share(lambda b: direction.double() * b, found, weight, hessian) < 1e-3


def test_middle_scale_is_a_stationary_point():
    weight, hessian = correlated_problem(9, 16)
    left, right = torch.randn(9, 5), torch.randn(5, 16)
    found = scales.middle_scale(weight, left, right, hessian)
    assert gradient_share(lambda m: (left.double() * m) @ right.double(), found, weight, hessian) < 1e-3


def test_scales_in_a_two_sided_metric_are_stationary_points():
    weight, hessian = correlated_problem(9, 16)
    _, output_metric = correlated_problem(1, 9, seed=1)
    left, right = torch.randn(9, 5), torch.randn(5, 16)
    direction = plus_minus(weight >= 0) * torch.rand(9, 1)
    found = scales.column_scale(weight, direction, hessian, output_metric)
    assert gradient_share(lambda b: direction.double() * b, found, weight, hessian, output_metric) < 1e-3
    found = scales.coupled_row_scale(weight, direction, hessian, output_metric)
    assert gradient_share(lambda a: a[:, None] * direction.double(), found, weight, hessian, output_metric) < 1e-3
    found = scales.middle_scale(weight, left, right, hessian, output_metric)
    assert gradient_share(lambda m: (left.double() * m) @ right.double(), found, weight, hessian, output_metric) < 1e-3


def test_a_diagonal_output_metric_leaves_row_scales_alone():
    weight, hessian = correlated_problem(6, 12)
    direction = plus_minus(weight >= 0)
    found = scales.coupled_row_scale(weight, direction, hessian, torch.diag(torch.rand(6) + 0.1))
    torch.testing.assert_close(found, scales.row_scales(weight, direction, hessian).squeeze(1), rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), group_size=st.sampled_from([None, 3, 6]))
def test_alternating_refits_never_raise_the_objective(seed, group_size):
    weight, hessian = correlated_problem(5, 12, seed=seed)
    signs = plus_minus(weight >= 0)
    column = torch.ones(12)
    errors = []
    for _ in range(4):
        row = scales.row_scales(weight, signs * column, hessian, group_size)
        spread = row.repeat_interleave(12 // row.shape[1], 1)
        errors.append(objective(spread * signs * column, weight, hessian))
        column = scales.column_scale(weight, spread * signs, hessian)
        errors.append(objective(spread * signs * column, weight, hessian))
    assert all(b <= a * (1 + 1e-4) + 1e-6 for a, b in zip(errors, errors[1:], strict=False)), errors


def test_a_row_or_group_of_zeros_gets_scale_zero():
    weight, hessian = correlated_problem(4, 8)
    weight[1] = 0
    for group_size in (None, 4):
        row = scales.row_scales(weight, torch.ones(4, 8), hessian, group_size)
        assert torch.isfinite(row).all() and not row[1].any() and row[0].any()
    nothing = scales.row_scales(weight, torch.zeros(4, 8), hessian, 4)
    assert not nothing.any()


def test_weighted_error_is_the_mean_squared_output_error():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    weight, other = torch.randn(3, 8), torch.randn(3, 8)
    found = scales.weighted_error(other, weight, x.T @ x / 500)
    assert found.item() == pytest.approx((x @ (other - weight).T).square().sum(1).mean().item(), rel=1e-4)


def test_group_means_minimise_the_plain_error():
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    best = group_means(weight, 4)
    expected = (weight * torch.sign(weight)).unflatten(1, (3, 4)).mean(2)
    torch.testing.assert_close(best, expected)


def test_svid_returns_parts_of_the_best_rank_one_magnitude():
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)) * torch.rand(40, 1)
    signs, row, column = svid.decompose(weight)
    U, S, V = torch.linalg.svd(weight.abs().double())
    best = S[0] * torch.outer(U[:, 0], V[0])
    torch.testing.assert_close(torch.outer(row, column).double(), best, rtol=1e-4, atol=1e-5)
    assert torch.equal(signs, weight >= 0)


def test_svid_of_a_rank_one_magnitude_is_exact():
    generator = torch.Generator().manual_seed(2)
    row, column = torch.rand(6, generator=generator) + 0.1, torch.rand(9, generator=generator) + 0.1
    weight = torch.outer(row, column) * plus_minus(torch.rand(6, 9, generator=generator) > 0.5)
    signs, a, b = svid.decompose(weight)
    torch.testing.assert_close(torch.outer(a, b) * plus_minus(signs), weight)


def test_svid_of_zeros_is_zero():
    _, row, column = svid.decompose(torch.zeros(3, 5))
    assert not row.any() and torch.isfinite(column).all()
