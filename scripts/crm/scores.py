"""How good probabilities of "yes" are, judged for every method in the same way, and how sure that is.

Nothing is fitted on test rows. On the validation rows every method gets a temperature and a bias (Platt scaling with a
rising slope, `hf_qep.algorithms.calibrated`), and then two thresholds: the one with the best accuracy and the one with
the best balanced accuracy. Where the share of "yes" drifts between validation and test, accuracy at a fixed threshold
suffers for every method and can be below that of always saying "no"; balanced accuracy (mean of the shares of "yes" and
of "no" that are found) and the area under the curve do not depend on that share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hf_qep.algorithms.calibrated import fit_calibration
from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.errors import ConfigError

LEAST = 1e-6
"""No probability is taken to be nearer to 0 or 1."""


@dataclass(frozen=True)
class Scored:
    """One method with one seed on the test rows.

    raw: P(yes) as the method gave it, (rows,) float64. probability: the same, calibrated. yes: outcomes, bool (rows,).
    threshold, balanced_threshold: least calibrated probability that counts as "yes", for accuracy and for balanced
    accuracy.
    """

    raw: np.ndarray
    probability: np.ndarray
    yes: np.ndarray
    threshold: float
    balanced_threshold: float

    @cached_property
    def correct(self) -> np.ndarray:
        """Bool (rows,), at the threshold for accuracy."""
        return (self.probability >= self.threshold) == self.yes

    @cached_property
    def balanced_correct(self) -> np.ndarray:
        """Bool (rows,), at the threshold for balanced accuracy."""
        return (self.probability >= self.balanced_threshold) == self.yes

    @cached_property
    def losses(self) -> np.ndarray:
        """Negative log-likelihood of each outcome in nats, float64 (rows,)."""
        return -np.log(np.where(self.yes, self.probability, 1 - self.probability))

    def metrics(self) -> dict[str, float]:
        """Values of METRICS over all rows."""
        everything = np.arange(len(self.yes))
        return {name: metric(self, everything) for name, metric in METRICS.items()}


def _balanced(scored: Scored, rows: np.ndarray) -> float:
    right, yes = scored.balanced_correct[rows], scored.yes[rows]
    if yes.all() or not yes.any():
        return float("nan")
    return float(right[yes].mean() + right[~yes].mean()) / 2


METRICS: dict[str, Callable[[Scored, np.ndarray], float]] = {
    "accuracy": lambda scored, rows: float(scored.correct[rows].mean()),
    "balanced_accuracy": _balanced,
    "auc": lambda scored, rows: area_under_curve(scored.raw[rows], scored.yes[rows]),
    "nll": lambda scored, rows: float(scored.losses[rows].mean()),
}
"""Name -> value over the rows with these numbers, which may come more than once."""


def score(valid: np.ndarray, valid_yes: np.ndarray, test: np.ndarray, test_yes: np.ndarray) -> Scored:
    """Judge a method. valid, test: its P(yes), (rows,) in 0 to 1. valid_yes, test_yes: outcomes, bool (rows,).

    Raises ConfigError for numbers that are no probabilities, and for validation rows with one outcome only.
    """
    for part, outcomes in ((valid, valid_yes), (test, test_yes)):
        if part.shape != outcomes.shape or not ((part >= 0) & (part <= 1)).all():
            raise ConfigError(f"{outcomes.shape} outcomes need as many probabilities in 0 to 1, not {part.shape}")
    judged, probability = (calibrated(valid, valid_yes, part) for part in (valid, test))
    rate = float(valid_yes.mean())
    # Of calibrated probabilities, 0.5 and the share of "yes" are where the two thresholds belong.
    return Scored(
        raw=np.asarray(test, dtype=float),
        probability=probability,
        yes=np.asarray(test_yes, dtype=bool),
        threshold=_threshold(judged, valid_yes, 1.0, 1.0, 0.5),
        balanced_threshold=_threshold(judged, valid_yes, 1 / rate, 1 / (1 - rate), rate),
    )


def as_answered(test: np.ndarray, yes: np.ndarray) -> Scored:
    """A method as it answers, without a look at validation rows: "yes" from a probability of one half on."""
    probability = np.clip(np.asarray(test, dtype=float), LEAST, 1 - LEAST)
    return Scored(probability, probability, np.asarray(yes, dtype=bool), 0.5, 0.5)


def calibrated(valid: np.ndarray, valid_yes: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """P(yes) (rows,) with the temperature and the bias that fit the validation rows best, float64."""
    found = fit_calibration(_log(valid), torch.from_numpy(np.asarray(valid_yes)).long())
    return np.clip(found.apply(_log(probability))[:, 1].double().exp().numpy(), LEAST, 1 - LEAST)


def _log(probability: np.ndarray) -> torch.Tensor:
    p = torch.from_numpy(np.clip(np.asarray(probability, dtype=float), LEAST, 1 - LEAST))
    return torch.stack([1 - p, p], -1).log()


def _threshold(p: np.ndarray, yes: np.ndarray, worth_yes: float, worth_no: float, prefer: float) -> float:
    """The threshold with the most worth of right answers; of several as good as each other the nearest to `prefer`."""
    order = np.argsort(-p, kind="stable")
    ends = np.concatenate([[1.0], p[order], [0.0]])
    gain = np.where(yes[order], worth_yes, -worth_no)
    worth = np.concatenate([[0.0], np.cumsum(gain)])
    worth[ends[:-1] == ends[1:]] = -np.inf  # equal probabilities cannot be parted
    best = np.flatnonzero(worth >= worth.max() - 1e-9)
    high, low = ends[best], ends[best + 1]
    away = np.maximum(low - prefer, prefer - high).clip(min=0)
    nearest = int(np.argmin(away))
    return prefer if low[nearest] < prefer <= high[nearest] else float(low[nearest] + high[nearest]) / 2


@dataclass(frozen=True)
class Interval:
    """The value over all rows and seeds, and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Values of one metric by method, and differences by pair (first minus second)."""

    values: dict[str, Interval]
    differences: dict[tuple[str, str], Interval]


def compare(
    methods: Mapping[str, Sequence[Scored]],
    pairs: Sequence[tuple[str, str]] = (),
    *,
    metric: str = "accuracy",
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap over test rows and over seeds (Efron 1979), percentile intervals.

    methods: name -> the same method with one or more seeds, all on the same test rows. Every resample draws rows, the
    same ones for all methods, and for each method as many of its seeds as it has; its value is the mean over them.
    With few seeds their part of the spread is underestimated, and with one it is not there at all.
    Raises ConfigError for unknown names and for methods that were not judged on the same rows.
    """
    if metric not in METRICS:
        raise ConfigError(f"there is no metric {metric!r}, only {', '.join(METRICS)}")
    if unknown := {name for pair in pairs for name in pair} - set(methods):
        raise ConfigError(f"the method {sorted(unknown)[0]!r} was not scored, only {', '.join(methods)}")
    outcomes = [scored.yes for runs in methods.values() for scored in runs]
    if not outcomes or any(not np.array_equal(yes, outcomes[0]) for yes in outcomes):
        raise ConfigError("methods can be compared only on the same test rows")
    everything = np.arange(len(outcomes[0]))
    means = {name: _mean(runs, metric, everything) for name, runs in methods.items()}
    make = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(samples):
        rows = make.integers(0, len(everything), len(everything))
        for name, runs in methods.items():
            drawn = [runs[n] for n in make.integers(0, len(runs), len(runs))]
            found[name].append(_mean(drawn, metric, rows))
    drawn_values = {name: np.array(values) for name, values in found.items()}
    return Comparison(
        {name: _interval(means[name], drawn_values[name], level) for name in methods},
        {(a, b): _interval(means[a] - means[b], drawn_values[a] - drawn_values[b], level) for a, b in pairs},
    )


