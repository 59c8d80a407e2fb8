"""The drawings of the demonstration: Omniglot's from a folder of data, or invented ones for a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hf_qep.errors import ConfigError
from unseen import strokes
from unseen.glyphs import Glyphs, Run, load_glyphs, load_runs, shared_drawings, zip_of
from unseen.presets import Preset
from unseen.warps import distorted

AGAIN = ("Greek", "Latin")
"""Alphabets of small2 whose drawings are those of small1, byte for byte."""


@dataclass(frozen=True)
class Material:
    """seen: what students see. unseen: characters of other alphabets, which only the teacher sees. known: all that the
    teacher sees, the two and others. runs: what nobody sees before the test."""

    seen: Glyphs
    unseen: Glyphs
    known: Glyphs
    runs: list[Run]


def load_material(preset: Preset, data: Path | None) -> Material:
    """Seen are some alphabets of Omniglot's smallest split, small1; unseen those of small2 that are not in it; the
    teacher knows both splits.

    Raises ConfigError if the data is not there, or if a drawing of one part is also in another one.
    """
    if preset.invented:
        return invented_material(preset.side)
    if data is None:
        raise ConfigError("there is no folder of data; give one with --data, or have it fetched with --fetch")
    first, more = (load_glyphs(zip_of(data, name), preset.side) for name in ("small1", "small2"))
    unseen = more.without(AGAIN)
    runs = load_runs(zip_of(data, "runs"), preset.side)
    found = Material(first.of(preset.seen), unseen, joined(first, unseen), runs)
    check_apart(found)
    return found


def check_apart(material: Material) -> None:
    """Raise ConfigError if a drawing of what is tested is among what is learned from, pixel by pixel."""
    tested = [digest for run in material.runs for digest in run.digests]
    pairs = {
        "the runs and what the teacher knows": (material.known.digests, tested),
        "the seen and the unseen characters": (material.seen.digests, material.unseen.digests),
    }
    for names, (left, right) in pairs.items():
        if count := shared_drawings(left, right):
            raise ConfigError(f"{count} drawings are in both {names}; the test would be of what is known")


def joined(*parts: Glyphs) -> Glyphs:
    """Characters of all parts, numbered one part after the other."""
    labels, before = [], 0
    for part in parts:
        labels.append(part.labels + before)
        before += len(part.characters)
    return Glyphs(
        torch.cat([part.images for part in parts]),
        torch.cat(labels),
        tuple(name for part in parts for name in part.characters),
        torch.cat([part.drawers for part in parts]),
        tuple(digest for part in parts for digest in part.digests),
    )


def invented_material(side: int, ways: int = 20, runs: int = 2, drawers: int = 20) -> Material:
    """Characters that a program drew, in the place of all of Omniglot."""
    make = torch.Generator().manual_seed(0)
    seen, unseen, tested = (_invented(name, ways, drawers, side, make) for name in ("Seen", "Unseen", "Tested"))
    support, queries = (tested.images[tested.drawers == drawer] for drawer in (1, 2))
    found = []
    for number in range(1, runs + 1):
        order = torch.randperm(ways, generator=make)
        digests = tuple(f"run{number}/{n}" for n in range(2 * ways))
        found.append(Run(f"run{number:02}", support, queries[order], order, digests))
    return Material(seen, unseen, joined(seen, unseen), found)


def _invented(name: str, count: int, drawers: int, side: int, make: torch.Generator) -> Glyphs:
    characters = strokes.invent(count, make)
    images = distorted(strokes.drawn(characters.again(drawers), make, side), make)
    labels = torch.arange(count).repeat(drawers)
    hands = torch.arange(1, drawers + 1).repeat_interleave(count)
    digests = tuple(f"{name}/{n}" for n in range(len(labels)))
    return Glyphs(images, labels, tuple(f"{name}/character{n + 1:02}" for n in range(count)), hands, digests)
