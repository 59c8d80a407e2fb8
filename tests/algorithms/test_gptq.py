"""Error feedback against the paper's own recursion, and its blocks against single columns."""

import pytest
import torch

from hf_qep.algorithms.gptq import error_feedback_signs
from hf_qep.algorithms.moments import damped
from hf_qep.algorithms.rtn import group_means, round_to_nearest
from tests.algorithms.problems import correlated_problem, objective, plus_minus


def textbook_gptq(weight, magnitude, hessian, damping, order):
    """arXiv 2210.17323, Algorithm 1, column by column in float64."""
    H = damped(hessian, damping).double()[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    W, M = weight.double()[:, order].clone(), magnitude.double()[:, order]
    signs = torch.empty(weight.shape, dtype=torch.bool)
    for j in range(W.shape[1]):
        signs[:, order[j]] = W[:, j] >= 0
        q = torch.where(W[:, j] >= 0, M[:, j], -M[:, j])
        W[:, j:] -= torch.outer((W[:, j] - q) / U[j, j], U[j, j:])
    return signs


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(6, 20), (20, 37), (3, 1)])
def test_signs_are_those_of_the_papers_recursion_on_the_inverse(shape, act_order):
    weight, hessian = correlated_problem(*shape, seed=1)
    magnitude = group_means(weight).expand_as(weight)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, stable=True).flip(0) if act_order else torch.arange(shape[1])
    expected = textbook_gptq(weight, magnitude, hessian, 0.01, order)
    found = error_feedback_signs(weight, magnitude, hessian, damping=0.01, act_order=act_order)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block", [1, 16, 24, 200])
def test_lazy_blocks_change_nothing(block):
    weight, hessian = correlated_problem(9, 67, seed=2)
    magnitude = group_means(weight).expand_as(weight)
    one = error_feedback_signs(weight, magnitude, hessian, damping=0.05, block=1)
    assert torch.equal(error_feedback_signs(weight, magnitude, hessian, damping=0.05, block=block), one)


def test_magnitudes_of_groups_are_those_of_their_columns():
    weight, hessian = correlated_problem(9, 24, seed=2)
    groups = group_means(weight, 8)
    spread = groups.repeat_interleave(8, 1)
    first, second = (error_feedback_signs(weight, m, hessian, damping=0.05, act_order=True) for m in (groups, spread))
    assert torch.equal(first, second)


def test_without_correlation_it_is_round_to_nearest():
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    signs, scales = round_to_nearest(weight)
    found = error_feedback_signs(weight, scales.expand_as(weight), torch.eye(24), damping=0.01)
    assert torch.equal(found, signs)


@pytest.mark.parametrize("seed", range(4))
def test_feedback_beats_round_to_nearest_in_the_metric(seed):
    weight, hessian = correlated_problem(32, 48, seed=seed)
    signs, scales = round_to_nearest(weight)
    fed = error_feedback_signs(weight, scales.expand_as(weight), hessian, damping=0.01)
    nearest, feedback = (objective(scales * plus_minus(s), weight, hessian) for s in (signs, fed))
    assert feedback < 0.8 * nearest, f"{feedback=:.4f} {nearest=:.4f}"
