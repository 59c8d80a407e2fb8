import math

import numpy as np
import pytest

from hf_qep.errors import NonFiniteError
from hf_qep.evaluation.estimates import Estimate, mean, median, ratio


def test_mean_reports_the_standard_error_of_the_mean():
    measured = mean([1.0, 2.0, 3.0, 4.0])
    assert (measured.value, measured.n) == (2.5, 4)
    assert measured.stderr == pytest.approx(math.sqrt(5 / 3) / 2)


def test_one_value_has_no_standard_error():
    assert mean([3.0]) == Estimate(3.0, None, 1)
    assert median([3.0]).stderr is None
    assert ratio([6.0], [2.0]) == Estimate(3.0, None, 2)


def test_ratio_over_equal_windows_is_the_mean_of_their_means():
    rng = np.random.default_rng(0)
    means = rng.normal(size=40)
    by_window = ratio(means * 10, np.full(40, 10.0))
    assert by_window.value == pytest.approx(means.mean())
    assert by_window.stderr == pytest.approx(mean(means).stderr)
    assert by_window.n == 400


def test_ratio_has_the_stated_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        counts = rng.integers(5, 50, size=60).astype(float)
        window_means = rng.normal(2.0, 0.5, size=60)  # tokens of one window move together
        measured = ratio(window_means * counts, counts)
        covered += abs(measured.value - 2.0) <= 1.96 * measured.stderr
    assert 0.91 <= covered / 400 <= 0.98


def test_exponential_follows_the_delta_method_and_knows_its_range():
    assert Estimate(2.0, 0.1, 5).exponential() == Estimate(math.exp(2.0), math.exp(2.0) * 0.1, 5)
    assert Estimate(1000.0, 1.0, 5).exponential() is None


@pytest.mark.parametrize("value, stderr", [(math.nan, 0.1), (math.inf, None), (1.0, math.nan)])
def test_a_measurement_that_is_not_finite_is_refused(value, stderr):
    with pytest.raises(NonFiniteError):
        Estimate(value, stderr, 1)


@pytest.mark.parametrize("stderr, n", [(-0.1, 3), (0.1, 0)])
def test_a_measurement_of_nothing_is_refused(stderr, n):
    with pytest.raises(ValueError, match="n >= 1"):
        Estimate(1.0, stderr, n)
