"""Made-up sales worlds: each has its own columns and its own hidden rule, and the best possible accuracy is known.

A deal has values in 5 to 11 columns and a note of one to three remarks. Its score is a sum of effects of values, of
what the note says, and of pairs of columns (interactions); it is won where the score is above the world's threshold,
and then the outcome is flipped with probability `noise`. All that the score depends on stands in the record, so no
predictor can be right more often than 1 - noise, and the one that knows the rule is exactly that often right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from crm.lore import FIELDS, OPAQUE, QUESTIONS, REMARKS, Field

NOTE = "note"
LEVELS = 10
"""Numbers from 0 to 99 count by their ten."""
_SCALE = 1_000
"""Deals that a world's threshold is set by."""


@dataclass(frozen=True)
class Recipe:
    """How worlds are drawn; two numbers are the least and the most of a uniform draw, both included.

    own: spread of the effects that are the world's own, beside the usual ones. product: spread of interactions.
    opaque: share of columns that say nothing by themselves. yes: share of deals that are won.
    """

    fields: tuple[int, int] = (5, 10)
    remarks: tuple[int, int] = (4, 9)
    sentences: tuple[int, int] = (1, 2)
    interactions: tuple[int, int] = (0, 2)
    own: float = 0.5
    product: float = 0.7
    opaque: float = 0.1
    noise: tuple[float, float] = (0.02, 0.12)
    yes: tuple[float, float] = (0.2, 0.8)


TARGET = Recipe((10, 10), (9, 9), (2, 2), (3, 3), own=0.7, product=1.3, opaque=0.1, noise=(0.06, 0.06), yes=(0.4, 0.4))
"""A world with more columns, stronger interactions and more of its own than those that a teacher learns from."""


@dataclass(frozen=True)
class Drawn:
    """Deals of a world. values: (deals, columns) int64, places among a column's values, or levels. numbers: the same
    columns as they are written, 0 to 99. said: (deals, sentences) int64, remarks; wordings: how. won: bool (deals,),
    with noise. truth: without."""

    values: np.ndarray
    numbers: np.ndarray
    said: np.ndarray
    wordings: np.ndarray
    won: np.ndarray
    truth: np.ndarray

    def __len__(self) -> int:
        return len(self.won)


class World:
    """A world, drawn from a recipe and a seed."""

    def __init__(self, seed: int, recipe: Recipe | None = None) -> None:
        recipe = recipe or Recipe()
        make = np.random.default_rng([seed, 0])
        self.seed, self.recipe = seed, recipe
        self.fields = _columns(recipe, make)
        self.remarks = make.permutation(len(REMARKS))[: _whole(recipe.remarks, make)]
        self.question = QUESTIONS[int(make.integers(len(QUESTIONS)))]
        self.noise = float(make.uniform(*recipe.noise))
        self.effects = [_effects(field, recipe, make) for field in self.fields]
        usual = np.array([REMARKS[n].effect for n in self.remarks])
        self.spoken = usual * make.normal(1, 0.3, len(usual)) + recipe.own * make.normal(size=len(usual))
        self.products = self._products(make)
        score = self._score(*self._draw(_SCALE, np.random.default_rng([seed, 1])))
        self.threshold = float(np.quantile(score, 1 - make.uniform(*recipe.yes)))

    @property
    def bayes(self) -> float:
        """The best possible accuracy."""
        return 1 - self.noise

    @property
    def columns(self) -> list[str]:
        """Names of the columns, the note last."""
        return [field.name for field in self.fields] + [NOTE]

    @property
    def numeric(self) -> list[str]:
        """Names of the columns that hold numbers."""
        return [field.name for field in self.fields if field.values is None]

    def deals(self, count: int, seed: int) -> Drawn:
        """Deals, other ones for every seed."""
        make = np.random.default_rng([self.seed, 2, seed])
        values, said = self._draw(count, make)
        numbers = values * (100 // LEVELS) + make.integers(100 // LEVELS, size=values.shape)
        truth = self._score(values, said) > self.threshold
        won = truth ^ (make.random(count) < self.noise)
        return Drawn(values, numbers, said, make.integers(3, size=said.shape), won, truth)

    def rows(self, drawn: Drawn) -> list[dict[str, Any]]:
        """Deals as rows of a table."""
        names = [None if field.values is None else list(field.values) for field in self.fields]
        rows = []
        for n in range(len(drawn)):
            row: dict[str, Any] = {}
            for k, field in enumerate(self.fields):
                options = names[k]
                row[field.name] = int(drawn.numbers[n, k]) if options is None else options[drawn.values[n, k]]
            row[NOTE] = " . ".join(
                REMARKS[self.remarks[r]].wordings[w] for r, w in zip(drawn.said[n], drawn.wordings[n], strict=True)
            )
            rows.append(row)
        return rows

    def _draw(self, count: int, make: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sizes = [len(effects) for effects in self.effects]
        values = np.stack([make.integers(size, size=count) for size in sizes], 1)
        sentences = _whole(self.recipe.sentences, np.random.default_rng([self.seed, 3]))
        said = make.random((count, len(self.remarks))).argsort(1)[:, :sentences]
        return values, said

    def _score(self, values: np.ndarray, said: np.ndarray) -> np.ndarray:
        score = self.spoken[said].sum(1)
        for k, effects in enumerate(self.effects):
            score = score + effects[values[:, k]]
        for a, b, table in self.products:
            score = score + table[values[:, a], values[:, b]]
        return score

    def _products(self, make: np.random.Generator) -> list[tuple[int, int, np.ndarray]]:
        """Pairs of columns with a table of effects; of numbers it matters whether they are high or low."""
        count = min(_whole(self.recipe.interactions, make), len(self.fields) // 2)
        order, found = make.permutation(len(self.fields)), []
        for a, b in zip(order[:count], order[count : 2 * count], strict=True):
            table = self.recipe.product * make.normal(size=tuple(_groups(self.fields[k]) for k in (a, b)))
            table = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()  # nothing of one column alone
            wide = table[np.ix_(*(_group_of(self.fields[k]) for k in (a, b)))]
            found.append((int(a), int(b), wide))
        return found


def _columns(recipe: Recipe, make: np.random.Generator) -> list[Field]:
    count = _whole(recipe.fields, make)
    opaque = min(int(make.binomial(count, recipe.opaque)), len(OPAQUE))
    known = [FIELDS[n] for n in make.permutation(len(FIELDS))[: count - opaque]]
    columns = known + [OPAQUE[n] for n in make.permutation(len(OPAQUE))[:opaque]]
    return [columns[n] for n in make.permutation(count)]


def _effects(field: Field, recipe: Recipe, make: np.random.Generator) -> np.ndarray:
    """Effect of every value, or of every level of a number."""
    if field.values is None:
        slope = field.slope * make.normal(1, 0.3) + 1.5 * recipe.own * make.normal()
        return slope * (np.arange(LEVELS) / (LEVELS - 1) - 0.5)
    usual = np.array(list(field.values.values()))
    return usual * make.normal(1, 0.3) + recipe.own * make.normal(size=len(usual))


def _groups(field: Field) -> int:
    return 2 if field.values is None else len(field.values)


def _group_of(field: Field) -> np.ndarray:
    """Group of every value of a column in a table of interactions."""
    return np.arange(LEVELS) * 2 // LEVELS if field.values is None else np.arange(len(field.values))


def _whole(limits: tuple[int, int], make: np.random.Generator) -> int:
    return int(make.integers(limits[0], limits[1] + 1))
