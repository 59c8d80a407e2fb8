"""Column scales, which no block of ggml holds, moved to where llama.cpp multiplies anyway.

    W[i, j] = row_scale[i, g] * column_scale[j] * sign[i, j]

The modules that read a norm may give it the scales that they have in common, W n(x) = (W / c) (c n)(x); those of
down_proj go to the rows and the bias of up_proj, which is a factor of its input.  This is exact where all readers have
the same scales and the products are numbers of their type.  What remains of a column scale is lost: its mean over a
block goes to the row scale, which is the least squared error with these signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
_TINY = 2.0**-24
"""The smallest float16 above 0."""


@dataclass
class Scales:
    """Scales of one matrix. rows: float16 (rows, groups). columns: float16 (columns,) or None."""

    rows: Array
    columns: Array | None


@dataclass
class Folds:
    """What became of the column scales.

    norms: norm -> float32 (columns,), what its weight is to be multiplied by. rows: module -> float16 (rows, groups),
    in the place of its row scales. given: module -> float32 (columns,), factor that its input has from now on. taken:
    module -> float32 (rows,), factor that its output has. lost: module -> relative squared error of its weight, of
    those that are not exact.
    """

    norms: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)
    given: dict[str, Array] = field(default_factory=dict)
    taken: dict[str, Array] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)


def fold(scales: Mapping[str, Scales], feeds: Mapping[str, Sequence[str]], chains: Sequence[tuple[str, str]]) -> Folds:
    """Fold the column scales of the modules in `scales`.

    feeds: norm -> all modules that read it; one that is not in `scales` keeps the norm as it is. chains: pairs (up,
    down) of modules where the output of the first is a factor of the second one's input, taken in order.
    """
    found = Folds()
    left = {name: s.columns.astype(np.float32) for name, s in scales.items() if s.columns is not None}
    for up, down in chains:
        if down in left and up in scales:
            found.given[down] = found.taken[up] = left.pop(down)
    for norm, readers in feeds.items():
        if not all(name in left for name in readers):
            continue
        common = found.norms[norm] = _common([left[name] for name in readers])
        for name in readers:
            found.given[name] = common
            left[name] = np.divide(left[name], common, out=np.ones_like(common), where=common != 0)
    for name in (name for name in scales if name in left or name in found.taken):
        exact, taken = scales[name].rows.astype(np.float32), found.taken.get(name)
        exact = exact if taken is None else exact * taken[:, None]
        weights = _Weights(exact, left.get(name), found.given.get(name))
        half = weights.best.astype(np.float16)
        if not np.array_equal(half, scales[name].rows):
            found.rows[name] = half
        if (lost := weights.loss(half)) > 0:
            found.lost[name] = lost
    return found


def _common(columns: Sequence[Array]) -> Array:
    """The geometric mean of column scales, or just themselves where all are equal."""
    first, *others = columns
    if all(np.array_equal(first, other) for other in others):
        return first
    return np.exp2(np.mean([np.log2(np.maximum(np.abs(c), _TINY)) for c in columns], axis=0)).astype(np.float32)


class _Weights:
    """Magnitudes rows[i, g] * columns[j] * given[j] of a matrix that is to have only one for each row and group."""

    def __init__(self, rows: Array, columns: Array | None, given: Array | None) -> None:
        self._rows = rows
        ones = np.ones(max(len(c) for c in (columns, given, rows[0]) if c is not None))
        weight = ones if given is None else np.square(given.astype(np.float64))
        left = ones if columns is None else columns.astype(np.float64)
        self._plain, self._first, self._second = (
            part.reshape(rows.shape[1], -1).mean(1) for part in (weight, weight * left, weight * left**2)
        )

    @property
    def best(self) -> Array:
        """float32 (rows, groups): those with the least error."""
        mean = np.divide(self._first, self._plain, out=np.ones_like(self._plain), where=self._plain > 0)
        return (self._rows * mean).astype(np.float32)

    def loss(self, stored: Array) -> float:
        """Relative squared error of stored (rows, groups) in the place of all columns."""
        a, b = self._rows.astype(np.float64), stored.astype(np.float64)
        wrong = (a**2 * self._second - 2 * a * b * self._first + b**2 * self._plain).sum()
        return float(max(wrong, 0.0) / max((a**2 * self._second).sum(), 1e-300))