def _mean(runs: Sequence[Scored], metric: str, rows: np.ndarray) -> float:
    values = {id(scored): METRICS[metric](scored, rows) for scored in runs}
    return float(np.mean([values[id(scored)] for scored in runs]))


def _interval(mean: float, values: np.ndarray, level: float) -> Interval:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def summary(
    methods: Mapping[str, Sequence[Scored]],
    pairs: Sequence[tuple[str, str]] = (),
    *,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the page (`crm.page`) shows of these methods: `rows` by method, `differences` by `difference_name`.

    Means over seeds of all METRICS and the number of seeds; intervals and differences of accuracy, balanced accuracy
    and the area under the curve. Arguments and errors as of `compare`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in methods.items():
        each = [scored.metrics() for scored in runs]
        rows[name] = {metric: float(np.mean([values[metric] for values in each])) for metric in METRICS}
        rows[name]["seeds"] = len(runs)
    differences = {}
    for metric in ("accuracy", "balanced_accuracy", "auc"):
        found = compare(methods, pairs, metric=metric, samples=samples, seed=seed)
        for (first, second), interval in found.differences.items():
            differences[difference_name(first, second, metric)] = vars(interval)
        if metric != "balanced_accuracy":
            for name, interval in found.values.items():
                rows[name][f"{metric}_interval"] = [interval.low, interval.high]
    return {"rows": rows, "differences": differences}


def difference_name(first: str, second: str, metric: str) -> str:
    """Name of a difference on the page."""
    return f"{metric}: {first} - {second}"
