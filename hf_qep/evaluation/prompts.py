"""Local task files and the prompt forms they are asked in.

A task is a parquet, jsonl, json or csv file, or plain text. Its columns decide how it is read:

  query, choices, gold                     pick the continuation of `query`; `gold` is a position in `choices`
  context_options, continuation, gold      pick the context under which `continuation` is likelier (WinoGrande)
  context, continuation                    predict `continuation` word for word (LAMBADA); chance is taken as 0
  good, bad                                prefer the acceptable sentence of a minimal pair (BLiMP)
  question, choice0, choice1, ..., label   Japanese question, answer after it (JCommonsenseQA)
  messages, tools, expected                call the expected tools (hf_qep.evaluation.tool_calls); generated, not chosen
  text                                     pick the last words of the sentences of this text; so is a txt file read
                                           (hf_qep.evaluation.cloze)

The prompt form is reported as `own:<task>`, because scores depend on it: these forms are not those of lm_eval's
built-in tasks of the same names, and their scores must not be compared with theirs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_qep import extras
from hf_qep.errors import ConfigError, UnknownNameError
from hf_qep.evaluation.cloze import cloze_rows
from hf_qep.evaluation.tool_calls import COLUMNS, CallTask, call_task

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Item:
    """One question, rendered. Several continuations of one context, or several contexts of one continuation."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    @property
    def options(self) -> int:
        """Number of possible answers."""
        return max(len(self.contexts), len(self.continuations))


@dataclass(frozen=True)
class PromptForm:
    """How rows become questions."""

    columns: frozenset[str]
    """columns that must be present"""
    kind: Literal["choice", "context", "cloze"]
    """choice: which continuation; context: which context; cloze: is every token of the continuation the likeliest"""
    delimiter: str
    """stands between context and continuation and is scored with the latter; not counted as its length"""
    render: Callable[[Row], Item]


