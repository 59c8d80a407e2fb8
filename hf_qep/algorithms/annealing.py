"""Quasi-quantum annealing of the signs of a layer (arXiv 2409.02135): all rows at once, as QUBOs that share one matrix.

With the scales fixed, row i is a QUBO in its spins s, and all rows have the Hessian in common:

    E_i(s) = (u_i ∘ s - w_i)ᵀ H (u_i ∘ s - w_i),   u_ij = a_{i,g(j)} b_j,   s in {-1, 1}^d

The spins are relaxed to [-1, 1] and go down the gradient of

    r_i(s) = E_i(s) + γ Σ_j h_ij (1 - s_j^c),   h_ij = u_ij² H_jj

while γ rises.  E is convex: at γ = 0 there is one optimum, far from any corner.  At γ = 1 and c = 2 no single spin has
curvature left, and the minima lie on corners.  In between the spins settle one after the other, the clear cases first.
A step of all rows is one product with H; no matrix of a single row is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_qep.algorithms.scales import row_scales
from hf_qep.algorithms.signs import SignWeight, absorb_signs, descend

BETAS = (0.9, 0.95)
"""Memory of the mean of the gradient and of its size, as in Adam; both short, since γ changes the ground."""
EPS = 1e-8
CHECK = 10
"""Steps between two looks at the rounded spins. A look costs as much as a step."""
CHUNK = 1 << 20
"""Spins that are annealed at a time; bounds the memory to about eight times as many floats."""
POLISH = 2
"""Sweeps of coordinate descent after the annealing, in which the scales follow the new signs."""


@dataclass(frozen=True)
class Schedule:
    """How the spins are led to the corners; the values are those that won on real layers."""

    steps: int = 150
    """Steps of `rate`; each takes 2 · replicas · out · in² operations."""
    rate: float = 0.2
    """Length of a step of one spin."""
    gamma: tuple[float, float] = (0.0, 0.7)
    """First and last γ, linear in between. At 0.7 few spins are undecided, and polishing decides them better."""
    power: int = 2
    """c, an even number."""
    warmth: float = 1.0
    """Share of the given signs in the first spins; the rest is uniform noise. 0 is a cold start."""
    temperature: float = 0.0
    """Of the Langevin noise √(2 · rate · temperature) that every step adds."""
    replicas: int = 1
    """Copies of every row; they need a `warmth` below 1 or a `temperature` to differ."""
    diversity: float = 0.0
    """d in (1 - d) · mean_k r(s_k) - d · replicas · Σ_j std_k(s_kj): how much the copies drive each other apart."""


def quasi_quantum_annealing(
    start: SignWeight,
    weight: Tensor,
    hessian: Tensor,
    *,
    generator: torch.Generator,
    schedule: Schedule | None = None,
    refit_columns: bool = True,
    chunk: int = CHUNK,
) -> SignWeight:
    """Anneal the signs of `start` with its scales, then polish signs and scales; the objective never ends above it.

    weight (out, in) float32 or float64; hessian (in, in) positive definite (damp it first).
    generator: for the CPU. All rows get the same noise: rows never meet, and so the result does not depend on `chunk`.
    refit_columns: False keeps the column scale.
    """
    schedule = schedule or Schedule()
    size = (start.spread_rows() * start.column_scale).to(weight)
    rows, state, signs = max(1, chunk // (schedule.replicas * weight.shape[1])), generator.get_state(), []
    for W, u, before in zip(weight.split(rows), size.split(rows), start.signs.split(rows), strict=True):
        generator.set_state(state)
        signs.append(_Rows(W, u, hessian).anneal(before, schedule, generator))
    found = SignWeight(torch.cat(signs), start.row_scale, start.column_scale)
    found = descend(found, weight, hessian, sweeps=POLISH, refit_columns=refit_columns)
    group = weight.shape[1] // start.row_scale.shape[1]
    return absorb_signs(found.signs, row_scales(weight, found.direction(), hessian, group), found.column_scale)


class _Rows:
    """Some rows; energies in units of their mean h, gradients and spins (replicas, rows, in)."""

    def __init__(self, weight: Tensor, size: Tensor, hessian: Tensor) -> None:
        self.weight, self.size, self.hessian = weight, size, hessian
        own = size.square() * hessian.diagonal()
        # A row without any effect has no unit; it stays at its first signs.
        unit = own.mean(1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        self.penalty = own / unit
        self.slope = 2 * size / unit

    def anneal(self, before: Tensor, schedule: Schedule, generator: torch.Generator) -> Tensor:
        """The best signs that were met, `before` (rows, in) among them; bool like it."""
        first = torch.where(before, 1.0, -1.0).to(self.weight)
        best, lowest = first, self.error(first.unsqueeze(0)).squeeze(0)
        spins = schedule.warmth * first + (1 - schedule.warmth) * (2 * self._noise(torch.rand, schedule, generator) - 1)
        spins = spins.expand(schedule.replicas, *first.shape).clone()
        mean, square = torch.zeros_like(spins), torch.zeros_like(spins)
        (low, high), last = schedule.gamma, schedule.steps - 1
        for k in range(schedule.steps):
            gradient = self.gradient(spins, low + (high - low) * k / max(1, last), schedule)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            length = (square / (1 - BETAS[1] ** (k + 1))).sqrt_().add_(EPS)
            spins.addcdiv_(mean, length, value=-schedule.rate / (1 - BETAS[0] ** (k + 1)))
            if schedule.temperature:
                noise = self._noise(torch.randn, schedule, generator)
                spins.add_(noise, alpha=math.sqrt(2 * schedule.rate * schedule.temperature))
            spins.clamp_(-1, 1)
            if (k + 1) % CHECK == 0 or k == last:
                rounded = torch.where(spins >= 0, 1.0, -1.0).to(spins)
                error, which = self.error(rounded).min(0)
                found = rounded.gather(0, which.view(1, -1, 1).expand(1, *first.shape)).squeeze(0)
                best = torch.where((error < lowest).unsqueeze(1), found, best)
                lowest = torch.minimum(error, lowest)
        return best > 0

    def error(self, spins: Tensor) -> Tensor:
        """E, (replicas, rows)."""
        difference = spins * self.size - self.weight
        return ((difference @ self.hessian) * difference).sum(2)

    def gradient(self, spins: Tensor, gamma: float, schedule: Schedule) -> Tensor:
        """Of the objective of every replica."""
        found = ((spins * self.size - self.weight) @ self.hessian).mul_(self.slope)
        found.addcmul_(self.penalty, spins.pow(schedule.power - 1), value=-gamma * schedule.power)
        if schedule.replicas > 1 and schedule.diversity:
            apart = spins - spins.mean(0)
            spread = (apart.square().sum(0) / (schedule.replicas - 1)).sqrt_().clamp_min_(EPS)
            found.mul_(1 - schedule.diversity)
            push = schedule.diversity * schedule.replicas**2 / (schedule.replicas - 1)
            found.addcdiv_(apart, spread, value=-push)
        return found

    def _noise(self, draw: Callable[..., Tensor], schedule: Schedule, generator: torch.Generator) -> Tensor:
        """One draw per replica and column, the same in every row: (replicas, 1, in)."""
        return draw(schedule.replicas, 1, self.weight.shape[1], generator=generator).to(self.weight)
