"""Judging probabilities: thresholds from validation rows, calibration, intervals over rows and seeds."""

from __future__ import annotations

import numpy as np
import pytest
from crm.scores import METRICS, calibrated, compare, score
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.errors import ConfigError


def outcomes(count, rate=0.3, seed=0):
    """Outcomes and the probabilities they were drawn by."""
    make = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-(np.log(rate / (1 - rate)) + 1.5 * make.normal(size=count))))
    return p, make.random(count) < p


def noisy(p, spread, seed):
    """Probabilities that say less about the outcomes."""
    return 1 / (1 + np.exp(-(np.log(p / (1 - p)) + np.random.default_rng(seed).normal(size=len(p)) * spread)))


tied = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=4, max_size=40)


@given(tied.filter(lambda rows: 0 < sum(y for _, y in rows) < len(rows)))
@settings(max_examples=80, deadline=None)
def test_no_other_threshold_is_better_on_the_validation_rows(rows):
    p, yes = np.array([n / 6 for n, _ in rows]), np.array([y for _, y in rows])
    found = score(p, yes, p, yes)
    for threshold in (*found.probability, 2.0, -1.0):
        said = found.probability >= threshold
        assert found.correct.mean() >= (said == yes).mean() - 1e-9
        assert found.metrics()["balanced_accuracy"] >= (said[yes].mean() + (~said[~yes]).mean()) / 2 - 1e-9


def test_one_probability_for_all_is_the_majority():
    _, yes = outcomes(500, 0.2)
    found = score(np.full(500, 0.9), yes, np.full(500, 0.9), yes).metrics()
    share = yes.mean()
    assert found["accuracy"] == pytest.approx(1 - share) and found["auc"] == 0.5
    assert found["balanced_accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(share * np.log(share) + (1 - share) * np.log(1 - share)), abs=1e-3)


def test_calibration_undoes_what_is_monotone_in_the_log_odds():
    p, yes = outcomes(8_000)
    bent = 1 / (1 + np.exp(-(3 * np.log(p / (1 - p)) + 2)))
    assert np.abs(calibrated(bent, yes, bent) - p).mean() < 0.02
    honest, overconfident = (score(q[:4000], yes[:4000], q[4000:], yes[4000:]).metrics() for q in (p, bent))
    assert honest == pytest.approx(overconfident, abs=2e-3)


def test_drift_shows_in_accuracy_and_not_in_the_area():
    p, yes = outcomes(20_000)
    keep = yes | (np.random.default_rng(1).random(len(yes)) < 0.2)
    valid, same, drifted = np.arange(5_000), np.arange(5_000, 20_000), np.arange(5_000, 20_000)[keep[5_000:]]
    steady, moved = (score(p[valid], yes[valid], p[rows], yes[rows]).metrics() for rows in (same, drifted))
    for name in ("auc", "balanced_accuracy"):
        assert moved[name] == pytest.approx(steady[name], abs=0.02)
    assert moved["accuracy"] < steady["accuracy"] - 0.05


@pytest.mark.parametrize("metric", METRICS)
def test_a_real_difference_is_seen_and_none_is_not_made_up(metric):
    p, yes = outcomes(3_000)
    valid, test = np.arange(1_500), np.arange(1_500, 3_000)

    def runs(spread, first):
        return [
            score((q := noisy(p, spread, n))[valid], yes[valid], q[test], yes[test]) for n in range(first, first + 3)
        ]

    methods = {"good": runs(0.1, 0), "twin": runs(0.1, 3), "poor": runs(6.0, 6)}
    pairs = [("good", "poor"), ("good", "twin"), ("good", "good")]
    found = compare(methods, pairs, metric=metric, samples=200)
    better = found.differences["good", "poor"]
    sign = -1 if metric == "nll" else 1
    assert min(sign * better.low, sign * better.high) > 0
    assert found.differences["good", "twin"].low < 0 < found.differences["good", "twin"].high
    assert found.differences["good", "good"].high == 0
    value = found.values["good"]
    assert value.low < value.mean < value.high
    assert value.mean == pytest.approx(np.mean([scored.metrics()[metric] for scored in methods["good"]]))
    assert compare(methods, pairs, metric=metric, samples=200) == found


def test_the_interval_is_as_wide_as_chance_makes_it():
    p, yes = outcomes(2_000)
    one = score(p, yes, p, yes)
    value = compare({"one": [one]}, samples=1000).values["one"]
    error = (one.correct.mean() * (1 - one.correct.mean()) / 2_000) ** 0.5
    assert value.high - value.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_seeds_that_differ_widen_the_interval():
    p, yes = outcomes(1_000)
    same = [score(p, yes, noisy(p, 1.0, 0), yes) for _ in range(3)]
    apart = [score(p, yes, noisy(p, spread, 1), yes) for spread in (0.0, 1.0, 9.0)]
    found = compare({"same": same, "apart": apart}, metric="auc", samples=200).values
    assert found["apart"].high - found["apart"].low > 1.5 * (found["same"].high - found["same"].low)


def test_what_cannot_be_judged_is_refused():
    p, yes = outcomes(50)
    one = score(p, yes, p, yes)
    with pytest.raises(ConfigError, match="probabilities"):
        score(p, yes, p[:-1], yes)
    with pytest.raises(ConfigError, match="probabilities"):
        score(p, yes, p * np.nan, yes)
    with pytest.raises(ConfigError, match="classes"):
        score(p, np.ones(50, dtype=bool), p, yes)
    with pytest.raises(ConfigError, match="same test rows"):
        compare({"a": [one], "b": [score(p, yes, p, ~yes)]})
    with pytest.raises(ConfigError, match="no metric"):
        compare({"a": [one]}, metric="f1")
    with pytest.raises(ConfigError, match="'b' was not scored"):
        compare({"a": [one]}, [("a", "b")])
