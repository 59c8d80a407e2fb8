"""Binary factorisation W ≈ diag(a) S_L diag(m) S_R diag(b) by ADMM in the diagonal metric.

Double binary factorisation (arXiv 2505.11076) with the schedule of NanoQuant (arXiv 2602.06694), balanced updates and a
linear penalty.  Both factors are held close to the set of matrices "signs times a rank-1 magnitude", onto which svid.py
projects; the penalty grows from 0 to 1, so signs settle late.  Scales are then refitted exactly in the full metric.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_qep.algorithms.scales import column_scale, geometric_mean, middle_scale, row_scales
from hf_qep.algorithms.svid import rank_one

RIDGE = 0.03
"""Of the least-squares steps; factors are normalised to unit rows, so it is relative."""

PROJECTION_ITERATIONS = 5


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
    weight: Tensor, importance: Tensor, rank: int, *, iterations: int, generator: torch.Generator
) -> FactoredWeight:
    """Minimise Σ_ij importance_j (ŵ_ij - w_ij)² over both sign matrices and the scales, from a random start.

    weight (out, in) float32; importance (in,) float32, positive: the diagonal of the damped Hessian.
    iterations: ADMM steps. generator: CPU generator of the start.
    """
    stretch = importance.sqrt()
    W = weight * stretch
    size = W.square().mean().sqrt()
    W = W / size if size > 0 else W
    A = torch.randn(len(W), rank, generator=generator).to(W)
    B = torch.randn(rank, W.shape[1], generator=generator).to(W)
    Z_A, Z_B = _project(A), _project(B)
    U_A, U_B = A - Z_A, B - Z_B
    for k in range(iterations):
        penalty = k / iterations
        A = _least_squares(W.T, _unit_rows(Z_B), (Z_A - U_A).T, penalty).T
        B = _least_squares(W, _unit_rows(Z_A.T), Z_B - U_B, penalty)
        Z_A, Z_B = _project(A + U_A), _project(B + U_B)
        U_A, U_B = U_A + A - Z_A, U_B + B - Z_B
    row, middle = rank_one(Z_A.abs(), PROJECTION_ITERATIONS)
    _, column = rank_one(Z_B.abs(), PROJECTION_ITERATIONS)
    # The last A was solved against unit rows of Z_B: the length of the column scale goes into the middle.
    middle = middle * size / column.norm().clamp_min(torch.finfo(W.dtype).tiny)
    sizes = [(Z + U).abs() / Z.abs().clamp_min(torch.finfo(Z.dtype).tiny) for Z, U in ((Z_A, U_A), (Z_B, U_B))]
    return FactoredWeight(~torch.signbit(Z_A), ~torch.signbit(Z_B), row, middle, column / stretch, *sizes)


def refit(start: FactoredWeight, weight: Tensor, hessian: Tensor, *, rounds: int) -> FactoredWeight:
    """Exact least-squares column, row and middle scales in turn, `rounds` times; tr[(Ŵ-W) H (Ŵ-W)ᵀ] never rises.

    weight (out, in), hessian (in, in) positive definite, float32.
    """
    now = start
    for _ in range(rounds):
        now = replace(now, column_scale=column_scale(weight, now.row_scale.unsqueeze(1) * now.core(), hessian))
        now = replace(now, row_scale=row_scales(weight, now.core() * now.column_scale, hessian).squeeze(1))
        left = now.row_scale.unsqueeze(1) * _plus_minus(now.left)
        right = _plus_minus(now.right) * now.column_scale
        now = replace(now, middle_scale=middle_scale(weight, left, right, hessian))
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


def _least_squares(target: Tensor, basis: Tensor, proximity: Tensor, penalty: float) -> Tensor:
    """X (rank, n) that minimises ‖target - basisᵀ X‖² + penalty ‖X - proximity‖² + RIDGE ‖X‖², by Cholesky.

    target (m, n), basis (rank, m), proximity (rank, n).
    """
    gram = basis @ basis.T
    gram.diagonal().add_(penalty + RIDGE)
    return torch.cholesky_solve(torch.addmm(proximity, basis, target, beta=penalty), torch.linalg.cholesky(gram))


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
