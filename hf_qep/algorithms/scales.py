"""Exact least-squares scales for fixed signs, in the metric of the Hessian.

    minimise tr[(Ŵ - W) H (Ŵ - W)ᵀ],   ŵ_ij = a_{i,g(j)} b_j s_ij

For fixed b the rows separate into (groups x groups) systems; for fixed a one (in, in) system gives b. Each step is the
exact minimiser, so alternating them never raises the objective.

The scales of a factored weight can also be had in a two-sided metric, tr[L (Ŵ - W) H (Ŵ - W)ᵀ] with L (out, out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qep.algorithms.moments import cholesky_damped

ROW_CHUNK = 256
"""Rows at a time where rows do not meet: bounds what is held beside the weights, for group systems to ROW_CHUNK ·
groups² numbers."""

RIDGE = 1e-6
"""Relative ridge of the systems: far below float16 precision of a scale, enough when a scale has no effect at all."""


def weighted_error(approximation: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """tr[(Ŵ - W) H (Ŵ - W)ᵀ], a scalar; all float32, (out, in), (out, in), (in, in)."""
    chunks = zip(approximation.split(ROW_CHUNK), weight.split(ROW_CHUNK), strict=True)
    return sum((_energy(there - here, hessian) for there, here in chunks), weight.new_zeros(()))


def energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """tr[M H Mᵀ], a scalar; (out, in) and (in, in) float32."""
    return sum((_energy(rows, hessian) for rows in matrix.split(ROW_CHUNK)), matrix.new_zeros(()))


def _energy(rows: Tensor, hessian: Tensor) -> Tensor:
    return ((rows @ hessian) * rows).sum()


def row_scales(weight: Tensor, direction: Tensor, hessian: Tensor, group_size: int | None = None) -> Tensor:
    """Best a for ŵ_ij = a_{i,g(j)} t_ij.

    weight, direction t = b ∘ s: (out, in) float32; hessian (in, in) positive definite.
    Returns (out, groups) float32; negative where the opposite signs would be better, 0 for a row that is all zero.
    """
    size = group_size or weight.shape[1]
    chunks = zip(weight.split(ROW_CHUNK), direction.split(ROW_CHUNK), strict=True)
    return torch.cat([_row_scales_of_chunk(W, T, hessian, size) for W, T in chunks])


def _row_scales_of_chunk(W: Tensor, T: Tensor, H: Tensor, size: int) -> Tensor:
    groups = W.shape[1] // size
    gram = W.new_empty(len(W), groups, groups)
    right = W.new_empty(len(W), groups)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        product = T[:, columns] @ H[columns]
        gram[:, g] = (product * T).unflatten(1, (groups, size)).sum(2)
        right[:, g] = (product * W).sum(1)
    if groups == 1:
        return torch.where(gram[..., 0] > 0, right / gram[..., 0], 0.0)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # A group without effect has a zero row; 1 on its diagonal leaves it at 0.
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + (diagonal <= 0)
    return torch.linalg.solve(gram, right)


def column_scale(weight: Tensor, direction: Tensor, hessian: Tensor, output_metric: Tensor | None = None) -> Tensor:
    """Best b for ŵ_ij = t_ij b_j: [(Tᵀ L T) ∘ H] b = diag(Tᵀ L W H).

    weight, direction t = a ∘ s: (out, in) float32; hessian (in, in), output_metric L (out, out), default I: positive
    definite. Returns (in,) float32, negative where the opposite signs would be better. Raises IllConditionedError if
    the system cannot be solved.
    """
    moved = _times(output_metric, direction)
    return _solved((direction.T @ moved) * hessian, (moved * (weight @ hessian)).sum(0))


def coupled_row_scale(weight: Tensor, direction: Tensor, hessian: Tensor, output_metric: Tensor) -> Tensor:
    """Best a for ŵ_ij = a_i t_ij where L couples the rows: [(T H Tᵀ) ∘ L] a = diag(L W H Tᵀ).

    Shapes, sign and errors as in `column_scale`; returns (out,).
    """
    moved = direction @ hessian
    return _solved((moved @ direction.T) * output_metric, ((output_metric @ weight) * moved).sum(1))


def middle_scale(
    weight: Tensor, left: Tensor, right: Tensor, hessian: Tensor, output_metric: Tensor | None = None
) -> Tensor:
    """Best m for Ŵ = F diag(m) G: [(Fᵀ L F) ∘ (G H Gᵀ)] m = diag(Fᵀ L W H Gᵀ).

    weight (out, in), left F (out, rank), right G (rank, in), hessian (in, in), output_metric L (out, out), default I.
    Returns (rank,) float32. Raises IllConditionedError if the system cannot be solved.
    """
    moved, projected = _times(output_metric, left), right @ hessian
    return _solved((left.T @ moved) * (projected @ right.T), ((moved.T @ weight) * projected).sum(1))


def _times(metric: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if metric is None else metric @ matrix


def _solved(system: Tensor, target: Tensor) -> Tensor:
    factor, _ = cholesky_damped(system, RIDGE)
    return torch.cholesky_solve(target.unsqueeze(1), factor).squeeze(1)


def geometric_mean(scale: Tensor) -> Tensor:
    """Of the positive entries, a scalar; 1 when there are none."""
    positive = scale[scale > 0]
    return positive.log().mean().exp() if len(positive) else scale.new_ones(())
