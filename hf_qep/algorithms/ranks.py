"""How well one order predicts another: rank statistics, their uncertainty, and what trusting an order costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Values = Sequence[float] | np.ndarray
"""(n,) numbers."""


def ranks(values: Values) -> np.ndarray:
    """Ranks from 1, (n,) float64; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive row has a higher score than a negative one, ties counted by half; NaN without both kinds.

    scores: (rows,) float. positive: (rows,) bool. It is the Mann-Whitney statistic: from the mean ranks of the scores.
    """
    positive = positive.astype(bool)
    count, rest = int(positive.sum()), int((~positive).sum())
    if not count or not rest:
        return float("nan")
    return float((ranks(scores)[positive].sum() - count * (count + 1) / 2) / (count * rest))


def spearman(x: Values, y: Values) -> float:
    """Spearman's rho: the correlation of the ranks, ties included. NaN for fewer than two values or a constant."""
    a, b = (ranks(v) - (len(v) + 1) / 2 for v in _pair(x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def kendall(x: Values, y: Values) -> float:
    """Kendall's tau-b (1945), corrected for ties. NaN for fewer than two values or a constant."""
    a, b = (np.sign(v[:, None] - v[None]) for v in _pair(x, y))
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    x: Values,
    y: Values,
    *,
    samples: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic(x, y)` over resampled pairs (Efron 1979); the same for the same seed.

    Resamples for which the statistic is NaN, such as n times the same pair, are left out; NaN, NaN if all are.
    """
    a, b = _pair(x, y)
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, max(len(a), 1), (samples, len(a)))
    found = np.array([statistic(a[draw], b[draw]) for draw in draws]) if len(a) else np.empty(0)
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def regret_at_1(predicted: Values, true: Values) -> float:
    """How much more than the least true value the one that is predicted to be least has, in the unit of `true`.

    Several that share the least prediction count with their mean. Raises ValueError without values.
    """
    a, b = _pair(predicted, true)
    if not len(a):
        raise ValueError("there is nothing to choose from")
    return float(b[a == a.min()].mean() - b.min())


def _pair(x: Values, y: Values) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two lists of equal length are compared, not {a.shape} with {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("NaN has no rank")
    return a, b
