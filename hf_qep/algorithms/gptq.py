"""Error feedback onto the grid {-m, +m}: GPTQ (arXiv 2210.17323), in the equal form of QuIP's LDLQ (arXiv 2307.13304).

Columns are rounded one after the other; with H = L Lᵀ, L lower triangular and the columns arranged so that the last one
is rounded first,

    q_j = m_j · sign( w_j + Σ_{i>j} (w_i - q_i) L_ij / L_jj )

GPTQ reaches the same q through the Cholesky factor of H⁻¹; this form needs one factorisation and no inverse.

The solvers work on transposed matrices (in, out): a column of the weight is then a contiguous row of memory, and one
step of the sequential loop is two vector operations over all outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qep.algorithms.moments import cholesky_damped

BLOCK = 128
"""Columns per lazy update: wide enough to make it a matrix product, narrow enough to stay in cache."""

SUB_BLOCK = 16
"""Columns per inner update. Rank-1 updates are bound by memory: beyond 16 columns they cost more than their calls."""


def error_feedback_signs(
    weight: Tensor, magnitude: Tensor, hessian: Tensor, *, damping: float, act_order: bool = False, block: int = BLOCK
) -> Tensor:
    """Signs of GPTQ for given magnitudes.

    weight     (out, in)  float32
    magnitude  (out, groups) float32, not negative: the grid of a weight is {-m, +m}, m that of its group of columns
    hessian    (in, in)   E[x xᵀ]
    damping    fraction of the mean diagonal
    act_order  round the columns of largest diagonal first, instead of from left to right
    Returns (out, in) bool, True = +1; the result does not depend on `block` but for rounding.
    Raises IllConditionedError if H + λI has no Cholesky factor.
    """
    order = _rounded_last_to_first(hessian, act_order)
    factor, _ = cholesky_damped(hessian, damping, order)
    W = weight.T.contiguous().index_select(0, order)
    M, group = magnitude.T.contiguous(), order // (weight.shape[1] // magnitude.shape[1])
    signs = torch.empty(W.shape, dtype=torch.bool, device=W.device)
    for stop in range(len(W), 0, -block):
        now = slice(max(stop - block, 0), stop)
        reach = factor[stop:, now] / factor.diagonal()[now]
        x = torch.addmm(W[now], reach.T, W[stop:])
        coupling = factor[now, now] / factor.diagonal()[now]
        # round_block runs forwards, hence the flips.
        codes = round_block(x.flip(0), W[now].flip(0), M[group[now].flip(0)], coupling.flip(0, 1)).flip(0)
        W[now] -= codes  # from here on the error of these columns
        signs[order[now]] = ~torch.signbit(codes)
    return signs.T.contiguous()


def round_block(x: Tensor, reference: Tensor, magnitude: Tensor, coupling: Tensor) -> Tensor:
    """Round the columns of one block in order, each seeing the errors of those before it.

    q_j = magnitude_j · sign(x_j);  then x_k += coupling_jk (reference_j - q_j) for k > j.

    x, reference, magnitude: (block, out), transposed; x is overwritten. coupling: (block, block), only its strictly
    upper part is used. Returns q (block, out); its sign bit is the code even where the magnitude is 0.
    """
    coupling = coupling.triu(1)
    # The references are known beforehand: with their part added in one product, a column costs two operations.
    x.addmm_(coupling.T, reference)
    codes = torch.empty_like(x)
    columns = zip(*(t.unbind() for t in (x, magnitude, codes)), strict=True)
    for start in range(0, len(x), SUB_BLOCK):
        now, later = slice(start, start + SUB_BLOCK), slice(start + SUB_BLOCK, None)
        # The whole sub-block is updated, with a coupling that is zero for finished columns: cheaper than cutting views.
        pending, reach = x[now], coupling[now, now].unsqueeze(2).unbind()
        for reach_j, (x_j, magnitude_j, code) in zip(reach, columns, strict=False):
            torch.copysign(magnitude_j, x_j, out=code)
            pending.addcmul_(reach_j, code, value=-1)
        if start + SUB_BLOCK < len(x):
            x[later].addmm_(coupling[now, later].T, codes[now], alpha=-1)
    return codes


def _rounded_last_to_first(hessian: Tensor, act_order: bool) -> Tensor:
    """Columns arranged so that the one to round first comes last."""
    if act_order:
        return torch.argsort(hessian.diagonal(), stable=True)
    return torch.arange(len(hessian) - 1, -1, -1, device=hessian.device)
