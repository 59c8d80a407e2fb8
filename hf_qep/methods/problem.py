"""What a method is given: one linear to solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_qep.errors import BitsError


@dataclass(frozen=True)
class LayerProblem:
    """Find tensors of `spec` that minimise tr((W - What) H (W - What)^T)."""

    weight: Tensor
    """(out, in) float32: the target W*, already corrected by QEP."""
    hessian: Tensor
    """(in, in) float32: E[x x^T] of the quantised stream, not damped."""
    spec: Any
    """Spec of the method's format."""
    damping: float
    """Ridge in units of the mean of diag H."""
    generator: torch.Generator
    """CPU generator, seeded from the job's seed and the layer's name."""
    output_metric: Tensor | None = None
    """(out, out) float32, damped: L of tr(L (W - What) H (W - What)^T), None is the identity. Only a method whose rows
    share something has a use for it."""


def require_one_bit(method: str, bits: float) -> None:
    """Raise BitsError unless `bits` is 1: the method has exactly one sign per weight."""
    if bits != 1.0:
        raise BitsError(
            f"method `{method}` has one sign per weight, so bits must be 1.0 (scales come on top), not {bits:g}; "
            "use method `factored` for other budgets"
        )
