from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.pareto import hypervolume, knee, non_dominated

GRID = 4


def tables(objectives):
    row = st.tuples(*[st.integers(0, GRID - 1)] * objectives)
    return st.lists(row, min_size=1, max_size=8)


any_table = st.sampled_from([2, 3]).flatmap(tables)


@given(any_table)
@settings(max_examples=80, deadline=None)
def test_exactly_the_dominated_points_are_left_out(points):
    kept = non_dominated(points)
    for here, stays in zip(points, kept, strict=True):
        beaten = any(all(a <= b for a, b in zip(other, here, strict=True)) and other != here for other in points)
        assert stays == (not beaten)


@given(any_table)
@settings(max_examples=80, deadline=None)
def test_the_volume_is_the_number_of_dominated_cells(points):
    cells = np.indices((GRID,) * len(points[0])).reshape(len(points[0]), -1).T
    covered = sum(any((np.array(p) <= cell).all() for p in points) for cell in cells)
    assert hypervolume(points, [GRID] * len(points[0])) == pytest.approx(covered)


def test_points_beyond_the_reference_add_nothing():
    assert hypervolume([[1, 1], [0, 9], [9, 0]], [2, 2]) == 1


@given(any_table, st.lists(st.floats(0.1, 100), min_size=3, max_size=3))
@example([(0, 3, 1), (1, 1, 1), (2, 2, 0)], [1.0, 0.6, 1.0])  # the last two are equally good
@settings(max_examples=80, deadline=None)
def test_the_knee_is_not_dominated_and_knows_no_unit(points, units):
    index = knee(points)
    assert non_dominated(points)[index]
    scaled = np.array(points) * np.array(units[: len(points[0])]) + 7
    assert np.array(points)[knee(scaled)] == pytest.approx(np.array(points)[index])


def test_the_knee_bends_where_little_of_one_buys_much_of_the_other():
    assert knee([[0, 10], [1, 2], [5, 1.5], [10, 0]]) == 1


def test_without_a_bend_it_is_one_of_the_extremes_and_the_first():
    assert knee([[0, 1], [1, 0]]) == 0


@pytest.mark.parametrize("points", [[], [[1.0, float("nan")]], [1.0, 2.0]])
def test_what_is_no_table_of_numbers_is_refused(points):
    with pytest.raises(ValueError):
        non_dominated(points)
