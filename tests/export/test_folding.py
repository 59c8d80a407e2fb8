"""Column scales that move to norms and neighbours: the same function, exactly where it is said to be exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.export.folding import Scales, fold

READERS, OUT, WIDTH = ("q", "k"), 6, 16
FEEDS = {"norm": READERS}


def signs(seed, rows, columns):
    return np.where(seed.random((rows, columns)) < 0.5, -1.0, 1.0)


def scales(seed, rows, columns, groups, exact):
    """Row scales and column scales; `exact` ones have few digits, so that products are numbers of float16."""
    row, column = np.exp(seed.standard_normal((rows, groups))), np.exp(seed.standard_normal(columns))
    if exact:
        row, column = np.exp2(np.log2(row).round()), np.exp2(np.log2(column).round())
    return Scales(row.astype(np.float16), column.astype(np.float16))


def dense(sign, s, rows=None, given=None):
    row = (s.rows if rows is None else rows).astype(np.float64)
    column = 1.0 if s.columns is None or rows is not None else s.columns.astype(np.float64)
    found = sign * np.repeat(row, sign.shape[1] // row.shape[1], 1) * column
    return found if given is None else found * given


def applied(found, name, sign, s):
    """The matrix that is left, with the factor that its input has put back."""
    column = np.ones(sign.shape[1]) if name not in found.given else found.given[name].astype(np.float64)
    return dense(sign, s, found.rows.get(name, s.rows), column)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_equal_scales_of_all_readers_go_to_the_norm_exactly(number, zeros):
    seed = np.random.default_rng(number)
    shared = scales(seed, OUT, WIDTH, 2, exact=False).columns
    shared[3] = 0 if zeros else shared[3]
    found_scales = {name: Scales(scales(seed, OUT, WIDTH, 2, False).rows, shared) for name in READERS}
    found = fold(found_scales, FEEDS, [])
    assert not found.lost and not found.rows
    assert np.array_equal(found.norms["norm"], shared.astype(np.float32))
    for name in READERS:
        sign = signs(seed, OUT, WIDTH)
        assert np.array_equal(applied(found, name, sign, found_scales[name]), dense(sign, found_scales[name]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scales_of_down_go_to_the_rows_of_up(number):
    seed = np.random.default_rng(number)
    up, down = scales(seed, WIDTH, 8, 2, True), scales(seed, OUT, WIDTH, 4, True)
    up.columns = None
    found = fold({"up": up, "down": down}, {}, [("up", "down")])
    assert not found.lost
    s_up, s_down = signs(seed, WIDTH, 8), signs(seed, OUT, WIDTH)
    gates = seed.random(WIDTH)[:, None]
    before = dense(s_down, down) @ (gates * dense(s_up, up))
    after = dense(s_down, down, found.rows.get("down", down.rows)) @ (gates * dense(s_up, up, found.rows["up"]))
    np.testing.assert_allclose(after, before, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_lost_is_the_error_of_the_weight(number):
    seed = np.random.default_rng(number)
    found_scales = {name: scales(seed, OUT, WIDTH, 2, False) for name in (*READERS, "o")}
    found = fold(found_scales, FEEDS, [])
    assert set(found.lost) == {*READERS, "o"}
    for name, s in found_scales.items():
        sign = signs(seed, OUT, WIDTH)
        exact = dense(sign, s)
        error = np.square(applied(found, name, sign, s) - exact).sum() / np.square(exact).sum()
        assert found.lost[name] == pytest.approx(error, rel=1e-6)


def test_other_row_scales_lose_more():
    seed = np.random.default_rng(0)
    s, sign = scales(seed, OUT, WIDTH, 2, False), signs(seed, OUT, WIDTH)
    found = fold({"o": s}, {}, [])
    exact = dense(sign, s)
    for factor in (0.98, 1.02):
        other = np.square(dense(sign, s, found.rows["o"] * factor) - exact).sum() / np.square(exact).sum()
        assert other > found.lost["o"]


def test_a_norm_with_a_reader_that_is_not_packed_stays_as_it_is():
    found = fold({"q": scales(np.random.default_rng(0), OUT, WIDTH, 2, False)}, FEEDS, [])
    assert not found.norms and "q" in found.lost


def test_without_column_scales_nothing_moves():
    s = scales(np.random.default_rng(0), OUT, WIDTH, 2, False)
    s.columns = None
    found = fold({"q": s, "k": s}, FEEDS, [("q", "k")])
    assert not (found.norms or found.rows or found.lost or found.given or found.taken)
