"""Every method keeps the same promises; a new one is judged the moment its file exists."""

from __future__ import annotations

import pytest
import torch

from hf_qep.errors import BitsError, ConfigError
from hf_qep.methods.problem import LayerProblem
from hf_qep.registry import FORMATS, METHODS
from tests.algorithms.problems import correlated_problem, objective

SHAPES = [(32, 64), (33, 75), (96, 32), (20, 130)]
"""Ragged, wide and narrow."""

BITS = {"factored": 2.5}
"""Where a method is not asked for exactly one bit: tiny layers carry much padding."""


def budget(name: str) -> float:
    return BITS.get(name, 1.0)


def solve(name, weight, hessian, *, group_size=None, seed=0, damping=0.01):
    """Spec, parts and the dense weight that is shipped."""
    method = METHODS.get(name)
    spec = method.spec(budget(name), group_size, *weight.shape)
    problem = LayerProblem(weight, hessian, spec, damping, torch.Generator().manual_seed(seed))
    parts = method.solve(problem)
    format_ = FORMATS.get(method.FORMAT)
    return spec, parts, format_.dequantize(format_.pack(parts, spec), spec, *weight.shape, torch.float32)


@pytest.fixture(params=METHODS.names())
def name(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_is_solved_and_survives_packing(name, shape):
    weight, hessian = correlated_problem(*shape)
    spec, parts, dense = solve(name, weight, hessian)
    assert dense.shape == weight.shape and torch.isfinite(dense).all()
    format_ = FORMATS.get(METHODS.get(name).FORMAT)
    back = format_.unpack(format_.pack(parts, spec), spec, *shape)
    latents = {key.removesuffix("_latent"): parts.pop(key) for key in list(parts) if key.endswith("_latent")}
    assert back.keys() == parts.keys()
    assert all(torch.equal(latent >= 0, parts[key]) for key, latent in latents.items())
    for key, part in parts.items():
        assert back[key].shape == part.shape
        torch.testing.assert_close(back[key].float(), part.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_budget_of_bits_is_kept(name, shape):
    method = METHODS.get(name)
    stored = FORMATS.get(method.FORMAT).stored_bits(method.spec(budget(name), None, *shape), *shape)
    out_features, in_features = shape
    signs = 32 * -(-in_features // 32) * out_features
    scales = 16 * (out_features + in_features)
    assert stored <= max(budget(name) * out_features * in_features, signs + scales)


def test_the_same_seed_gives_the_same_bytes(name):
    weight, hessian = correlated_problem(32, 64)
    first, second = (solve(name, weight, hessian, seed=5)[2] for _ in range(2))
    assert torch.equal(first, second)


def test_the_problem_is_left_as_it_was(name):
    weight, hessian = correlated_problem(32, 64)
    copies = weight.clone(), hessian.clone()
    solve(name, weight, hessian)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_rounding_in_the_metric_of_the_data(name, seed):
    weight, hessian = correlated_problem(64, 64, seed=seed)
    error = objective(solve(name, weight, hessian)[2], weight, hessian)
    rounded = objective(solve("rtn", weight, hessian)[2], weight, hessian)
    assert error <= 1.02 * rounded, f"{error=:.4f} {rounded=:.4f}"


@pytest.mark.parametrize("group_size", [8, 16])
def test_groups_are_never_worse_than_grouped_rounding(name, group_size):
    method = METHODS.get(name)
    weight, hessian = correlated_problem(48, 48)
    try:
        method.spec(budget(name), group_size, 48, 48)
    except ConfigError as refusal:
        assert "group_size" in str(refusal)
        return
    error = objective(solve(name, weight, hessian, group_size=group_size)[2], weight, hessian)
    rounded = objective(solve("rtn", weight, hessian, group_size=group_size)[2], weight, hessian)
    assert error <= 1.02 * rounded, f"{error=:.4f} {rounded=:.4f}"


def test_a_group_that_does_not_divide_the_width_is_refused(name):
    with pytest.raises(ConfigError):
        METHODS.get(name).spec(budget(name), 7, 32, 48)


@pytest.mark.parametrize("bits", [-1.0, 0.01, 9.0, float("nan")])
def test_impossible_bits_are_refused(name, bits):
    with pytest.raises(BitsError):
        METHODS.get(name).spec(bits, None, 32, 32)


def test_zeros_stay_finite_and_a_zero_row_stays_zero(name):
    weight, hessian = correlated_problem(32, 64)
    weight[3], weight[:, 5] = 0, 0
    hessian[:, 9], hessian[9] = 0, 0
    dense = solve(name, weight, hessian)[2]
    assert torch.isfinite(dense).all()
    assert dense[3].abs().max() <= 1e-3 * dense.abs().mean()


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.ones(64, 64), torch.diag(torch.logspace(-6, 6, 64))])
def test_degenerate_hessians_give_a_finite_weight(name, hessian):
    weight, _ = correlated_problem(32, 64)
    dense = solve(name, weight, hessian)[2]
    assert torch.isfinite(dense).all() and dense.any()


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_small_and_large_weights_fit_the_half_precision_scales(name, size):
    weight, hessian = correlated_problem(32, 64)
    plain = objective(solve(name, weight, hessian)[2], weight, hessian)
    scaled = objective(solve(name, size * weight, hessian)[2] / size, weight, hessian)
    assert scaled == pytest.approx(plain, rel=0.1)
