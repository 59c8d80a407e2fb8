from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.ranks import area_under_curve, bootstrap_interval, kendall, ranks, regret_at_1, spearman

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=20)


def test_ties_share_the_mean_of_their_ranks():
    assert ranks([30, 10, 10, 20]).tolist() == [4, 1.5, 1.5, 3]


def test_known_values():
    x, y = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(x, y) == pytest.approx(-29 / 165)
    assert kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_both_are_those_of_scipy(values):
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*values, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y)) and math.isnan(kendall(x, y))
        return
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


@given(pairs)
@settings(max_examples=40, deadline=None)
def test_a_rising_change_of_scale_changes_nothing(values):
    x, y = np.array(values, dtype=float).T
    for statistic in (spearman, kendall):
        assert statistic(np.exp(x), y**3) == pytest.approx(statistic(x, y), nan_ok=True)


def test_the_interval_is_reproducible_holds_the_value_and_narrows_with_more_data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=200)
    y = x + generator.normal(size=200)
    low, high = bootstrap_interval(spearman, x, y, samples=200, seed=1)
    assert (low, high) == bootstrap_interval(spearman, x, y, samples=200, seed=1)
    assert low < spearman(x, y) < high
    few = bootstrap_interval(spearman, x[:12], y[:12], samples=200, seed=1)
    assert few[1] - few[0] > 2 * (high - low)


def test_no_interval_without_variation():
    assert all(map(math.isnan, bootstrap_interval(spearman, [1, 1, 1], [1, 2, 3], samples=20)))


def test_regret_is_what_trusting_the_prediction_costs():
    assert regret_at_1([3, 1, 2], [0.5, 0.7, 0.9]) == pytest.approx(0.2)
    assert regret_at_1([1, 1, 2], [0.5, 0.7, 0.9]) == pytest.approx(0.1)
    assert regret_at_1([0, 1, 2], [0.5, 0.7, 0.9]) == 0


@given(pairs)
@settings(max_examples=40, deadline=None)
def test_the_area_is_the_share_of_pairs_in_the_right_order(values):
    scores, positive = np.array(values, dtype=float)[:, 0], np.array([y > 3 for _, y in values])
    above = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    expected = np.mean(above) if above else math.nan
    assert area_under_curve(scores, positive) == pytest.approx(expected, nan_ok=True)
