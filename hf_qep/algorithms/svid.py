"""Sign-value independent decomposition: W ≈ sign(W) ∘ a bᵀ (OneBit, arXiv 2402.11295)."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 30


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signs, row scale and column scale; a bᵀ is the best rank-1 approximation of |W|.

    |W| is not balanced beforehand: its leading singular pair already is the least-squares answer for these signs.
    weight: (out, in) float32. Returns bool (out, in) with True = +1, (out,), (in,); both scales are not negative.
    """
    row, column = rank_one(weight.abs())
    return weight >= 0, row, column


def rank_one(magnitude: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """a (out,) and b (in,) that minimise ‖M - a bᵀ‖² for a matrix M ≥ 0, by power iteration; b has mean square 1.

    The leading singular pair of a non-negative matrix is non-negative, so a positive start never loses it.
    """
    b = magnitude.mean(0)
    for _ in range(iterations):
        b = _unit(magnitude.T @ (magnitude @ b))
    return magnitude @ b / len(b), b


def _unit(vector: Tensor) -> Tensor:
    """Scaled to mean square 1; ones when there is nothing to scale."""
    size = vector.square().mean().sqrt()
    return vector / size if size > 0 else torch.ones_like(vector)
