"""Tables with a yes-or-no outcome, and what usual methods make of their columns.

The baselines read the raw columns, not the text: they are what a student that reads text has to be measured by. All of
them learn from the training rows; the validation rows choose little (strength of the penalty, number of
trees and their size) by the area under the curve, which does not depend on the share of "yes", and that drifts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.distill.records import RecordText, Row
from hf_qep.errors import ConfigError
from hf_qep.extras import require

PENALTIES = (0.01, 0.1, 1.0, 10.0)
TREES, RATE = 400, 0.06
LEAVES = (4, 16)
"""Of a tree: small trees stand drift better, larger ones see interactions."""
PHRASES, COMMON = 400, 20
"""Phrases of notes that a baseline sees, and the training rows that a phrase must be in."""
MOST_CATEGORIES = 250
"""Of a column that boosting splits by sets of values; scikit-learn takes up to 255."""


@dataclass(frozen=True)
class Part:
    """Rows without their outcome, and `yes`, bool (rows,)."""

    rows: tuple[Row, ...]
    yes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Table:
    """A task: rows in the order of time, the last ones to test by.

    question: what is asked about a row. numbers: columns of numbers. notes: columns of free text.
    text: further options of `RecordText.fit`.
    """

    name: str
    question: str
    train: Part
    valid: Part
    test: Part
    numbers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)

    def records(self, rows: Sequence[Row] | None = None) -> RecordText:
        """How rows are written, fitted on the training rows or on the given ones."""
        rows = self.train.rows if rows is None else rows
        return RecordText.fit(rows, numbers=self.numbers, notes=self.notes, **self.text)

    def sizes(self) -> str:
        """Rows of the parts and share of "yes" in each."""
        parts = {"train": self.train, "validation": self.valid, "test": self.test}
        return "; ".join(f"{name} {len(part):,} rows, {part.yes.mean():.1%} yes" for name, part in parts.items())

    def explain(self) -> str:
        """Sizes of the parts, and the share of "yes" along the whole table in tenths, on one line."""
        everything = np.concatenate([part.yes for part in (self.train, self.valid, self.test)])
        tenths = " ".join(f"{tenth.mean():.1%}" for tenth in np.array_split(everything, 10))
        return f"In the order of time: {self.sizes()}. Share of yes by tenth of the rows: {tenths}."


def split_in_time(rows: Sequence[Row], yes: Sequence[bool], valid: int, test: int) -> tuple[Part, Part, Part]:
    """Rows in the order of time -> all but the last ones, `valid` rows after them, the last `test` rows.

    Raises ConfigError if nothing is left to learn from.
    """
    end, start = len(rows) - test, len(rows) - test - valid
    if start < 1:
        raise ConfigError(f"{len(rows)} rows cannot give {valid} to validate and {test} to test by")
    labels = np.asarray(yes, dtype=bool)
    cuts = (slice(0, start), slice(start, end), slice(end, None))
    first, second, third = (Part(tuple(rows[cut]), labels[cut]) for cut in cuts)
    return first, second, third


@dataclass(frozen=True)
class Fitted:
    """A baseline. probability: rows -> P(yes), (rows,) float64. parameters: numbers that it has learned; of trees, the
    values of their leaves."""

    probability: Callable[[Sequence[Row]], np.ndarray]
    parameters: int


def majority(table: Table, seed: int = 0) -> Fitted:
    """The share of "yes" among the training rows, for every row."""
    share = float(table.train.yes.mean())
    return Fitted(lambda rows: np.full(len(rows), share), 1)


def logistic(table: Table, seed: int = 0) -> Fitted:
    """Logistic regression on one-hot categories, standardised numbers and phrases of notes."""
    linear = require("bench", "sklearn.linear_model")
    encode = Encoder(table)
    x, judged = encode.one_hot(table.train.rows), encode.one_hot(table.valid.rows)

    def fit(penalty: float) -> Any:
        return linear.LogisticRegression(C=penalty, max_iter=2000).fit(x, table.train.yes)

    models = [fit(penalty) for penalty in PENALTIES]
    best = max(models, key=lambda m: area_under_curve(m.decision_function(judged), table.valid.yes))
    return Fitted(lambda rows: best.predict_proba(encode.one_hot(rows))[:, 1], x.shape[1] + 1)


def boosting(table: Table, seed: int = 0) -> Fitted:
    """Gradient-boosted trees that split categories by sets of values; validation rows say how many, how large."""
    ensemble = require("bench", "sklearn.ensemble")
    encode = Encoder(table)
    x, judged = encode.ordinal(table.train.rows), encode.ordinal(table.valid.rows)

    def fit(trees: int, leaves: int) -> Any:
        return ensemble.HistGradientBoostingClassifier(
            learning_rate=RATE,
            max_iter=trees,
            max_leaf_nodes=leaves,
            l2_regularization=1.0,
            categorical_features=encode.is_category,
            early_stopping=False,
            random_state=seed,
        ).fit(x, table.train.yes)

    found = []
    for leaves in LEAVES:
        stages = fit(TREES, leaves).staged_decision_function(judged)
        areas = [area_under_curve(stage.ravel(), table.valid.yes) for stage in stages]
        found.append((max(areas), 1 + int(np.argmax(areas)), leaves))
    _, trees, leaves = max(found)
    model = fit(trees, leaves)
    return Fitted(lambda rows: model.predict_proba(encode.ordinal(rows))[:, 1], trees * leaves)


BASELINES: dict[str, Callable[..., Fitted]] = {
    "majority": majority,
    "logistic regression": logistic,
    "gradient boosting": boosting,
}


class Encoder:
    """Rows as arrays, by what the training rows hold."""

    def __init__(self, table: Table) -> None:
        rows, notes = table.train.rows, table.notes
        columns = [c for c in rows[0] if c not in notes]
        self._numbers = [c for c in columns if c in table.numbers]
        self._places = {
            c: {v: n for n, v in enumerate(sorted({str(row[c]) for row in rows}))}
            for c in columns
            if c not in table.numbers
        }
        self._notes, self._phrases = notes, _common_phrases(rows, notes)
        values = self._values(rows)
        self._mean, spread = np.nanmean(values, 0), np.nanstd(values, 0)
        self._spread = np.where(spread > 0, spread, 1.0)
        splits = [len(places) <= MOST_CATEGORIES for places in self._places.values()]
        self.is_category = np.array(splits + [False] * (len(self._numbers) + len(self._phrases)))
        """Of the columns of `ordinal`."""

    def ordinal(self, rows: Sequence[Row]) -> np.ndarray:
        """(rows, columns) float64: the place of a category, numbers, 0 or 1 for a phrase; NaN where unknown."""
        places = [[p.get(str(row[c]), np.nan) for c, p in self._places.items()] for row in rows]
        return np.concatenate(
            [np.array(places, dtype=float).reshape(len(rows), -1), self._values(rows), self._said(rows)], 1
        )

    def one_hot(self, rows: Sequence[Row]) -> np.ndarray:
        """(rows, columns) float64: 1 for the category, standardised numbers with 0 for unknown ones, phrases."""
        groups = []
        for column, places in self._places.items():
            hot = np.zeros((len(rows), len(places)))
            for n, row in enumerate(rows):
                if (place := places.get(str(row[column]))) is not None:
                    hot[n, place] = 1
            groups.append(hot)
        groups.append(np.nan_to_num((self._values(rows) - self._mean) / self._spread))
        return np.concatenate([*groups, self._said(rows)], 1)

    def _values(self, rows: Sequence[Row]) -> np.ndarray:
        values = [[np.nan if row[c] is None else float(row[c]) for c in self._numbers] for row in rows]
        return np.array(values, dtype=float).reshape(len(rows), len(self._numbers))

    def _said(self, rows: Sequence[Row]) -> np.ndarray:
        said = np.zeros((len(rows), len(self._phrases)))
        for n, row in enumerate(rows if self._phrases else ()):
            for phrase in _phrases(row, self._notes):
                if (place := self._phrases.get(phrase)) is not None:
                    said[n, place] = 1
        return said


def _phrases(row: Row, notes: Sequence[str]) -> set[str]:
    """Words and pairs of neighbouring words."""
    found: set[str] = set()
    for note in notes:
        spoken = re.findall(r"\w+", str(row[note] or "").lower())
        found.update(spoken, (f"{a} {b}" for a, b in zip(spoken, spoken[1:], strict=False)))
    return found


def _common_phrases(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, int]:
    counts = Counter(phrase for row in rows for phrase in _phrases(row, notes)) if notes else Counter()
    common = sorted((p for p, n in counts.items() if n >= COMMON), key=lambda p: (-counts[p], p))[:PHRASES]
    return {phrase: place for place, phrase in enumerate(common)}
