"""Binary factorisation W ≈ diag(a) S_L diag(m) S_R diag(b) by ADMM in the full metric of the Hessian.

    minimise tr[L (W - F G) R (W - F G)ᵀ]      F (out, rank), G (rank, in), each signs times a rank-1 magnitude

Double binary factorisation (arXiv 2505.11076) with the schedule of NanoQuant (arXiv 2602.06694): balanced updates and a
linear penalty.  Both factors are held close to the set of matrices "signs times a rank-1 magnitude", onto which svid.py
projects; the penalty grows from 0 to 1, so signs settle late.  Scales are then refitted exactly.  Both papers take the
diagonals of L and R; the rest lets the rounding of one column make up for that of another, which halves the error of
real layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_qep.algorithms.scales import column_scale, coupled_row_scale, geometric_mean, middle_scale, row_scales
from hf_qep.algorithms.svid import rank_one

RIDGE = 0.03
"""Of the least-squares steps; factors are normalised to unit rows, so it is relative."""

PROJECTION_ITERATIONS = 5

TEMPER = 0.75
"""Power of the eigenvalues of a metric, which then keep their sum; 0 would be its diagonal."""

CONJUGATE_STEPS = 3
"""Of each solve for G, which starts from the last one. The exact solve takes 1 per cent off the error and an eigenvalue
decomposition of a (rank, rank) matrix per iteration."""


@dataclass
class FactoredWeight:
    """A weight of two sign matrices; scales are not negative once `refit` has run."""

    left: Tensor
    """(out, rank) bool, True = +1"""
    right: Tensor
    """(rank, in) bool, True = +1"""
    row_scale: Tensor
    """(out,) float32"""
    middle_scale: Tensor
    """(rank,) float32"""
    column_scale: Tensor
    """(in,) float32"""
    left_size: Tensor
    """(out, rank) float32: how sure each sign is, 1 on the average; where training starts"""
    right_size: Tensor
    """(rank, in) float32"""

    def dense(self) -> Tensor:
        """Ŵ, (out, in) float32."""
        return self.row_scale.unsqueeze(1) * self.core() * self.column_scale

    def core(self) -> Tensor:
        """S_L diag(m) S_R, (out, in) float32."""
        return (_plus_minus(self.left) * self.middle_scale) @ _plus_minus(self.right)


def factorise(
    weight: Tensor,
    metric: Tensor,
    rank: int,
    *,
    iterations: int,
    generator: torch.Generator,
    output_metric: Tensor | None = None,
) -> FactoredWeight:
    """Minimise tr[L (Ŵ - W) R (Ŵ - W)ᵀ] over both sign matrices and the scales, from a random start.

    weight (out, in) float32; metric R (in, in) float32, positive definite: the damped Hessian. output_metric: L
    (out, out) float32, positive definite, None is the identity. iterations: ADMM steps. generator: CPU generator of the
    start.
    """
    inner = _Side.of(metric)
    outer = None if output_metric is None else _Side.of(output_metric)
    W = weight * inner.stretch if outer is None else outer.stretch.unsqueeze(1) * weight * inner.stretch
    size = W.square().mean().sqrt()
    W = W / size if size > 0 else W
    target = W @ inner.metric if outer is None else outer.metric @ W @ inner.metric
    A = torch.randn(len(W), rank, generator=generator).to(W)
    B = torch.randn(rank, W.shape[1], generator=generator).to(W)
    Z_A, Z_B = _project(A), _project(B)
    U_A, U_B = A - Z_A, B - Z_B
    for k in range(iterations):
        penalty = k / iterations
        G = _unit_rows(Z_B)
        wanted = torch.addmm((Z_A - U_A).T, G, target.T, beta=penalty)
        A = _step(_gram(G, inner), wanted, penalty, outer, A.T).T
        F = _unit_rows(Z_A.T)
        wanted = torch.addmm(Z_B - U_B, F, target, beta=penalty)
        B = _step(_gram(F, outer), wanted, penalty, inner, B)
        Z_A, Z_B = _project(A + U_A), _project(B + U_B)
        U_A, U_B = U_A + A - Z_A, U_B + B - Z_B
    row, middle = rank_one(Z_A.abs(), PROJECTION_ITERATIONS)
    _, column = rank_one(Z_B.abs(), PROJECTION_ITERATIONS)
    # The last A was solved against unit rows of Z_B: the length of the column scale goes into the middle.
    middle = middle * size / column.norm().clamp_min(torch.finfo(W.dtype).tiny)
    row = row if outer is None else row / outer.stretch
    sizes = [(Z + U).abs() / Z.abs().clamp_min(torch.finfo(Z.dtype).tiny) for Z, U in ((Z_A, U_A), (Z_B, U_B))]
    return FactoredWeight(~torch.signbit(Z_A), ~torch.signbit(Z_B), row, middle, column / inner.stretch, *sizes)


def refit(
    start: FactoredWeight, weight: Tensor, hessian: Tensor, *, rounds: int, output_metric: Tensor | None = None
) -> FactoredWeight:
    """Exact least-squares column, row and middle scales in turn, `rounds` times; tr[L (Ŵ-W) H (Ŵ-W)ᵀ] never rises.

    weight (out, in), hessian (in, in) and output_metric L (out, out), None is the identity; positive definite, float32.
    """
    now, L = start, output_metric
    for _ in range(rounds):
        now = replace(now, column_scale=column_scale(weight, now.row_scale.unsqueeze(1) * now.core(), hessian, L))
        direction = now.core() * now.column_scale
        if L is None:
            now = replace(now, row_scale=row_scales(weight, direction, hessian).squeeze(1))
        else:
            now = replace(now, row_scale=coupled_row_scale(weight, direction, hessian, L))
        left = now.row_scale.unsqueeze(1) * _plus_minus(now.left)
        right = _plus_minus(now.right) * now.column_scale
        now = replace(now, middle_scale=middle_scale(weight, left, right, hessian, L))
    return _absorb_signs(now)


def balance(weight: FactoredWeight) -> FactoredWeight:
    """The same weight with scales of equal geometric mean, where float16 holds all three best."""
    means = [geometric_mean(s) for s in (weight.row_scale, weight.middle_scale, weight.column_scale)]
    common = torch.stack(means).log().mean().exp()
    return replace(
        weight,
        row_scale=weight.row_scale * (common / means[0]),
        middle_scale=weight.middle_scale * (common / means[1]),
        column_scale=weight.column_scale * (common / means[2]),
    )


@dataclass
class _Side:
    """A metric in units in which its diagonal is 1: there all rows or columns matter alike, as the projection takes
    them to do."""

    stretch: Tensor
    """(n,): square roots of the diagonal"""
    metric: Tensor
    """(n, n) with unit diagonal, its eigenvalues tempered"""
    values: Tensor
    basis: Tensor

    @classmethod
    def of(cls, metric: Tensor) -> _Side:
        stretch = metric.diagonal().sqrt()
        values, basis = torch.linalg.eigh(metric / torch.outer(stretch, stretch))
        values = values.clamp_min(0) ** TEMPER
        values = values * (len(values) / values.sum())
        return cls(stretch, (basis * values) @ basis.T, values, basis)


def _gram(rows: Tensor, side: _Side | None) -> Tensor:
    """X M Xᵀ for X (rank, n)."""
    return rows @ rows.T if side is None else rows @ side.metric @ rows.T


def _step(gram: Tensor, wanted: Tensor, penalty: float, side: _Side | None, start: Tensor) -> Tensor:
    """X (rank, n) with gram X M + (penalty + RIDGE) X = wanted: exact for M = I, else some steps from `start`."""
    if side is not None:
        return _approach(start @ side.basis, gram, side.values, wanted @ side.basis, penalty) @ side.basis.T
    gram.diagonal().add_(penalty + RIDGE)
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(gram))


def _approach(start: Tensor, gram: Tensor, values: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    """Conjugate gradient steps towards X (rank, n) with gram X diag(values) + (penalty + RIDGE) X = wanted.

    The columns of X are systems of their own.
    """

    def product(x: Tensor) -> Tensor:
        return (gram @ x) * values + (penalty + RIDGE) * x

    tiny = torch.finfo(start.dtype).tiny
    x, residual = start, wanted - product(start)
    step, square = residual, residual.square().sum(0)
    for _ in range(CONJUGATE_STEPS):
        change = product(step)
        length = square / (step * change).sum(0).clamp_min(tiny)
        x, residual = x + length * step, residual - length * change
        before, square = square, residual.square().sum(0)
        step = residual + square / before.clamp_min(tiny) * step
    return x


def _project(matrix: Tensor) -> Tensor:
    """Nearest sign ∘ rank-1 matrix, by a few power iterations."""
    row, column = rank_one(matrix.abs(), PROJECTION_ITERATIONS)
    return torch.copysign(torch.outer(row, column), matrix)


def _unit_rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def _plus_minus(signs: Tensor) -> Tensor:
    return torch.where(signs, 1.0, -1.0)


def _absorb_signs(weight: FactoredWeight) -> FactoredWeight:
    return replace(
        weight,
        left=weight.left ^ (weight.row_scale < 0).unsqueeze(1),
        right=weight.right ^ (weight.middle_scale < 0).unsqueeze(1) ^ (weight.column_scale < 0),
        row_scale=weight.row_scale.abs(),
        middle_scale=weight.middle_scale.abs(),
        column_scale=weight.column_scale.abs(),
    )
