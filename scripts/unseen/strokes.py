"""Characters that nobody ever wrote, drawn by a program: curves that begin anywhere or on an earlier curve.

A character is a handful of control points; each drawing of it moves them a little, as a hand does. There are as many
characters as one likes, and none of them is one of Omniglot's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POINTS, STROKES, SAMPLES = 6, 4, 22
"""Control points of a stroke, most strokes of a character, places along a stroke at which it is drawn."""
HOW_MANY = (0.25, 0.4, 0.25, 0.1)
"""Share of characters with one, two, three and four strokes."""
EXTENT = 0.75
"""Half of the larger side of a character, where that of the image is 1."""


@dataclass(frozen=True)
class Characters:
    """Control points (characters, STROKES, POINTS, 2), x and y from -1 to 1; which strokes there are."""

    points: Tensor
    there: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def again(self, times: int) -> Characters:
        """All of them several times over, whole rounds behind one another."""
        return Characters(self.points.repeat(times, 1, 1, 1), self.there.repeat(times, 1))


def invent(count: int, generator: torch.Generator) -> Characters:
    """New characters."""
    shares = torch.tensor(HOW_MANY)
    strokes = torch.multinomial(shares, count, replacement=True, generator=generator) + 1
    points = _walks(count, generator)
    for stroke in range(1, STROKES):
        _join(points, stroke, generator)
    return Characters(_fitted(points, there := torch.arange(STROKES) < strokes.unsqueeze(1)), there)


def drawn(characters: Characters, generator: torch.Generator, size: int = 28, jitter: float = 0.05) -> Tensor:
    """One drawing of each character, (characters, 1, size, size) float32, ink 1 and ground 0.

    jitter: standard deviation of where a stroke lies; its points move half as much again on their own. The pen is as
    wide as Omniglot's at 28 pixels, more or less.
    """
    points = characters.points
    points = points + jitter / 2 * torch.randn(points.shape, generator=generator)
    points = points + jitter * torch.randn(len(points), STROKES, 1, 2, generator=generator)
    curves = torch.einsum("ek,nskd->nsed", _spline(), points)
    curves = torch.where(characters.there[..., None, None], curves, 99.0).flatten(1, 2)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = (curves[..., n : n + 1].sub(axis).square() for n in (0, 1))
    nearest = torch.full((len(points), size, size), torch.inf)
    for place in range(curves.shape[1]):
        torch.minimum(nearest, y[:, place, :, None] + x[:, place, None, :], out=nearest)
    pen = 0.55 + 0.35 * torch.rand(len(points), 1, 1, generator=generator)
    return (pen + 0.5 - nearest.sqrt() * size / 2).clamp(0, 1).unsqueeze(1)


def _walks(count: int, generator: torch.Generator) -> Tensor:
    """Strokes as walks that turn evenly, and now and then sharply."""
    shape = (count, STROKES, POINTS - 1)
    start = torch.rand(count, STROKES, 1, 2, generator=generator) * 1.6 - 0.8
    heading = torch.rand(count, STROKES, 1, generator=generator) * 2 * math.pi
    curl = 0.6 * torch.randn(count, STROKES, 1, generator=generator)
    turns = curl + 0.35 * torch.randn(shape, generator=generator)
    sharp = torch.rand(shape, generator=generator) < 0.2
    heading = heading + (turns + sharp * 1.5 * torch.randn(shape, generator=generator)).cumsum(-1)
    length = 0.15 + 0.45 * torch.rand(count, STROKES, 1, generator=generator)
    length = length * (0.6 + 0.8 * torch.rand(shape, generator=generator))
    steps = torch.stack([heading.cos(), heading.sin()], -1) * length.unsqueeze(-1)
    return torch.cat([start, start + steps.cumsum(2)], 2)


def _join(points: Tensor, stroke: int, generator: torch.Generator) -> None:
    """Move a stroke of half of the characters, with its beginning or its middle, onto an earlier one."""
    rows = torch.arange(len(points))
    earlier = torch.randint(stroke, (len(points),), generator=generator)
    goal = torch.randint(POINTS, (len(points),), generator=generator)
    own = torch.randint(2, (len(points),), generator=generator) * (POINTS // 2)
    joins = torch.rand(len(points), 1, 1, generator=generator) < 0.5
    points[:, stroke] += joins * (points[rows, earlier, goal] - points[rows, stroke, own]).unsqueeze(1)


def _fitted(points: Tensor, there: Tensor) -> Tensor:
    """Characters in the middle, scaled to EXTENT, small ones less so."""
    seen = there[..., None, None]
    most = torch.where(seen, points, -torch.inf).amax((1, 2))
    least = torch.where(seen, points, torch.inf).amin((1, 2))
    half = ((most - least).amax(-1) / 2).clamp_min(0.3)
    return EXTENT * (points - ((most + least) / 2)[:, None, None]) / half[:, None, None, None]


def _spline() -> Tensor:
    """Weights (SAMPLES, POINTS) of the control points at places along a Catmull-Rom curve through them."""
    place = torch.linspace(0, POINTS - 1, SAMPLES)
    first = place.long().clamp_max(POINTS - 2)
    u, eye = (place - first).unsqueeze(1), torch.eye(POINTS)
    a, b, c, d = (eye[(first + n).clamp(0, POINTS - 1)] for n in (-1, 0, 1, 2))
    return (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3) / 2
