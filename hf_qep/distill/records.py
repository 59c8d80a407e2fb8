"""Rows of a table as one line of text that a small language model can read."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_qep.errors import ConfigError
from hf_qep.files import write_text_aside

Value = str | float | int | bool | None
Row = Mapping[str, Value]

NUMBER, CATEGORY, NOTE = "number", "category", "note"
MISSING, OTHER, BELOW_ZERO = "missing", "other", "negative"
MOST_LEVELS = 100


@dataclass(frozen=True)
class RecordColumn:
    """How one column is written.

    column: its key in a row. name: the phrase before the value. kind: "number", "category" or "note".
    special: values with a word of their own, as (value, word); values of a category as `plain` gives them.
    negative: numbers below zero are all written "negative".
    edges: of a number, rising, as (edge, percent): a value above an edge has at least this level.
    values: of a category, those of the training rows, as `plain` gives them.
    """

    column: str
    name: str
    kind: str
    special: tuple[tuple[float | str, str], ...] = ()
    negative: bool = False
    edges: tuple[tuple[float, int], ...] = ()
    values: tuple[str, ...] = ()

    def word(self, value: Value) -> str:
        """What is written for a value; every value has a word."""
        if self.kind == NOTE:
            return MISSING if _missing(value) else " ".join(str(value).split()) or MISSING
        if self.kind == CATEGORY:
            known = plain(value)
            if not words(known):
                return MISSING
            return dict(self.special).get(known) or (words(known) if known in self.values else OTHER)
        if _missing(value):
            return MISSING
        number = _number(value)
        if number is None:
            return OTHER
        return dict(self.special).get(number) or self._level(number)

    def _level(self, number: float) -> str:
        if self.negative and number < 0:
            return BELOW_ZERO
        if not self.edges:
            return OTHER
        above = bisect_left(self.edges, number, key=lambda edge: edge[0])
        return f"p{self.edges[above - 1][1] if above else 0}"


@dataclass(frozen=True)
class RecordText:
    """Writes rows as `age p40 ; job blue collar ; days since last contact never`.

    A number is written as its level among the training rows: p70 is above at least 70 % of them. Numbers as such would
    be taken apart into tokens that mean nothing to a small model; ten levels are ten words. A category is written in
    lower case without punctuation inside it; one that the training rows do not have is "other". Nothing is "missing".
    Notes stay as they are, at the end, on the same line.
    """

    columns: tuple[RecordColumn, ...]

    @classmethod
    def fit(
        cls,
        rows: Sequence[Row],
        columns: Sequence[str] | None = None,
        *,
        names: Mapping[str, str] | None = None,
        levels: int = 10,
        numbers: Collection[str] = (),
        notes: Collection[str] = (),
        special: Mapping[str, Mapping[Value, str]] | None = None,
        negative: Collection[str] = (),
    ) -> RecordText:
        """Learn levels and categories from training rows.

        columns: what is written, in this order; default: all of the first row. Notes come last in any case.
        names: column -> phrase; default: the words of the column. levels: 2 to 100 per number. numbers: columns of
        numbers; those whose values are all int or float are numbers without being named, texts such as "12" are not.
        notes: columns of free text. special: column -> value -> word, e.g. {"pdays": {-1: "never"}}; such a value is no
        part of the levels. negative: columns whose numbers below zero are written "negative", no part of the levels.
        Raises ConfigError that names the column for one that a row lacks, options of unknown columns, a number that is
        none, categories that would read alike, and names that are empty, alike or hold a ";".
        """
        if not rows:
            raise ConfigError("there is no row to learn the levels and categories of columns from")
        if not 2 <= levels <= MOST_LEVELS:
            raise ConfigError(f"levels must be 2 to {MOST_LEVELS}, not {levels}")
        chosen = tuple(columns if columns is not None else rows[0])
        names, special = names or {}, special or {}
        for option in (names, special, numbers, notes, negative):
            if strange := sorted(set(option) - set(chosen)):
                raise ConfigError(f"an option names the column {strange[0]!r}; the columns are {', '.join(chosen)}")
        found = []
        for column in (*(c for c in chosen if c not in notes), *(c for c in chosen if c in notes)):
            values = [_value(row, column) for row in rows]
            kind = NOTE if column in notes else NUMBER if column in numbers or _numeric(values) else CATEGORY
            own = tuple((_key(column, kind, v), word) for v, word in special.get(column, {}).items())
            made = RecordColumn(column, names.get(column, words(column)), kind, own, column in negative)
            found.append(_fitted(made, values, levels))
        return cls(tuple(found))

    def __post_init__(self) -> None:
        taken: dict[str, str] = {}
        for column in self.columns:
            for phrase in (column.name, *(word for _, word in column.special)):
                if not phrase or ";" in phrase or phrase != " ".join(phrase.split()):
                    raise ConfigError(f"the column {column.column!r} needs a phrase without ';', not {phrase!r}")
            if column.name in taken:
                raise ConfigError(f"the columns {taken[column.name]!r} and {column.column!r} have the name of one")
            taken[column.name] = column.column
            if column.kind not in (NUMBER, CATEGORY, NOTE):
                raise ConfigError(f"the column {column.column!r} has the kind {column.kind!r}, which there is not")

    def text(self, row: Row) -> str:
        """The row as one line. Unknown values are written, too; ConfigError if the row lacks a column."""
        return " ; ".join(f"{c.name} {c.word(_value(row, c.column))}" for c in self.columns)

    def texts(self, rows: Iterable[Row]) -> list[str]:
        """One line for each row."""
        return [self.text(row) for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """JSON value; `from_dict` reads it."""
        return {"columns": [asdict(column) for column in self.columns]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecordText:
        """Inverse of `to_dict`. Raises ConfigError for missing, unknown or impossible values."""
        try:
            return cls(tuple(_read(column) for column in values["columns"]))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"this describes no text of records: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write JSON, in one step."""
        write_text_aside(Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> RecordText:
        """Inverse of `save`. Raises ConfigError if the file cannot be read or says something else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{Path(path).name!r} holds no text of records ({error})") from error
        return cls.from_dict(values)


def plain(value: Value) -> str:
    """A value of a category in lower case, on one line; "" for nothing."""
    return "" if _missing(value) else " ".join(str(value).lower().split())


def words(value: str) -> str:
    """Words of a category or of the name of a column: "blue-collar" -> "blue collar"."""
    return " ".join(re.sub(r"[_.;-]", " ", value.lower()).split())


def _fitted(column: RecordColumn, values: Sequence[Value], levels: int) -> RecordColumn:
    """The column with what its training values tell."""
    if column.kind == NOTE:
        return column
    if column.kind == CATEGORY:
        known = sorted({v for v in map(plain, values) if words(v)} - {v for v, _ in column.special})
        _check_apart(column.column, known)
        return replace(column, values=tuple(known))
    own = {v for v, _ in column.special}
    numbers = [_finite(column.column, v) for v in values if not _missing(v)]
    numbers = sorted(v for v in numbers if v not in own and not (column.negative and v < 0))
    return replace(column, edges=_edges(numbers, levels))


def _edges(numbers: Sequence[float], levels: int) -> tuple[tuple[float, int], ...]:
    """A value has level k if at least k/levels of the numbers are below it, that is if it is above the ⌈k·n/levels⌉-th
    of them. Of levels with the same edge the highest is the true one."""
    percents: dict[float, int] = {}
    for k in range(1, levels if numbers else 0):
        percents[numbers[-(-k * len(numbers) // levels) - 1]] = 100 * k // levels
    return tuple(percents.items())


def _check_apart(column: str, known: Sequence[str]) -> None:
    by_words: dict[str, str] = {}
    for value in known:
        if (twin := by_words.setdefault(words(value), value)) != value:
            raise ConfigError(
                f"the values {twin!r} and {value!r} of the column {column!r} would read alike; write them otherwise"
            )


def _read(values: Mapping[str, Any]) -> RecordColumn:
    values = dict(values)
    for name in ("special", "edges"):
        values[name] = tuple((first, second) for first, second in values.get(name, ()))
    values["values"] = tuple(values.get("values", ()))
    column = RecordColumn(**values)
    edges = [edge for edge, _ in column.edges]
    if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise ConfigError(f"the edges of the column {column.column!r} do not rise: {edges}")
    return column


def _value(row: Row, column: str) -> Value:
    if column not in row:
        raise ConfigError(f"a row has no column {column!r}; it has {', '.join(row)}")
    return row[column]


def _missing(value: Value) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _numeric(values: Sequence[Value]) -> bool:
    known = [v for v in values if v is not None]
    return bool(known) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)


def _number(value: Value) -> float | None:
    """The value as a number; None if it is none."""
    try:
        return None if math.isnan(number := float(value)) else number
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None


def _finite(column: str, value: Value) -> float:
    number = _number(value)
    if number is None or math.isinf(number):
        raise ConfigError(f"the column {column!r} is one of numbers, and a training row says {value!r}")
    return number


def _key(column: str, kind: str, value: Value) -> float | str:
    """A special value as it is looked up."""
    return _finite(column, value) if kind == NUMBER else plain(value)
