"""The teacher: a vision transformer that is to place two drawings of one character together, and any others apart.

Its space is open, for it learns from pairs and not for a list of classes: half of the characters of a step are
Omniglot's, turned or mirrored to others, half are invented on the spot and never come again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTModel

from hf_qep.distill.pictures import centred
from hf_qep.progress import SILENT, Progress
from unseen import strokes, vit
from unseen.glyphs import Glyphs
from unseen.optimizers import Both
from unseen.presets import Preset, TeacherPlan
from unseen.warps import VARIANTS, distorted, turned

STATE = "teacher.partial.pt"
KEEP_EVERY = 100
"""Steps between two states on disk, from which a training that was stopped goes on."""


def contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each drawing's partner among all other drawings, nats (arXiv 2004.11362 with two views).

    first, second: embeddings of two drawings of each class, (classes, width).
    """
    rows = F.normalize(torch.cat([first, second]), dim=-1)
    near = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    partner = (torch.arange(len(rows)) + len(first)) % len(rows)
    return F.cross_entropy(near, partner)


@dataclass
class Pairs:
    """Two different drawings of every character of a step."""

    known: Glyphs
    plan: TeacherPlan
    generator: torch.Generator

    def __post_init__(self) -> None:
        count = len(self.known.characters)
        self._rows = [(self.known.labels == number).nonzero()[:, 0] for number in range(count)]

    def draw(self) -> tuple[Tensor, Tensor]:
        """First and second drawings, each (classes, 1, side, side), centred; a little fewer than asked for where a
        character was drawn twice."""
        make = self.generator
        count = round(self.plan.pairs * self.plan.invented)
        characters = strokes.invent(count, make)
        made = strokes.drawn(characters.again(2), make, self.known.images.shape[-1])
        taken = self._taken(self.plan.pairs - count)
        both = centred(distorted(torch.cat([made, taken]), make))
        parts = both.split([count, count, len(taken) // 2, len(taken) // 2])
        return torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])

    def _taken(self, count: int) -> Tensor:
        """Drawings of known characters in one of eight positions, all first ones before all second ones."""
        draws = torch.randint(len(self._rows) * VARIANTS, (count,), generator=self.generator).unique()
        rows = [self._two(number) for number in (draws // VARIANTS).tolist()]
        images = self.known.images[torch.stack(rows).T.flatten()]
        return turned(images, (draws % VARIANTS).repeat(2))

    def _two(self, number: int) -> Tensor:
        rows = self._rows[number]
        return rows[torch.randperm(len(rows), generator=self.generator)[:2]]


def train_teacher(
    known: Glyphs, preset: Preset, folder: Path, *, seed: int = 0, progress: Progress = SILENT
) -> ViTModel:
    """A trained teacher in eval mode. What it has learnt lies in `folder` while it trains; a new call goes on there."""
    plan = preset.teacher
    model = vit.build(plan.size, side=preset.side, channels=1, width=preset.width, seed=seed)
    optimizers = Both(model, plan.steps, plan.rate, plan.matrix_rate)
    pairs = Pairs(known, plan, torch.Generator().manual_seed(seed))
    done = _go_on(folder / STATE, model, optimizers, pairs.generator)
    with progress.bar("teacher", plan.steps) as bar:
        bar.advance(done)
        for step in range(done, plan.steps):
            first, second = pairs.draw()
            found = model(pixel_values=torch.cat([first, second])).pooler_output
            loss = contrast(found[: len(first)], found[len(first) :], plan.temperature)
            optimizers.step(loss, step)
            bar.advance(detail=f"loss {loss.item():.2f}")
            if (step + 1) % KEEP_EVERY == 0:
                _keep(folder / STATE, model, optimizers, pairs.generator, step + 1)
    (folder / STATE).unlink(missing_ok=True)
    return model.eval()


def _keep(path: Path, model: nn.Module, optimizers: Both, generator: torch.Generator, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    state = {"model": model.state_dict(), "optimizers": optimizers.state(), "generator": generator.get_state()}
    torch.save(state | {"step": step}, aside)
    aside.replace(path)


def _go_on(path: Path, model: nn.Module, optimizers: Both, generator: torch.Generator) -> int:
    """Steps that were done before."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load(state["optimizers"])
    generator.set_state(state["generator"])
    return state["step"]
