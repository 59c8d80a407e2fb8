"""The corrected target against the regression that it solves."""

import pytest
import torch

from hf_qep.algorithms.moments import Moments
from hf_qep.algorithms.qep import correct_target
from tests.algorithms.problems import objective


@pytest.fixture
def streams():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    xq = x @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator))
    weight = torch.randn(5, 12, generator=generator)
    moments = Moments(12, cross=True)
    moments.update(xq, x)
    return weight, x, xq, moments


def test_the_target_is_the_least_squares_regression_of_the_float_output(streams):
    weight, x, xq, moments = streams
    target = correct_target(weight, moments.hessian(), moments.cross(), strength=1.0, damping=0.0)
    best = torch.linalg.lstsq(xq.double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(target.double(), best, rtol=1e-3, atol=1e-4)


def test_output_error_is_the_weighted_error_towards_the_target_plus_a_constant(streams):
    weight, x, xq, moments = streams
    target = correct_target(weight, moments.hessian(), moments.cross(), strength=1.0, damping=0.0)

    def output_error(w):
        return (x.double() @ weight.double().T - xq.double() @ w.double().T).square().sum().item() / len(x)

    for w in (weight, torch.sign(weight)):
        gap = output_error(w) - output_error(target)
        assert gap == pytest.approx(objective(w, target, moments.hessian()), rel=1e-3)


def test_strength_interpolates_and_zero_leaves_the_weight(streams):
    weight, _, _, moments = streams
    H, C = moments.hessian(), moments.cross()
    none, half, full = (correct_target(weight, H, C, strength=s, damping=0.01) for s in (0.0, 0.5, 1.0))
    assert torch.equal(none, weight)
    torch.testing.assert_close(half, (weight + full) / 2)


def test_equal_streams_and_dead_inputs_need_no_correction():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    moments = Moments(4, cross=True)
    moments.update(x, x)
    weight = torch.randn(3, 4)
    torch.testing.assert_close(correct_target(weight, moments.hessian(), moments.cross()), weight)
