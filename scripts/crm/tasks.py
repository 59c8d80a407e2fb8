"""The tasks of the demonstration: their tables, their rows as files, and the examples that the teacher is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from crm.bank import load_bank
from crm.pipeline import load_pipeline
from crm.prompts import ANSWERS, asked, shown
from crm.tabular import Part, Table
from crm.worlds import NOTE, TARGET, World

from hf_qep.distill.records import RecordText
from hf_qep.extras import require
from hf_qep.files import write_text_aside

BANK, PIPELINE, WORLD = "bank", "pipeline", "world"
TARGET_WORLD = 77
"""Number of the synthetic target; teachers learn from worlds with large numbers only."""
RECENT = 2_000
"""Examples are drawn from so many of the last rows before validation."""
MOST_SHOTS = 4
"""With more the teacher is no better in worlds that it has not seen (`skill.py`)."""
BOOKS, HEADER, BOOK_SIGNS = 150, 3_000, 57_000


@dataclass(frozen=True)
class Sizes:
    """Rows of a task; None for all there are."""

    train: int | None
    valid: int | None
    test: int | None


def table_of(name: str, data: Path, sizes: Sizes, cache: Path) -> Table:
    """A task by name: `bank`, `pipeline` or `world`. Of too many rows those stay that are evenly spaced in time."""
    if name == WORLD:
        return world_table(sizes)
    table = load_bank(data, cache) if name == BANK else load_pipeline(data)
    return Table(
        table.name,
        table.question,
        _cut(table.train, sizes.train),
        _cut(table.valid, sizes.valid),
        _cut(table.test, sizes.test),
        table.numbers,
        table.notes,
        table.text,
    )


def world_table(sizes: Sizes) -> Table:
    """The synthetic target: a world with more columns, interactions and whims than those that teachers learn from."""
    world = World(TARGET_WORLD, TARGET)
    parts = []
    for seed, count in enumerate((sizes.train or 16_000, sizes.valid or 4_000, sizes.test or 9_000)):
        drawn = world.deals(count, seed)
        parts.append(Part(tuple(world.rows(drawn)), drawn.won))
    return Table(WORLD, world.question, *parts, tuple(world.numeric), (NOTE,))


def target_bayes() -> float:
    """The best possible accuracy in the synthetic target."""
    return World(TARGET_WORLD, TARGET).bayes


def general_text(data: Path) -> list[str]:
    """Texts about other things, for the generalist: books of the data folder, else the text of the demo model."""
    path = data / "text" / "books-train.parquet"
    if path.exists():
        rows = require("eval", "pyarrow.parquet").read_table(path).slice(0, BOOKS).to_pylist()
        return [row["text"][HEADER : HEADER + BOOK_SIGNS] for row in rows]
    return [(files("hf_qep") / "demo_text" / "held_out.txt").read_text(encoding="utf-8")]


def _cut(part: Part, most: int | None) -> Part:
    if most is None or most >= len(part):
        return part
    places = np.linspace(0, len(part) - 1, most).round().astype(int)
    return Part(tuple(part.rows[n] for n in places), part.yes[places])


def write_rows(path: Path, records: RecordText, part: Part) -> None:
    """Rows as `prompt` and `completion`, one JSON value per line."""
    lines = (
        json.dumps({"prompt": asked(text), "completion": ANSWERS[int(yes)]})
        for text, yes in zip(records.texts(part.rows), part.yes, strict=True)
    )
    write_text_aside(path, "".join(f"{line}\n" for line in lines))


def examples(table: Table, records: RecordText, tokenizer: Any, room: int, seed: int) -> tuple[str, int]:
    """The text that a teacher reads first, a question with solved examples, and how many there are.

    The examples are recent training rows, as many with either outcome, as fit into `room` tokens with the longest of
    these rows.
    """
    part, make = table.train, np.random.default_rng(seed)
    first = max(0, len(part) - RECENT)
    yes, no = (first + np.flatnonzero(part.yes[first:] == outcome) for outcome in (True, False))
    texts = records.texts(part.rows[first:])
    longest = max(map(len, _ids(tokenizer, [asked(text) for text in texts]))) + 2
    pairs = min(MOST_SHOTS // 2, len(yes), len(no))
    picked = np.stack([make.permutation(yes)[:pairs], make.permutation(no)[:pairs]], 1).ravel()
    for shots in range(2 * pairs, 0, -2):
        order = make.permutation(picked[:shots])
        text = shown(table.question, [texts[n - first] for n in order], part.yes[order].tolist())
        if len(_ids(tokenizer, [text])[0]) + longest <= room:
            return text, shots
    return shown(table.question, (), ()), 0


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts))["input_ids"]
