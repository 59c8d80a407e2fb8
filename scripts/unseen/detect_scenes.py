"""Canvases for the detector: drawings pasted on procedural textures, with the boxes of what was pasted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

TRIES = 16
"""Places drawn per object; the first that keeps apart is taken, else the object is left out."""
APART = 0.8
"""Least distance of two squares, in halves of their sides; below 1 because ink seldom reaches the edge; ours."""
INK = 0.3
"""Share of ink from which a pixel belongs to the box; ours: fainter pixels are the blur of scaling."""
TURN, SHEAR = 0.25, 0.15
"""Largest turn in radians, and largest shear."""


@dataclass(frozen=True)
class Look:
    """How canvases are made. side: pixels. least, most: pixels of a side of a drawing's square. objects: most on one
    canvas, at least 1."""

    side: int = 64
    least: float = 22.0
    most: float = 32.0
    objects: int = 3


@dataclass(frozen=True)
class Scenes:
    """Canvases and what is on them.

    images: (n, 1, side, side) float32 from 0 to 1. owner: (objects,) int64, the canvas of each object, rising.
    rows: (objects,) int64, the drawing of each object. boxes: (objects, 4) float32, centre x, centre y, width and
    height as shares of the side, tight around the ink.
    """

    images: Tensor
    owner: Tensor
    rows: Tensor
    boxes: Tensor


def paint(drawings: Tensor, chosen: Tensor, look: Look, generator: Generator) -> Scenes:
    """One canvas per row of `chosen`, with 1 to all of its drawings, set apart from each other.

    drawings: (rows, 1, size, size) float32, ink 1. chosen: (n, k) int64 rows of drawings; the first is always there.
    """
    n, k = chosen.shape
    counts = torch.randint(1, k + 1, (n, 1), generator=generator)
    shown = torch.arange(k) < counts
    sizes = look.least + (look.most - look.least) * _uniform((n, k), generator)
    centres, shown = _places(sizes, shown, look.side, generator)
    owner, column = shown.nonzero(as_tuple=True)
    layers = _layers(drawings[chosen[owner, column]], sizes[owner, column], centres[owner, column], look, generator)
    boxes, some = _boxes(layers[:, 0] > INK)
    owner, rows, boxes, layers = owner[some], chosen[owner, column][some], boxes[some], layers[some]
    return Scenes(_blended(textures(n, look.side, generator), layers, owner, generator), owner, rows, boxes)


def textures(n: int, side: int, generator: Generator) -> Tensor:
    """Grounds without objects, (n, 1, side, side) float32: noise of three grains and a grating, all of random size."""
    total = torch.zeros(n, 1, side, side)
    for grain in (4, side // 4, side):
        noise = torch.randn(n, 1, grain, grain, generator=generator)
        noise = F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
        total += _uniform((n, 1, 1, 1), generator) * noise
    angle, pitch, phase = (_uniform((n, 1, 1), generator) for _ in range(3))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    along = x * torch.cos(math.pi * angle) + y * torch.sin(math.pi * angle)
    wave = torch.sin(2 * math.pi * (along / (4 + 16 * pitch) + phase)).unsqueeze(1)
    total += _uniform((n, 1, 1, 1), generator) * wave
    total /= total.std((2, 3), keepdim=True)
    level, spread = (_uniform((n, 1, 1, 1), generator) for _ in range(2))
    return (0.35 + 0.3 * level + (0.02 + 0.06 * spread) * total).clamp(0, 1)


def _places(sizes: Tensor, shown: Tensor, side: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Centres (n, k, 2) in pixels with all squares on the canvas, and which objects (n, k) of those shown have one."""
    n, k = sizes.shape
    wide = sizes.reshape(n, k, 1, 1)
    tries = wide / 2 + (side - wide) * _uniform((n, k, TRIES, 2), generator)
    centres, kept = tries[:, :, 0].clone(), shown.clone()
    for later in range(1, k):
        gap = (tries[:, later].unsqueeze(1) - centres[:, :later].unsqueeze(2)).abs().amax(-1)
        least = APART * (sizes[:, later : later + 1] + sizes[:, :later]) / 2
        free = ((gap >= least.unsqueeze(2)) | ~kept[:, :later].unsqueeze(2)).all(1)
        centres[:, later] = tries[torch.arange(n), later, free.int().argmax(1)]
        kept[:, later] &= free.any(1)
    return centres, kept


def _layers(drawings: Tensor, sizes: Tensor, centres: Tensor, look: Look, generator: Generator) -> Tensor:
    """Each drawing alone at its place, turned and sheared a little, (objects, 1, side, side)."""
    turn, shear = (2 * _uniform((len(sizes),), generator) - 1 for _ in range(2))
    cos, sin, lean = torch.cos(TURN * turn), torch.sin(TURN * turn), SHEAR * shear
    back = torch.stack([torch.stack([cos, lean - sin], 1), torch.stack([sin, cos], 1)], 1)
    back = back * (look.side / sizes).reshape(-1, 1, 1)
    shift = -back @ (2 * centres / look.side - 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([back, shift], 2), [len(sizes), 1, look.side, look.side], align_corners=False)
    return F.grid_sample(drawings, grid, align_corners=False)


def _boxes(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (objects, 4) around what is set in (objects, side, side), and whether anything is."""
    side, spans = ink.shape[-1], []
    for axis in (1, 2):
        line = ink.any(axis)
        first, last = line.int().argmax(1), side - 1 - line.flip(1).int().argmax(1)
        spans.append(((first + last + 1) / 2, (last + 1 - first).float()))
    (x, width), (y, height) = spans
    return torch.stack([x, y, width, height], 1) / side, ink.flatten(1).any(1)


def _blended(ground: Tensor, layers: Tensor, owner: Tensor, generator: Generator) -> Tensor:
    """Ink laid over the grounds, dark or bright, more or less see-through."""
    shape = (len(owner), 1, 1, 1)
    dark = 0.2 * _uniform(shape, generator)
    colour = torch.where(_uniform(shape, generator) < 0.5, dark, 1 - dark)
    cover = (0.7 + 0.3 * _uniform(shape, generator)) * layers
    covered, paint_on = torch.zeros_like(ground), torch.zeros_like(ground)
    covered.index_add_(0, owner, cover)
    paint_on.index_add_(0, owner, cover * colour)
    over = covered.clamp_min(1)
    return ground * (1 - covered / over) + paint_on / over


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator)
