"""Small layer problems shared by the tests of this room."""

from __future__ import annotations

import torch


def correlated_problem(out_features: int, in_features: int, seed: int = 0, tokens: int | None = None):
    """Weight (out, in) and H of activations whose spectrum falls, as in real layers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mix = torch.randn(in_features, in_features, generator=generator) * torch.logspace(0, -1.5, in_features)
    x = torch.randn(tokens or 4 * in_features, in_features, generator=generator) @ mix.T
    x += 0.5 * torch.randn(in_features, generator=generator)
    return weight, x.T @ x / len(x)


def objective(approximation, weight, hessian) -> float:
    """tr[(What - W) H (What - W)^T] in float64."""
    difference = approximation.double() - weight.double()
    return ((difference @ hessian.double()) * difference).sum().item()


def plus_minus(signs):
    return torch.where(signs, 1.0, -1.0)
