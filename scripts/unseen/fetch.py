"""The public files, for those who have no folder of data: sizes and sums are checked before a file counts."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from pathlib import Path

from hf_qep.errors import CheckpointError
from hf_qep.extras import require
from hf_qep.files import sha256
from unseen.glyphs import FOLDER, ZIPS

HOME = "https://raw.githubusercontent.com/brendenlake/omniglot/32aee47094f15296299b761dcaa01400b90c60d5/python"
TIMEOUT = 60.0
PHOTOS, PER_CLASS = "uoft-cs/cifar10", {"train": 2000, "test": 500}
"""Data set of the Hub, and images of each class that are taken: as many as in the folder that was measured with."""


@dataclass(frozen=True)
class Known:
    """A public file. size: bytes."""

    size: int
    sha256: str


SUMS = {
    "small1": Known(1_319_022, "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"),
    "small2": Known(1_580_917, "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f"),
    "runs": Known(352_787, "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325"),
}


def fetch_omniglot(data: Path) -> None:
    """Bring the three zips of Omniglot (MIT licence) into a folder of data; those that are there already stay.

    Raises CheckpointError for a file that is not the known one, byte by byte.
    """
    for name, known in SUMS.items():
        path = data / FOLDER / ZIPS[name]
        if path.is_file() and matches(path, known):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        aside.write_bytes(_read(f"{HOME}/{ZIPS[name]}", known.size))
        if not matches(aside, known):
            aside.unlink()
            raise CheckpointError(f"{HOME}/{ZIPS[name]} is not the file of {known.size} bytes that is known")
        aside.replace(path)


def fetch_photos(data: Path) -> None:
    """Bring a part of CIFAR-10 into a folder of data through `datasets`; what is there already stays.

    The images are the lossless ones; those of the page are JPEG copies, on which everything scores some points less.
    """
    datasets = require("distill", "datasets")
    for part, most in PER_CLASS.items():
        path = data / "vision" / f"cifar10-{part}.parquet"
        if path.is_file():
            continue
        rows = datasets.load_dataset(PHOTOS, split=part).cast_column("img", datasets.Image(decode=False))
        names, taken = rows.features["label"].names, dict.fromkeys(range(10), 0)
        chosen: list[int] = []
        for number, label in enumerate(rows["label"]):
            taken[label] += 1
            if taken[label] <= most:
                chosen.append(number)
        found = [{"image": row["img"]["bytes"], "label": names[row["label"]]} for row in rows.select(chosen)]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        datasets.Dataset.from_list(found).to_parquet(str(aside))
        aside.replace(path)


def matches(path: Path, known: Known) -> bool:
    """Whether a file is the known one."""
    return path.stat().st_size == known.size and sha256(path) == known.sha256


def _read(address: str, size: int) -> bytes:
    """No more than a byte beyond the size, so that a wrong file cannot fill the memory."""
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
        return answer.read(size + 1)
