"""How drawings are brought into one place before a model sees them, and how they are varied while it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_GRID = 4
"""Points of a side of the coarse field that bends a drawing."""


@dataclass(frozen=True)
class Amount:
    """How much drawings are varied: turn in radians, shear, log of the scale, bend as a share of half a side."""

    turn: float = 0.25
    shear: float = 0.25
    scale: float = 0.2
    bend: float = 0.09


def distorted(images: Tensor, generator: torch.Generator, amount: Amount = Amount()) -> Tensor:
    """Each drawing (rows, 1, side, side) turned, sheared, scaled and bent by an amount of its own, evenly spread."""
    rows = len(images)

    def spread(most: float) -> Tensor:
        return (torch.rand(rows, generator=generator) * 2 - 1) * most

    turn, shear = spread(amount.turn), spread(amount.shear)
    wide = torch.exp(spread(amount.scale))
    high = wide * torch.exp(spread(amount.scale / 2))
    cos, sin = turn.cos(), turn.sin()
    first = torch.stack([cos * wide, (shear * cos - sin) * high, torch.zeros(rows)], -1)
    second = torch.stack([sin * wide, (cos + shear * sin) * high, torch.zeros(rows)], -1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    field = (torch.rand(rows, 2, _GRID, _GRID, generator=generator) * 2 - 1) * amount.bend
    bent = F.interpolate(field, size=images.shape[-2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + bent.permute(0, 2, 3, 1), align_corners=False)


def turned(images: Tensor, variant: Tensor) -> Tensor:
    """Drawings (rows, ..., side, side) as one of eight others: quarter turns 0 to 3, mirrored from 4 on.

    A character that is turned or mirrored is taken for another character, as is usual with Omniglot
    (arXiv 1605.06065). variant: (rows,) int64.
    """
    found = torch.empty_like(images)
    for number in range(VARIANTS):
        which = variant == number
        part = torch.rot90(images[which], number % 4, (-2, -1))
        found[which] = part.flip(-1) if number >= 4 else part
    return found


VARIANTS = 8


def lines(images: Tensor, directions: int = 4) -> Tensor:
    """How much each pixel lies on a line of each direction, (rows, directions, side, side), never negative.

    The positive part of the second derivative of a Gaussian across the line, as in the first layer of a visual cortex.
    images: (rows, 1, side, side).
    """
    return F.conv2d(images, _filters(directions).to(images), padding=_WIDTH // 2).clamp_min(0)


_WIDTH, _ALONG, _ACROSS = 7, 2.0, 0.9


def _filters(directions: int) -> Tensor:
    axis = torch.arange(_WIDTH) - _WIDTH // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    found = []
    for number in range(directions):
        angle = math.pi * number / directions
        along = x * math.cos(angle) + y * math.sin(angle)
        across = y * math.cos(angle) - x * math.sin(angle)
        bell = torch.exp(-along.square() / (2 * _ALONG**2) - across.square() / (2 * _ACROSS**2))
        weight = bell * (1 - across.square() / _ACROSS**2)
        weight = weight - weight.mean()
        found.append(2 * weight / weight.abs().sum())
    return torch.stack(found).unsqueeze(1)
