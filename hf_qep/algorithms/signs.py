"""Coordinate descent on signs and scales in the metric of the Hessian: a sign layer as a QUBO with a shared matrix.

    minimise tr[(Ŵ - W) H (Ŵ - W)ᵀ],   ŵ_ij = t_ij = a_{i,g(j)} b_j s_ij

With D = W - Ŵ, flipping t_ij costs dE = 4 t_ij x_ij, x = DH + t ∘ diag H, and moves x_ik by 2 t_ij H_jk for k ≠ j.
All rows move at once.  Columns go in blocks, and DH is computed for one block when its turn comes, so that nearly all
of the work is matrix products; inside a block every row flips the best weight of each window of columns.  After its
flips a block refits its own part of b, then of a, by least squares.  No step can raise the objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_qep.algorithms.gptq import BLOCK
from hf_qep.algorithms.moments import cholesky_damped
from hf_qep.algorithms.scales import RIDGE, geometric_mean

WINDOW = 16
"""Columns among which a row picks its best flip. Going column by column takes 8 times the steps and ends 2 per cent
higher on real layers."""

FLIPS = 2
"""Flips per window, row and sweep: about as many as are worth making in the first sweep."""


@dataclass
class SignWeight:
    """A weight of signs and scales: ŵ_ij = row_scale[i, j // group] · column_scale[j] · (+1 where signs else -1)."""

    signs: Tensor
    """(out, in) bool, True = +1"""
    row_scale: Tensor
    """(out, groups) float32, not negative"""
    column_scale: Tensor
    """(in,) float32, not negative"""

    def direction(self) -> Tensor:
        """b ∘ s, (out, in) float32."""
        return torch.where(self.signs, self.column_scale, -self.column_scale)

    def spread_rows(self) -> Tensor:
        """a_{i,g(j)}, (out, in) or, for one group, (out, 1) to broadcast."""
        groups = self.row_scale.shape[1]
        return self.row_scale if groups == 1 else self.row_scale.repeat_interleave(self.signs.shape[1] // groups, 1)

    def dense(self) -> Tensor:
        """Ŵ, (out, in) float32."""
        return self.spread_rows() * self.direction()


def absorb_signs(signs: Tensor, row_scale: Tensor, column_scale: Tensor) -> SignWeight:
    """The same weight with scales that are not negative: their signs move into the sign matrix.

    signs (out, in) bool, row_scale (out, groups), column_scale (in,), of either sign.
    """
    size = signs.shape[1] // row_scale.shape[1]
    negative = (row_scale < 0).repeat_interleave(size, 1) ^ (column_scale < 0)
    return SignWeight(signs ^ negative, row_scale.abs(), column_scale.abs())


def balance(weight: SignWeight) -> SignWeight:
    """The same weight with row and column scales of equal geometric mean, where float16 holds both best."""
    row, column = geometric_mean(weight.row_scale), geometric_mean(weight.column_scale)
    gauge = (row / column).sqrt()
    return SignWeight(weight.signs, weight.row_scale / gauge, weight.column_scale * gauge)


def descend(
    start: SignWeight, weight: Tensor, hessian: Tensor, *, sweeps: int, refit_columns: bool = True, block: int = BLOCK
) -> SignWeight:
    """Sweeps of sign flips and block-wise refits of both scales, from `start`; the objective never rises.

    weight (out, in) float32; hessian (in, in) positive definite (damp it first).
    refit_columns: False keeps the column scale. Row scales are refitted here only where there are several groups: a
    scale of the whole row needs `scales.row_scales`.
    block: columns per matrix product, a multiple of WINDOW. Flips do not depend on it but for rounding; refits of b do.
    """
    T = start.direction().T.contiguous()
    row, column = start.row_scale.T.clone(), start.column_scale.clone()
    group = len(T) // len(row)
    T.unflatten(0, (-1, group)).mul_(row.unsqueeze(1))
    D = weight.T.contiguous().sub_(T)
    for _ in range(sweeps):
        for now in _blocks(len(T), group, block):
            H, t = hessian[now, now], T[now].clone()
            gradient = _flip(t, hessian[now] @ D, H)
            if refit_columns:
                gain = _column_gain(t, gradient, H)
                if len(row) > 1:
                    gradient.addmm_(H, t * (1 - gain))
                t *= gain
                column[now] *= gain.squeeze(1).abs()
            if len(row) > 1:
                gain = _row_gain(t, gradient, H)
                t *= gain
                row[now.start // group] *= gain.abs()
            D[now] += T[now].sub_(t)
            T[now] = t
    del D
    return SignWeight(torch.signbit(T).logical_not_().T.contiguous(), row.T.contiguous(), column)


def _flip(t: Tensor, gradient: Tensor, H: Tensor) -> Tensor:
    """Make the best flips of a block in `t`, in place, and return the new gradient; both are overwritten.

    t, gradient = (DH)ᵀ: (block, out); H: (block, block).
    """
    diagonal = H.diagonal().unsqueeze(1)
    coupling = 2 * (H - torch.diag(H.diagonal()))
    x = gradient.addcmul_(t, diagonal)
    for start in range(0, len(t), WINDOW):
        window, own = t[start : start + WINDOW], x[start : start + WINDOW]
        reach = coupling[:, start : start + WINDOW]
        for _ in range(FLIPS):
            quarter_cost, best = torch.min(window * own, 0, keepdim=True)
            value = window.gather(0, best)
            flip = torch.where(quarter_cost < 0, value, 0.0)
            window.scatter_(0, best, value - 2 * flip)
            x.addmm_(reach, torch.zeros_like(window).scatter_(0, best, flip))
    return x.addcmul_(t, diagonal, value=-1)


def _column_gain(t: Tensor, gradient: Tensor, H: Tensor) -> Tensor:
    """Factors (block, 1) that minimise the objective when column j of the block is multiplied by factor j."""
    factor, _ = cholesky_damped((t @ t.T) * H, RIDGE)
    return 1 + torch.cholesky_solve((t * gradient).sum(1, keepdim=True), factor)


def _row_gain(t: Tensor, gradient: Tensor, H: Tensor) -> Tensor:
    """Factors (out,) that minimise the objective when the block of row i is multiplied by factor i."""
    curvature = (t * (H @ t)).sum(0)
    # A block that is all zero has no curvature and keeps its scale.
    return torch.where(curvature > 0, 1 + (t * gradient).sum(0) / curvature, 1.0)


def _blocks(width: int, group: int, block: int) -> Iterator[slice]:
    """Slices of at most `block` columns; with row groups exactly one group each, since its scale moves with it."""
    step = group if group < width else block
    return (slice(start, min(start + step, width)) for start in range(0, width, step))