@dataclass(frozen=True)
class LocalTask:
    """Rendered items of one task file."""

    name: str
    form: str
    items: tuple[Item, ...]
    rows_in_file: int

    @property
    def prompt(self) -> str:
        """How records name the prompt."""
        return f"own:{self.name}"

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing: mean of 1 / number of options; 0 for cloze tasks."""
        if FORMS[self.form].kind == "cloze":
            return 0.0
        return sum(1 / item.options for item in self.items) / len(self.items)

    @property
    def majority(self) -> float | None:
        """Accuracy of always giving the most frequent position; None where the position is the same by construction."""
        golds = [item.gold for item in self.items]
        if len(set(golds)) == 1:
            return None
        return max(golds.count(g) for g in set(golds)) / len(golds)


def _continuation(row: Row) -> Item:
    return Item((row["query"].rstrip(),), _choices(row), int(row["gold"]))


def _answer(row: Row) -> Item:
    return Item((row["query"].rstrip() + "\nAnswer:",), _choices(row), int(row["gold"]))


def _choices(row: Row) -> tuple[str, ...]:
    if not isinstance(row["choices"], list):
        raise ConfigError(f"`choices` must be a list of texts, not {row['choices']!r:.60}; use parquet or jsonl")
    return tuple(row["choices"])


def _two_contexts(row: Row) -> Item:
    return Item(tuple(row["context_options"]), (row["continuation"],), int(row["gold"]))


def _cloze(row: Row) -> Item:
    return Item((row["context"].rstrip(),), (row["continuation"].lstrip(),), 0)


def _minimal_pair(row: Row) -> Item:
    return Item(("",), (row["good"], row["bad"]), 0)


def _japanese_question(row: Row) -> Item:
    keys = sorted((key for key in row if key.startswith("choice") and key[6:].isdigit()), key=lambda key: int(key[6:]))
    return Item((f"質問：{row['question']}\n回答：",), tuple(row[key] for key in keys), int(row["label"]))


_CHOICES = frozenset({"query", "choices", "gold"})

FORMS: dict[str, PromptForm] = {
    "continuation": PromptForm(_CHOICES, "choice", " ", _continuation),
    "answer": PromptForm(_CHOICES, "choice", " ", _answer),
    "two_contexts": PromptForm(frozenset({"context_options", "continuation", "gold"}), "context", " ", _two_contexts),
    "cloze": PromptForm(frozenset({"context", "continuation"}), "cloze", " ", _cloze),
    "minimal_pair": PromptForm(frozenset({"good", "bad"}), "choice", "", _minimal_pair),
    "japanese_question": PromptForm(frozenset({"question", "choice0", "label"}), "choice", "", _japanese_question),
}
"""Forms by name; the first whose columns are there is used for a task that has none of its own."""

TASK_FORMS = {"arc_easy": "answer", "arc_challenge": "answer", "piqa": "answer", "boolq": "answer"}
"""Tasks whose queries are questions and want "Answer:" before the answer."""


def own_tasks(folder: Path) -> dict[str, Path]:
    """Task files of `folder` by name (the file name without suffix), those with a known layout only."""
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    if not found:
        raise ConfigError(f"the folder {folder.name!r} holds no task file; expected {', '.join(SUFFIXES)}")
    return found


def load_task(name: str, path: Path, *, limit: int | None = None, seed: int = 0) -> LocalTask | CallTask:
    """Read and render one task.

    limit: score so many items, drawn without replacement with `seed` and kept in file order (files are often sorted
    by topic, so the first items would be one topic).
    seed: also draws the options of the items that are made of plain text.
    Raises ConfigError if the file is missing, empty, of an unknown layout or holds an impossible `gold`.
    """
    rows = read_rows(path)
    if _is_text(rows[0]):
        rows = cloze_rows([row["text"] for row in rows], seed=seed)
    total = len(rows)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1")
    if limit is not None and limit < total:
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(total), limit))]
    if rows[0].keys() >= COLUMNS:
        return call_task(name, rows, total)
    form = _form_of(name, rows[0], path)
    items = []
    for number, row in enumerate(rows):
        try:
            item = FORMS[form].render(row)
        except KeyError as error:
            raise ConfigError(f"row {number} of task {name!r} lacks the column {error}") from error
        if not 0 <= item.gold < item.options:
            raise ConfigError(f"row {number} of task {name!r} has gold={item.gold} but {item.options} options")
        items.append(item)
    return LocalTask(name, form, tuple(items), total)


def read_rows(path: Path) -> list[Row]:
    """Rows of a parquet, jsonl, json or csv file; a txt file is one row with the column `text`.

    Raises ConfigError if it is missing, unreadable or empty.
    """
    if not path.is_file():
        raise ConfigError(f"the task file {path.name!r} does not exist; give NAME=FILE or --tasks-dir FOLDER")
    if path.suffix == ".parquet":
        rows = extras.require("eval", "pyarrow.parquet").read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".csv":
        rows = extras.require("eval", "pyarrow.csv").read_csv(path).to_pylist()
    elif path.suffix == ".txt":
        rows = [{"text": path.read_text(encoding="utf-8")}]
    else:
        raise ConfigError(f"the task file {path.name!r} has an unknown type; use one of {', '.join(SUFFIXES)} or .txt")
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise ConfigError(f"the task file {path.name!r} holds no rows")
    return rows


def _is_text(row: Row) -> bool:
    """Whether the rows are plain text: they may have other columns (path, title), but those of no task."""
    return isinstance(row.get("text"), str) and not any(form.columns <= row.keys() for form in FORMS.values())


def _form_of(name: str, row: Row, path: Path) -> str:
    own = TASK_FORMS.get(name)
    if own is not None and FORMS[own].columns <= row.keys():
        return own
    for form_name, form in FORMS.items():
        if form.columns <= row.keys():
            return form_name
    layouts = "; ".join(", ".join(sorted(c)) for c in (*(form.columns for form in FORMS.values()), COLUMNS))
    raise UnknownNameError(
        f"the columns of {path.name!r} ({', '.join(row)}) fit no task layout; known layouts: {layouts}"
    )
