"""Where calibration and evaluation text comes from: local files, Hub data sets, lists in memory, weighted mixes.

A *document* is one string, or one chat: a list of {"role", "content"}. One text file is one document; one row of a
json, jsonl, csv or parquet file, or of a Hub data set, is one document. Line ends become "\\n"; empty rows are left
out.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qep.errors import CalibrationError
from hf_qep.extras import require

Document = str | list[dict[str, Any]]

PREFERRED_COLUMNS = ("text", "messages")
SHUFFLE_BUFFER = 1000
"""Rows of a streamed Hub data set that are held for shuffling."""


@dataclass(frozen=True)
class TextSource:
    """Documents under one name.

    name: what records show: a file name without its folder, or a Hub id.
    rows: random access, or None for a stream.
    stream: a `datasets.IterableDataset` when `rows` is None, read at `column`.
    """

    name: str
    rows: Sequence[Any] | None = None
    stream: Any = None
    column: str = ""

    def in_order(self) -> Iterator[Document]:
        """Documents as they are stored."""
        rows = self.rows if self.rows is not None else (row[self.column] for row in self.stream)
        return self._documents(rows)

    def shuffled(self, seed: int) -> Iterator[Document]:
        """Documents in an order drawn by `seed`; only the rows asked for are decoded."""
        if self.rows is None:
            rows = (row[self.column] for row in self.stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
        else:
            order = list(range(len(self.rows)))
            random.Random(f"{seed}:{self.name}").shuffle(order)
            rows = (self.rows[i] for i in order)
        return self._documents(rows)

    def _documents(self, rows: Iterable[Any]) -> Iterator[Document]:
        for row in rows:
            document = _document(row, self.name)
            if document:
                yield document


def read_texts(spec: Any, *, limit: int | None = None, seed: int = 0) -> list[str]:
    """Texts of a file, a Hub data set, a list of strings or a mix of them, without tokenising.

    limit: at most this many documents, drawn by `seed`; None reads all, in stored order. A mix gives each source its
    share of `limit`.

    Raises CalibrationError for an empty or unreadable source, and for chats, which only a tokenizer can turn into text.
    """
    sources = open_sources(spec)
    shares = [None] * len(sources) if limit is None else apportion([w for _, w in sources], limit)
    texts = [t for (source, _), share in zip(sources, shares, strict=True) for t in _take(source, share, seed)]
    if not texts:
        raise CalibrationError(f"{describe_spec(spec)} holds no text; give a source with at least one non-empty row")
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(f"{describe_spec(spec)} holds chats, not text; name a text column (`file:column`)")
    return texts


def open_sources(spec: Any) -> list[tuple[TextSource, float]]:
    """The sources of `spec` with weights that add up to 1.

    spec: a path or Hub id, "a.txt*0.7,b.jsonl*0.3", [("a.txt", 0.7), ("b.jsonl", 0.3)], or a list of documents.
    """
    if isinstance(spec, Path):
        spec = str(spec)
    if isinstance(spec, str):
        parts = _split_mix(spec)
    elif is_mix(spec):
        parts = list(spec)
    elif isinstance(spec, list | tuple):
        parts = [(TextSource("list in memory", list(spec)), 1.0)]
    else:
        raise CalibrationError(
            f"a data set of type {type(spec).__name__} is not text; give a file, a Hub id, a list of strings or a mix"
        )
    weights = [_weight(weight, name) for name, weight in parts]
    return [
        (name if isinstance(name, TextSource) else open_source(name), weight / sum(weights))
        for (name, _), weight in zip(parts, weights, strict=True)
    ]


def is_mix(spec: Any) -> bool:
    """Whether `spec` is a list of (source, weight) pairs."""
    return (
        isinstance(spec, list | tuple)
        and bool(spec)
        and all(
            isinstance(part, tuple | list)
            and len(part) == 2
            and isinstance(part[0], str | Path | list)
            and isinstance(part[1], int | float)
            and not isinstance(part[1], bool)
            for part in spec
        )
    )


def open_source(spec: Any) -> TextSource:
    """One source without a weight: a list of documents, a local file (`name.ext`, `name.ext:column`,
    `name.ext#column`) or a Hub id (`id`, `id:config`, `id:config:split`, `id:config:split:column`).
    """
    if isinstance(spec, list):
        return TextSource("list in memory", spec)
    path, column = _split_column(str(spec))
    if path.is_dir():
        raise CalibrationError(f"{str(spec)!r} is a folder; name one file in it, or mix several: 'a.txt*0.5,b.txt*0.5'")
    if path.exists() or path.suffix.lower() in _READERS:
        return _open_file(path, column)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:/\\]*){0,3}", str(spec)):
        raise CalibrationError(f"the calibration file {str(spec)!r} does not exist; check the path")
    return _open_hub(str(spec))


def describe_spec(spec: Any) -> str:
    """`spec` in a few words for messages; folders of local files are left out."""
    if isinstance(spec, str | Path):
        return f"the data set {Path(str(spec)).name if Path(str(spec)).is_absolute() else str(spec)!r}"
    return f"the data set given as a {type(spec).__name__}"


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `weights` that add up to it (largest remainders first)."""
    exact = [w / math.fsum(weights) * total for w in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _take(source: TextSource, limit: int | None, seed: int) -> list[Document]:
    if limit is None:
        return list(source.in_order())
    return [document for document, _ in zip(source.shuffled(seed), range(limit), strict=False)]


def _split_mix(spec: str) -> list[tuple[str, float]]:
    """ "a.txt*0.7,b.jsonl*0.3" as pairs; a name that is a file is never taken apart."""
    if Path(spec).exists() or not re.search(r"[*,]", spec):
        return [(spec, 1.0)]
    parts = []
    for part in spec.split(","):
        name, star, weight = part.strip().rpartition("*")
        if not star:
            name, weight = part.strip(), "1"
        try:
            parts.append((name, float(weight)))
        except ValueError:
            raise CalibrationError(f"the weight {weight!r} of {name!r} is not a number; write 'a.txt*0.7'") from None
    return parts


def _weight(value: Any, name: Any) -> float:
    if not math.isfinite(value) or value <= 0:
        raise CalibrationError(f"the weight {value!r} of {name!r} must be a number above 0; or leave the source out")
    return float(value)


def _split_column(spec: str) -> tuple[Path, str | None]:
    """A file name and its column; the separator counts only when the whole is not a file."""
    whole = Path(spec)
    if not whole.exists():
        for separator in "#:":
            name, found, column = spec.rpartition(separator)
            if found and (Path(name).is_file() or Path(name).suffix.lower() in _READERS):
                return Path(name), column
    return whole, None


def _open_file(path: Path, column: str | None) -> TextSource:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(f"unknown file type {path.suffix!r} of {path.name!r}; known: {', '.join(_READERS)}")
    if not path.is_file():
        raise CalibrationError(f"the calibration file {path.name!r} does not exist; check the path")
    try:
        rows = reader(path, column)
    except CalibrationError:
        raise
    except Exception as error:  # each reader has its own family of errors; all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(f"cannot read {path.name!r} as {path.suffix[1:]}: {reason}; check the file") from error
    if not len(rows):
        raise CalibrationError(f"{path.name!r} is empty; give a file with at least one non-empty row")
    return TextSource(path.name if column is None else f"{path.name}:{column}", rows)


def _read_txt(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise CalibrationError(f"{path.name!r} is plain text and has no column {column!r}; leave the column out")
    text = path.read_text(encoding="utf-8-sig")
    return [text] if text.strip() else []


def _read_json(path: Path, column: str | None) -> list[Any]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise CalibrationError(f"{path.name!r} holds a json {type(rows).__name__}; give a list of strings or objects")
    return _column_of_objects(rows, column, path.name)


def _read_jsonl(path: Path, column: str | None) -> list[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        return _column_of_objects([json.loads(line) for line in lines if line.strip()], column, path.name)


def _read_csv(path: Path, column: str | None) -> list[Any]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return _column_of_objects(list(csv.DictReader(lines)), column, path.name)
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, column: str | None) -> Sequence[Any]:
    parquet = require("eval", "pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        types = {field.name: str(field.type) for field in schema}
        strings = [name for name, kind in types.items() if "string" in kind and "list" not in kind]
        name = _choose_column(list(types), strings, column, path.name)
        return _ArrowRows(file.read(columns=[name]).column(name))


_READERS = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


class _ArrowRows(Sequence):
    """Rows of an arrow column, decoded one by one: 128 windows do not need 140 MB of Python strings."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


def _column_of_objects(rows: list[Any], column: str | None, name: str) -> list[Any]:
    """One column of a list of json objects; a list of strings, or of chats, is its own column."""
    if not rows or (column is None and not isinstance(rows[0], dict)):
        return rows
    if not isinstance(rows[0], dict):
        raise CalibrationError(f"the rows of {name!r} are not objects and have no column {column!r}; leave it out")
    strings = [key for key, value in rows[0].items() if isinstance(value, str)]
    chosen = _choose_column(list(rows[0]), strings, column, name)
    missing = next((i for i, row in enumerate(rows) if not isinstance(row, dict) or chosen not in row), None)
    if missing is not None:
        raise CalibrationError(f"row {missing} of {name!r} has no column {chosen!r}; every row must have it")
    return [row[chosen] for row in rows]


def _choose_column(columns: list[str], strings: list[str], wanted: str | None, name: str) -> str:
    """The column asked for; else `text` or `messages`; else the only one that holds strings."""
    if wanted is not None:
        if wanted not in columns:
            raise CalibrationError(f"{name!r} has no column {wanted!r}; its columns: {', '.join(map(str, columns))}")
        return wanted
    for preferred in PREFERRED_COLUMNS:
        if preferred in columns:
            return preferred
    if len(strings) != 1:
        raise CalibrationError(
            f"{name!r} has no column `text` or `messages`; name one of its columns ({', '.join(map(str, columns))}) "
            f"as '{name}:column'"
        )
    return strings[0]


def _open_hub(spec: str) -> TextSource:
    """A Hub data set, streamed: only the rows that are used are downloaded."""
    datasets = require("eval", "datasets")
    identifier, config, split, column = (*spec.split(":"), "", "", "")[:4]
    try:
        stream = datasets.load_dataset(identifier, config or None, split=split or "train", streaming=True)
        first = next(iter(stream), None)
    except Exception as error:  # datasets and the Hub client raise many kinds; all mean that it cannot be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"cannot load the data set {spec!r}: {reason}; give a local file or a Hub id as 'id:config:split:column'"
        ) from error
    if first is None:
        raise CalibrationError(f"the split {split or 'train'!r} of {identifier!r} is empty; name another split")
    strings = [key for key, value in first.items() if isinstance(value, str)]
    chosen = _choose_column(list(first), strings, column or None, identifier)
    return TextSource(spec, stream=stream, column=chosen)


def _document(row: Any, name: str) -> Document | None:
    """A row as a document; None for an empty one."""
    if row is None:
        return None
    if isinstance(row, str):
        return row.replace("\r\n", "\n") if row.strip() else None
    if isinstance(row, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in row):
        return row or None
    raise CalibrationError(
        f"a row of {name!r} is a {type(row).__name__}; give strings, or chats as lists of {{'role', 'content'}}"
    )
