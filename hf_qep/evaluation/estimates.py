"""Measured values with their uncertainty: no number of this package leaves without n and a standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hf_qep.errors import NonFiniteError


@dataclass(frozen=True)
class Estimate:
    """One measured value."""

    value: Annotated[float, "the measured value"]
    stderr: Annotated[float | None, "standard error; null when fewer than two independent units were measured"]
    n: Annotated[int, "number of things measured: scored tokens, items, sentences or repetitions"]

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or (self.stderr is not None and not math.isfinite(self.stderr)):
            raise NonFiniteError(f"a measurement is not finite: value {self.value}, standard error {self.stderr}")
        if self.n < 1 or (self.stderr is not None and self.stderr < 0):
            raise ValueError(f"a measurement needs n >= 1 and a standard error >= 0, not n={self.n}, {self.stderr}")

    def scaled(self, factor: float) -> Estimate:
        """The same measurement in another unit."""
        return Estimate(self.value * factor, None if self.stderr is None else self.stderr * abs(factor), self.n)

    def exponential(self) -> Estimate | None:
        """exp of the value, standard error by the delta method; None where exp exceeds the range of a double."""
        if self.value > math.log(1e300):
            return None
        value = math.exp(self.value)
        return Estimate(value, None if self.stderr is None else value * self.stderr, self.n)


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of independent values; stderr = s / sqrt(n) with the n - 1 divisor."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values to average; give at least one")
    stderr = float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else None
    return Estimate(float(x.mean()), stderr, int(x.size))


def median(values: Sequence[float]) -> Estimate:
    """Median; stderr = sqrt(pi / 2) s / sqrt(n), exact only for a normal spread, so an indication for timings."""
    centre = mean(values)
    stderr = None if centre.stderr is None else centre.stderr * math.sqrt(math.pi / 2)
    return Estimate(float(np.median(values)), stderr, centre.n)


def ratio(sums: Sequence[float], counts: Sequence[float], n: int | None = None) -> Estimate:
    """Sum of `sums` over sum of `counts`, where window i contributes (sums[i], counts[i]).

    Tokens of one window are not independent, windows nearly are, so the windows are the units of the linearised
    variance of a ratio:  var = m / (m - 1) * sum_i (sums_i - r counts_i)^2 / (sum counts)^2   (Cochran, ch. 6).
    n: what to report as the number of things measured; the sum of `counts` by default.
    """
    s, c = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total = c.sum()
    if total <= 0:
        raise ValueError("nothing was measured: all counts are zero")
    r = s.sum() / total
    m = int((c > 0).sum())
    stderr = float(math.sqrt(m / (m - 1) * ((s - r * c) ** 2).sum()) / total) if m > 1 else None
    return Estimate(float(r), stderr, int(total) if n is None else n)
