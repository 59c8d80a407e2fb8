"""Signs that train: sign(u) in the forward pass, the identity in the backward pass (arXiv 1308.3432).

The latent u is real. Its sign is what is stored, its size how much evidence it takes to turn it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST, MOST = 0.02, 3.0
"""Bounds of |u| at the start: no sign turns at the first step, and none is out of reach."""
DOUBTED = 0.1
"""|u| of a sign against its weight: the solver turned it for the sake of others, so it may turn back early."""


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        return torch.where(latent >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def trained_sign(latent: Tensor) -> Tensor:
    """+1 where latent >= 0, else -1, float32 of the same shape; gradients pass unchanged."""
    return _Sign.apply(latent)


def start_latents(signs: Tensor, ratio: Tensor) -> Tensor:
    """Latents whose signs are those that were solved.

    signs: bool, True = +1. ratio: same shape, the weight over the size that its sign is multiplied by, of either sign.
    """
    size = ratio.abs()
    agrees = (ratio >= 0) == signs
    size = torch.where(agrees, size, DOUBTED * size.clamp_max(1.0)).clamp(LEAST, MOST)
    return torch.where(signs, size, -size)
