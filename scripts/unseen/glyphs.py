"""Omniglot: handwritten characters of many alphabets (Lake et al., Science 2015), read from its zips member by member.

Nothing is extracted, and the `__MACOSX` entries are passed over.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.extras import require

SIZE = 28
"""Pixels of a side after scaling."""
ZIPS = {
    "small1": "images_background_small1.zip",
    "small2": "images_background_small2.zip",
    "runs": "one-shot-classification/all_runs.zip",
}
FOLDER = Path("vision") / "omniglot"
"""Where the zips lie in a folder of data."""
_SIDE, _LARGEST = 105, 1 << 20


@dataclass(frozen=True)
class Glyphs:
    """Drawings of characters.

    images: (rows, 1, size, size) float32, ink 1 and ground 0. labels: (rows,) int64, numbers into `characters`.
    characters: "Alphabet/character01". drawers: (rows,) int64, 1 to 20. digests: SHA-256 of each row's full drawing.
    """

    images: Tensor
    labels: Tensor
    characters: tuple[str, ...]
    drawers: Tensor
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def alphabets(self) -> tuple[str, ...]:
        """Names of the alphabets, each once, in the order of the characters."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.characters))

    def of(self, alphabets: Collection[str]) -> Glyphs:
        """The characters of some alphabets, numbered anew. Raises ConfigError for an alphabet that is not here."""
        if missing := sorted(set(alphabets) - set(self.alphabets)):
            raise ConfigError(f"there is no alphabet {missing[0]!r}; there are {', '.join(self.alphabets)}")
        names = tuple(name for name in self.characters if name.partition("/")[0] in alphabets)
        number = {self.characters.index(name): n for n, name in enumerate(names)}
        rows = [row for row, label in enumerate(self.labels.tolist()) if label in number]
        labels = torch.tensor([number[int(self.labels[row])] for row in rows])
        digests = tuple(self.digests[row] for row in rows)
        return Glyphs(self.images[rows], labels, names, self.drawers[rows], digests)

    def without(self, alphabets: Collection[str]) -> Glyphs:
        """All characters but those of some alphabets."""
        return self.of([name for name in self.alphabets if name not in alphabets])


@dataclass(frozen=True)
class Run:
    """One official run: 20 characters of one alphabet that has no drawing elsewhere, one drawing each, 20 questions.

    support: (20, 1, size, size), one drawing per class. queries: the same shape, by another drawer. answers: (20,)
    int64, the class of each query. digests: of the full drawings, support first.
    """

    name: str
    support: Tensor
    queries: Tensor
    answers: Tensor
    digests: tuple[str, ...]


def load_glyphs(path: Path, size: int = SIZE) -> Glyphs:
    """Characters of a zip of Omniglot's background set. Raises CheckpointError for a file that is none."""
    names, labels, drawers, images, digests = {}, [], [], [], []
    with _opened(path) as archive:
        for member in sorted(_drawings(archive)):
            parts = member.split("/")
            found = re.fullmatch(r"\d+_(\d+)\.png", parts[-1])
            if len(parts) < 3 or found is None:
                raise CheckpointError(f"{str(path)!r} holds {member!r}, which is no drawing of a character")
            labels.append(names.setdefault("/".join(parts[-3:-1]), len(names)))
            drawers.append(int(found[1]))
            image, digest = _drawing(archive, member)
            images.append(image)
            digests.append(digest)
    if not labels:
        raise CheckpointError(f"{str(path)!r} holds no drawing of a character")
    scaled = _scaled(images, size)
    return Glyphs(scaled, torch.tensor(labels), tuple(names), torch.tensor(drawers), tuple(digests))


def load_runs(path: Path, size: int = SIZE) -> list[Run]:
    """The official one-shot runs, in order. Raises CheckpointError for a file that is none."""
    with _opened(path) as archive:
        lists = sorted(name for name in _members(archive) if name.endswith("class_labels.txt"))
        if not lists:
            raise CheckpointError(f"{str(path)!r} holds no list of class labels of a one-shot run")
        return [_run(archive, name, size) for name in lists]


def zip_of(data: Path, name: str) -> Path:
    """Path of one of `ZIPS` in a folder of data. Raises ConfigError if it is not there."""
    path = data / FOLDER / ZIPS[name]
    if not path.is_file():
        raise ConfigError(f"there is no {str(path)!r}; give a folder of data with --data, or run with --fetch")
    return path


def shared_drawings(left: Sequence[str], right: Sequence[str]) -> int:
    """How many drawings of `right` are also in `left`, by digest, bit by bit."""
    known = set(left)
    return sum(digest in known for digest in right)


def _run(archive: zipfile.ZipFile, labels: str, size: int) -> Run:
    root = labels.removesuffix("class_labels.txt")
    pairs = [line.split() for line in archive.read(labels).decode().splitlines() if line.strip()]
    prefix = root.rstrip("/").rpartition("/")[0]
    queries, right = ([_joined(prefix, pair[side]) for pair in pairs] for side in (0, 1))
    support = sorted(name for name in _drawings(archive) if name.startswith(f"{root}training/"))
    if len(support) != len(pairs) or not set(right) <= set(support):
        raise CheckpointError(f"{labels!r} does not belong to the {len(support)} training drawings beside it")
    drawings = [_drawing(archive, name) for name in support + queries]
    images, digests = (tuple(column) for column in zip(*drawings, strict=True))
    scaled = _scaled(images, size)
    answers = torch.tensor([support.index(name) for name in right])
    return Run(root.rstrip("/").rpartition("/")[2], scaled[: len(support)], scaled[len(support) :], answers, digests)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{str(path)!r} is no zip that can be read: {error}") from error


def _members(archive: zipfile.ZipFile) -> Iterator[str]:
    return (name for name in archive.namelist() if not name.startswith("__MACOSX/"))


def _drawings(archive: zipfile.ZipFile) -> Iterator[str]:
    return (name for name in _members(archive) if name.endswith(".png"))


def _drawing(archive: zipfile.ZipFile, member: str) -> tuple[Tensor, str]:
    """Ink of a drawing, (105, 105) bool, and the digest of it."""
    if archive.getinfo(member).file_size > _LARGEST:
        raise CheckpointError(f"the drawing {member!r} is larger than {_LARGEST} bytes; the zip is not safe")
    with require("distill", "PIL.Image").open(io.BytesIO(archive.read(member))) as found:
        if found.size != (_SIDE, _SIDE):
            raise CheckpointError(f"the drawing {member!r} has {found.size} pixels, not {_SIDE} x {_SIDE}")
        ink = ~np.asarray(found.convert("1"))
    return torch.from_numpy(ink), hashlib.sha256(np.packbits(ink).tobytes()).hexdigest()


def _scaled(ink: Sequence[Tensor], size: int) -> Tensor:
    """(rows, 1, size, size) float32: the share of each pixel that is ink."""
    return F.interpolate(torch.stack(list(ink)).unsqueeze(1).float(), size=(size, size), mode="area")
