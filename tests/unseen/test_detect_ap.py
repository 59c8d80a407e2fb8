"""Average precision against cases worked by hand, and what must hold for any scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unseen.detect_ap import ap50, average_precision, hits_of


@pytest.mark.parametrize(
    "hits, objects, wanted",
    [
        ([1, 1], 2, 1.0),
        ([1, 0, 1], 2, (1 + 2 / 3) / 2),
        ([0, 1], 1, 0.5),
        ([0, 1, 1], 2, (2 / 3 + 2 / 3) / 2),  # the envelope lifts 1/2 to the later 2/3
        ([1], 4, 0.25),
        ([0, 0], 3, 0.0),
        ([], 3, 0.0),
    ],
)
def test_cases_worked_by_hand(hits, objects, wanted):
    scores = np.linspace(1, 0.1, len(hits))
    assert average_precision(scores, np.array(hits, dtype=bool), objects) == pytest.approx(wanted)


def test_there_is_no_value_without_objects():
    assert math.isnan(average_precision(np.array([0.5]), np.array([False]), 0))


def test_a_second_detection_of_an_object_is_a_miss():
    overlap = np.array([[0.6], [0.9], [0.4]])
    assert hits_of(np.array([0.8, 0.9, 1.0]), overlap).tolist() == [False, True, False]
    assert ap50(np.array([0.8, 0.9, 1.0]), overlap) == pytest.approx(0.5)


def test_a_detection_takes_the_next_best_object_when_the_best_is_taken():
    overlap = np.array([[0.9, 0.2], [0.8, 0.6]])
    assert hits_of(np.array([0.9, 0.5]), overlap).tolist() == [True, True]


def test_the_better_score_is_served_first_wherever_it_stands():
    overlap = np.array([[0.5], [0.5]])
    assert hits_of(np.array([0.1, 0.2]), overlap).tolist() == [False, True]


ranked = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=30)


@given(ranked, st.integers(0, 5))
def test_ranks_alone_count_and_misses_never_help(rows, more):
    scores, hits = (np.array(column) for column in zip(*rows, strict=True))
    scores = scores.astype(np.float64) + np.linspace(0, 1e-3, len(scores))
    objects = int(hits.sum()) + more
    if not objects:
        return
    value = average_precision(scores, hits, objects)
    assert 0 <= value <= 1
    assert average_precision(3 * scores + 1, hits, objects) == pytest.approx(value)
    with_miss = average_precision(np.append(scores, 9.0), np.append(hits, False), objects)
    assert with_miss <= value + 1e-12
    assert average_precision(np.append(scores, -1.0), np.append(hits, False), objects) == pytest.approx(value)


@given(ranked)
def test_all_objects_before_all_misses_is_one(rows):
    hits = np.array([hit for _, hit in rows])
    if hits.any():
        assert average_precision(hits.astype(float), hits, int(hits.sum())) == pytest.approx(1)
