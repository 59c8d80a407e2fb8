"""CIFAR-10 with classes held out: the teacher knows all ten, as CLIP knows words, and students see six.

Extra evidence and no more: JPEG copies of a part of CIFAR-10, and a teacher that learns for minutes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_qep.errors import ConfigError
from hf_qep.extras import require
from hf_qep.progress import Progress
from unseen import vit
from unseen.lessons import Lesson, class_means
from unseen.optimizers import Both
from unseen.presets import Cifar, Preset
from unseen.vit import embed

SIDE, SHIFT, BATCH, SCALE = 32, 4, 128, 16.0
"""Pixels of a side, most pixels that an image is moved, rows of a step of the teacher, its inverse temperature."""
EPISODES, QUERIES = 100, 15
"""Episodes of a test, and queries of each of its classes."""
INSTANCES = 1024
"""Seen images whose embeddings stand in the bank as prototypes of themselves."""


@dataclass(frozen=True)
class Pictures:
    """images: (rows, 3, 32, 32) float32, 0 to 1 less the mean. labels: (rows,) int64 into `classes`."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def of(self, names: tuple[str, ...]) -> Pictures:
        """Rows of some classes, numbered in the order of `names`."""
        numbers = torch.full((len(self.classes),), -1)
        for place, name in enumerate(names):
            numbers[self.classes.index(name)] = place
        labels = numbers[self.labels]
        return Pictures(self.images[labels >= 0], labels[labels >= 0], names)


def load_pictures(path: Path) -> Pictures:
    """Rows of a Parquet file with `image` (bytes of a file) and `label` (name). Raises ConfigError if there is none."""
    if not path.is_file():
        raise ConfigError(f"there is no {str(path)!r}; give a folder of data with --data, or leave out the part cifar")
    table = require("distill", "pyarrow.parquet").read_table(path).to_pydict()
    opened = require("distill", "PIL.Image").open
    images = np.stack([np.asarray(opened(io.BytesIO(value)).convert("RGB")) for value in table["image"]])
    classes = tuple(sorted(set(table["label"])))
    labels = torch.tensor([classes.index(name) for name in table["label"]])
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5, labels, classes)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and moved by up to SHIFT pixels; what comes in at the edge is a mirror image."""
    rows, side = len(images), images.shape[-1]
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    start = torch.randint(2 * SHIFT + 1, (2, rows, 1), generator=generator) + torch.arange(side)
    mirror = torch.rand(rows, 1, generator=generator) < 0.5
    columns = torch.where(mirror, start[1].flip(-1), start[1])
    return padded[torch.arange(rows)[:, None, None], :, start[0][:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Photos:
    """CIFAR-10 as a task, see `tasks.Task`."""

    name, measure = "cifar", "unseen"

    def __init__(self, preset: Preset, data: Path | None) -> None:
        if preset.cifar is None or data is None:
            raise ConfigError("CIFAR-10 needs a preset that has it and a folder of data; leave out the part cifar")
        self.sizes: Cifar = preset.cifar
        self.width, self.folder, self.seeds = preset.width, data / "vision", self.sizes.seeds
        self.plan = replace(preset.student, steps=self.sizes.steps, rate=self.sizes.rate)
        self.search = replace(preset.search, trials=self.sizes.trials, climbers=9)

    @cached_property
    def train(self) -> Pictures:
        """Images to learn from, of all classes."""
        return load_pictures(self.folder / "cifar10-train.parquet")

    @cached_property
    def test(self) -> Pictures:
        """Images of the test, of the unseen classes."""
        return load_pictures(self.folder / "cifar10-test.parquet").of(self.sizes.unseen)

    @cached_property
    def seen(self) -> Pictures:
        """Images to learn from, of the seen classes."""
        return self.train.of(tuple(name for name in self.train.classes if name not in self.sizes.unseen))

    def teacher(self, folder: Path, progress: Progress) -> Any:
        """Trained on all ten classes by a normalised softmax; not resumed, for it takes a minute."""
        model = vit.build(self.sizes.size, side=SIDE, channels=3, width=self.width, seed=0)
        directions = nn.Parameter(torch.randn(len(self.train.classes), self.width, generator=_seeded(0)))
        steps, make = self.sizes.teacher_steps, _seeded(0)
        optimizers = Both(model, steps, rate=1e-3, matrix_rate=0.02, more=[directions])
        with progress.bar("teacher of photos", steps) as bar:
            for step in range(steps):
                rows = torch.randint(len(self.train.labels), (BATCH,), generator=make)
                found = model(pixel_values=moved(self.train.images[rows], make)).pooler_output
                near = F.normalize(found, dim=-1) @ F.normalize(directions, dim=-1).T
                loss = F.cross_entropy(SCALE * near, self.train.labels[rows])
                optimizers.step(loss, step)
                bar.advance(detail=f"loss {loss.item():.2f}")
        return model.eval()

    def lesson(self, teacher: Any, seed: int) -> Lesson:
        """Some images of the seen classes; the bank holds the class means and embeddings of other seen images."""
        make = _seeded(seed)
        order = torch.randperm(len(self.seen.labels), generator=make)[: self.sizes.rows + INSTANCES]
        rows, others = order[: self.sizes.rows], order[self.sizes.rows :]
        pixels, labels = moved(self.seen.images[rows], make).half().float(), self.seen.labels[rows]
        said = embed(teacher, pixels)
        means = class_means(said, labels, len(self.seen.classes))
        return Lesson(pixels, labels, said, torch.cat([means, embed(teacher, self.seen.images[others])]))

    def judge(self, model: Any) -> dict[str, list[list[float]]]:
        """`unseen`: share of right answers of each episode, nearest mean of `shots` images of each unseen class."""
        found, make, right = embed(model, self.test.images), _seeded(0), []
        rows = [(self.test.labels == number).nonzero()[:, 0] for number in range(len(self.test.classes))]
        shots = self.sizes.shots
        for _ in range(EPISODES):
            drawn = [own[torch.randperm(len(own), generator=make)[: shots + QUERIES]] for own in rows]
            means = F.normalize(torch.stack([found[own[:shots]].mean(0) for own in drawn]), dim=-1)
            queries = torch.stack([found[own[shots:]] for own in drawn])
            named = (queries @ means.T).argmax(-1) == torch.arange(len(rows)).unsqueeze(1)
            right.append([named.float().mean().item()])
        return {"unseen": right}

    def references(self) -> dict[str, float]:
        """Chance."""
        return {"chance": 1 / len(self.sizes.unseen)}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
