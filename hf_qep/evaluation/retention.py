"""What is left of a task score after quantisation: raw and chance-corrected retention with 95 % intervals.

With f, q the scores of the float and the quantised model and c what guessing gets:

    raw       = q / f
    corrected = (q - c) / (f - c)

Raw retention flatters: a model reduced to guessing on four options still "retains" a third of a score of .75.
Corrected retention has a denominator near zero when the float model itself is close to guessing; a number there would
be noise, so none is given unless it is two standard errors above chance, and `note` says so.

Intervals are Fieller's for a ratio of correlated means (Fieller 1954): the set of r with
(a - r b)^2 <= z^2 (v_a - 2 r c_ab + r^2 v_b).  Both models answer the same items, so their covariance is used where
the single answers are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hf_qep.evaluation.estimates import Estimate, mean

CONFIDENCE_Z = 1.96
NEAR_CHANCE_STDERRS = 2.0


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: Annotated[float, "point value; 1 = nothing lost"]
    low: Annotated[float | None, "lower end of the 95 % interval; null if not bounded or not computable"]
    high: Annotated[float | None, "upper end of the 95 % interval; null if not bounded or not computable"]


@dataclass(frozen=True)
class Retention:
    """Retention of one score."""

    raw: Annotated[Interval | None, "quantised / float; null unless float is 2 stderr above zero"]
    corrected: Annotated[Interval | None, "the same of scores minus chance; null unless float is 2 stderr above chance"]
    paired: Annotated[bool, "whether the intervals use the covariance of the answers to the same items"]
    note: Annotated[str | None, "why a value is missing or doubtful"] = None


def retention(
    baseline: Estimate, subject: Estimate, chance: float | None, *, covariance: float | None = None
) -> Retention:
    """Retention of `subject` (quantised) with respect to `baseline` (float).

    chance: expected score of guessing; None if unknown, then no corrected value is given.
    covariance: of the two means; None treats them as independent.
    """
    if chance is None:
        corrected, note = None, "the chance level of this task is unknown"
    elif not _above(baseline, chance):
        corrected = None
        note = (
            f"the float model scores {baseline.value:.3f}, not {NEAR_CHANCE_STDERRS:g} standard errors above chance "
            f"({chance:.3f}): this task cannot show what quantisation costs"
        )
    else:
        corrected, note = _ratio(baseline, subject, chance, covariance), None
    raw = _ratio(baseline, subject, 0.0, covariance) if _above(baseline, 0.0) else None
    return Retention(raw=raw, corrected=corrected, paired=covariance is not None, note=note)


def paired_retention(
    baseline_items: Sequence[float], subject_items: Sequence[float], chance: float | None
) -> tuple[Estimate, Estimate, Retention]:
    """Scores of both models and the retention, from item scores (0 or 1) in the same order.

    Raises ValueError if the two sequences differ in length or are empty.
    """
    f, q = np.asarray(baseline_items, dtype=np.float64), np.asarray(subject_items, dtype=np.float64)
    if f.shape != q.shape:
        raise ValueError(f"the models answered {f.size} and {q.size} items; both must answer the same ones")
    baseline, subject = mean(f), mean(q)
    covariance = float(np.cov(f, q, ddof=1)[0, 1] / f.size) if f.size > 1 else None
    return baseline, subject, retention(baseline, subject, chance, covariance=covariance)


def _above(score: Estimate, level: float) -> bool:
    """Whether `score` is surely above `level`. A score without a standard error is surely above nothing."""
    return score.stderr is not None and score.value - level > NEAR_CHANCE_STDERRS * score.stderr


def _ratio(baseline: Estimate, subject: Estimate, level: float, covariance: float | None) -> Interval:
    a, b = subject.value - level, baseline.value - level
    if subject.stderr is None or baseline.stderr is None:
        return Interval(a / b, None, None)
    low, high = fieller(a, b, subject.stderr**2, baseline.stderr**2, covariance or 0.0)
    return Interval(a / b, low, high)


def fieller(
    a: float, b: float, var_a: float, var_b: float, cov: float, z: float = CONFIDENCE_Z
) -> tuple[float | None, float | None]:
    """Ends of the confidence interval of a / b, or (None, None) where the set is not a bounded interval."""
    # (a - r b)^2 = z^2 (var_a - 2 r cov + r^2 var_b) is quadratic in r
    leading = b * b - z * z * var_b
    if leading <= 0:
        return None, None
    middle = a * b - z * z * cov
    constant = a * a - z * z * var_a
    root = math.sqrt(max(0.0, middle * middle - leading * constant))
    return (middle - root) / leading, (middle + root) / leading
