"""Quantisation error propagation: let each layer also undo the error made before it (arXiv 2504.09629)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_qep.algorithms.moments import cholesky_damped
from hf_qep.algorithms.scales import ROW_CHUNK


def correct_target(
    weight: Tensor, hessian: Tensor, cross_moment: Tensor, *, strength: float = 1.0, damping: float = 0.03
) -> Tensor:
    """Target that also undoes the error already made upstream.

    W* = W + strength · W C (H + λI)⁻¹,  λ = damping · mean(diag H)      QEP, arXiv 2504.09629

    At strength 1 and damping 0, W* minimises E‖W x - W* x̂‖²: it is the least-squares regression of the float output
    on the quantised input. Any solver that minimises tr[(Ŵ - W*) H (Ŵ - W*)ᵀ] then minimises the error of the output.

    weight        (out, in)  any float dtype
    hessian       (in, in)   E[x̂ x̂ᵀ] over tokens of the quantised stream
    cross_moment  (in, in)   E[(x - x̂) x̂ᵀ]
    strength      0 returns the weight unchanged, 1 corrects fully
    damping       fraction of the mean diagonal; more shrinks the correction towards none
    Returns (out, in) in the dtype of H. Raises IllConditionedError if H + λI has no Cholesky factor.
    """
    gaps = (rows.to(cross_moment) @ cross_moment for rows in weight.split(ROW_CHUNK))
    return _corrected(weight, hessian, gaps, strength, damping)


def correct_output(
    weight: Tensor, hessian: Tensor, output_gap: Tensor, *, strength: float = 1.0, damping: float = 0.03
) -> Tensor:
    """The same for a given gap in the output: W* = W + strength · G (H + λI)⁻¹.

    output_gap    (out, in)  G = E[(y - ŷ) x̂ᵀ], where ŷ is the output in the quantised stream before the weight itself
                  is quantised and y what it should be. G = W C gives `correct_target`. Where the output is added to a
                  residual stream, y - ŷ taken after the addition also holds the error that the residual carries past
                  the layer, and the layer corrects as much of it as its input can predict.
    """
    return _corrected(weight, hessian, output_gap.split(ROW_CHUNK), strength, damping)


def _corrected(weight: Tensor, hessian: Tensor, gaps: Iterable[Tensor], strength: float, damping: float) -> Tensor:
    """gaps: of ROW_CHUNK rows at a time, made when they are wanted."""
    corrected = weight.to(hessian.dtype, copy=True)
    if strength == 0:
        return corrected
    factor, _ = cholesky_damped(hessian, damping)
    for rows, gap in zip(corrected.split(ROW_CHUNK), gaps, strict=True):
        half = torch.linalg.solve_triangular(factor.mT, gap, upper=True, left=False)  # cholesky_solve copies the factor
        rows.add_(torch.linalg.solve_triangular(factor, half, upper=False, left=False), alpha=strength)
    return corrected
