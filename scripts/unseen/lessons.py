"""What all students are taught with: the same drawings of seen characters, and what the teacher says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qep.distill.pictures import centred
from unseen import strokes
from unseen.glyphs import Glyphs
from unseen.vit import embed
from unseen.warps import VARIANTS, distorted, turned

VIEWS = 4
"""Drawings that a prototype of an invented character is the mean of."""


@dataclass(frozen=True)
class Lesson:
    """Rows of one seed.

    pixels: (rows, channels, side, side) float32. labels: seen classes (rows,) int64. teacher: embeddings (rows, width)
    of length 1. bank: prototypes (prototypes, width) of length 1, of the teacher; no image of them is shown to anyone.
    """

    pixels: Tensor
    labels: Tensor
    teacher: Tensor
    bank: Tensor

    @property
    def classes(self) -> int:
        """Number of seen classes."""
        return int(self.labels.max()) + 1

    def means(self) -> Tensor:
        """Mean embedding of each seen class as the teacher sees it, (classes, width) of length 1."""
        return class_means(self.teacher, self.labels, self.classes)

    def save(self, path: Path) -> None:
        """Write a file; the pixels in float16, which all of them are rounded to already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {"pixels": self.pixels.half(), "labels": self.labels, "teacher": self.teacher, "bank": self.bank}
        aside = path.with_suffix(".new")
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, aside)
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Lesson:
        """Read a file that `save` wrote."""
        named = load_file(path)
        return cls(named["pixels"].float(), named["labels"], named["teacher"], named["bank"])


def class_means(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the embeddings of each class, (classes, width) of length 1."""
    sums = torch.zeros(classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return F.normalize(sums, dim=-1)


def glyph_lesson(teacher: Any, seen: Glyphs, *, copies: int, invented: int, seed: int) -> Lesson:
    """Seen drawings, each distorted `copies` times, turned and mirrored to VARIANTS as many classes.

    invented: prototypes of characters that a program drew; those of the seen classes come before them in the bank.
    """
    make, pixels, labels = torch.Generator().manual_seed(seed), [], []
    for _ in range(copies):
        variant = torch.randint(VARIANTS, (len(seen),), generator=make)
        pixels.append(centred(distorted(turned(seen.images, variant), make)).half().float())
        labels.append(seen.labels * VARIANTS + variant)
    rows, classes = torch.cat(pixels), _numbered(torch.cat(labels))
    said = embed(teacher, rows)
    means = class_means(said, classes, int(classes.max()) + 1)
    more = prototypes(teacher, invented, seen.images.shape[-1], make)
    return Lesson(rows, classes, said, torch.cat([means, more]))


def prototypes(teacher: Any, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Mean embeddings of invented characters, (count, width) of length 1."""
    characters = strokes.invent(count, generator)
    views = [
        embed(teacher, centred(distorted(strokes.drawn(characters, generator, side), generator))) for _ in range(VIEWS)
    ]
    return F.normalize(torch.stack(views).mean(0), dim=-1)


def _numbered(labels: Tensor) -> Tensor:
    """The same classes numbered from 0 without gaps."""
    return labels.unique(return_inverse=True)[1]
