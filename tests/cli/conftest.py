"""Tiny teachers in folders and small files of rows, and one distillation that several tests look at."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers as tf
from PIL import Image

from tests.cli.distilling import CAUSAL, SEARCH, Work, distil
from tests.students.teachers import teacher

SQUARE = {"height": 16, "width": 16}
PROCESSORS = {
    "vit": lambda: tf.ViTImageProcessorPil(size=SQUARE),
    "clip_vision_model": lambda: tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE),
    "detr": lambda: tf.DetrImageProcessorPil(size={"height": 32, "width": 32}),
}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tiny_tokenizer):
    """`teacher_folder(family)`: a checkpoint of the tiny teacher with what reads its rows; do not change it."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("teachers") / family
            teacher(family).save_pretrained(folders[family])
            reader = PROCESSORS[family]() if family in PROCESSORS else tiny_tokenizer
            reader.save_pretrained(folders[family])
        return folders[family]

    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """Forty questions about two digits, as prompt and completion, and as text and label."""
    draw, rows = random.Random(0), []
    for n in range(40):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        more = {"text": f"{a}{b}", "label": ["less", "same", "more"][n % 3], "first": a, "second": b}
        rows.append({"prompt": f"is {a} > {b}?", "completion": "yes" if n % 2 else "no"} | more)
    return write_rows(tmp_path_factory.mktemp("rows") / "digits.jsonl", rows)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Forty images in five folders called as their classes."""
    folder, draw = tmp_path_factory.mktemp("images") / "letters", np.random.default_rng(0)
    for n in range(40):
        (folder / "abcde"[n % 5]).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 100, (16, 16, 3)) + 30 * (n % 5)
        Image.fromarray(pixels.astype("uint8")).save(folder / "abcde"[n % 5] / f"{n}.png")
    return folder


@pytest.fixture(scope="session")
def image_parquet(tmp_path_factory, image_folder):
    """The same images as bytes in one file."""
    files = sorted(image_folder.glob("*/*.png"))
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = datasets.Dataset.from_dict({"image": images, "label": ["abcde".index(f.parent.name) for f in files]})
    table.to_parquet(tmp_path_factory.getbasetemp() / "letters.parquet")
    return tmp_path_factory.getbasetemp() / "letters.parquet"


@pytest.fixture(scope="session")
def scenes_file(tmp_path_factory):
    """Twenty images of one size with none to two objects; paths are relative to the file."""
    folder, draw, rows = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0), []
    for n in range(20):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3)).astype("uint8")).save(folder / f"{n}.png")
        boxes = [[4 * k + 2, 5, 10, 12] for k in range(n % 3)]
        rows.append({"image": f"{n}.png", "objects": {"bbox": boxes, "category": list(range(len(boxes)))}})
    return write_rows(folder / "scenes.jsonl", rows)


@pytest.fixture(scope="session")
def question_work(tmp_path_factory, teacher_folder, rows_file):
    """A language model with two answers: analysed and searched, with a trimmed vocabulary and 1-bit students."""
    work = Work(tmp_path_factory.mktemp("work") / "questions")
    work.analysis = distil("analyze", teacher_folder("llama"), "--data", rows_file, "--out", work.folder, *CAUSAL)
    more = ("--trim-vocabulary", "--bits", 1, "--max-added", 1)
    work.search = distil("search", work.folder, "--parameters", 65_000, *SEARCH, *more)
    return work


@pytest.fixture(scope="session")
def sentence_work(tmp_path_factory, teacher_folder, rows_file):
    """A classifier of texts: analysed, and searched for students with a trimmed vocabulary."""
    work = Work(tmp_path_factory.mktemp("work") / "sentences")
    words = ("--data", rows_file, "--task", "text-classification", "--out", work.folder)
    classes = (word for name in ("less", "same", "more") for word in ("--classes", name))
    work.analysis = distil("analyze", teacher_folder("bert_classifier"), *words, *classes)
    work.search = distil("search", work.folder, "--parameters", 80_000, *SEARCH, "--trim-vocabulary")
    return work
