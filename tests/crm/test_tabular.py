"""The baselines on small made-up tables."""

from __future__ import annotations

import numpy as np
import pytest
from crm import tabular
from crm.tabular import BASELINES, Encoder, Part, Table, boosting, logistic, majority

from hf_qep.algorithms.ranks import area_under_curve

pytest.importorskip("sklearn")


def table(rule, count=900, seed=0, **changes):
    """Rows with two categories, a number and a note; `rule(row)` gives the log-odds."""
    make = np.random.default_rng(seed)
    rows = [
        {
            "colour": str(make.choice(["red", "green", "blue"])),
            "size": str(make.choice(["small", "large"])),
            "price": float(make.normal()) if make.random() > 0.1 else None,
            "note": str(make.choice(["called back at once", "never called back", "asked for a quote"])),
        }
        for _ in range(count)
    ]
    yes = make.random(count) < 1 / (1 + np.exp(-np.array([rule(row) for row in rows])))
    cuts = (slice(0, count // 2), slice(count // 2, 2 * count // 3), slice(2 * count // 3, None))
    parts = [Part(tuple(rows[cut]), yes[cut]) for cut in cuts]
    return Table("made up", "?", *parts, **{"numbers": ("price",), "notes": ("note",)} | changes)


def area(fitted, made):
    return area_under_curve(fitted.probability(made.test.rows), made.test.yes)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(tabular, "TREES", 60)


@pytest.mark.parametrize(
    "rule",
    [
        lambda row: 3 if row["colour"] == "red" else -3,
        lambda row: 3 * (row["price"] or 0),
        lambda row: 3 if "called back" in row["note"] and "never" not in row["note"] else -3,
    ],
    ids=["category", "number", "note"],
)
def test_both_learn_what_one_column_says(rule):
    made = table(rule)
    assert area(logistic(made), made) > 0.85 and area(boosting(made), made) > 0.85
    assert area(majority(made), made) == 0.5


def test_only_trees_see_what_columns_say_together():
    made = table(lambda row: 3 if (row["colour"] == "red") == (row["size"] == "small") else -3, count=1500)
    assert area(boosting(made), made) > 0.85 > 0.75 > area(logistic(made), made)


def test_no_rule_gives_no_area():
    made = table(lambda row: 0, count=3000)
    assert all(abs(area(fit(made), made) - 0.5) < 0.06 for fit in BASELINES.values())


@pytest.mark.parametrize("name", BASELINES)
def test_probabilities_are_those_of_the_rows_whatever_else_is_asked(name):
    made = table(lambda row: row["price"] or 0)
    fitted = BASELINES[name](made)
    strange = {"colour": "violet", "size": None, "price": None, "note": None}
    together = fitted.probability((*made.test.rows[:3], strange))
    assert together.shape == (4,) and ((together > 0) & (together < 1)).all()
    assert together[:3] == pytest.approx(fitted.probability(made.test.rows[:3]))
    assert fitted.parameters >= 1
    assert np.array_equal(BASELINES[name](made).probability(made.test.rows), fitted.probability(made.test.rows))


def test_test_rows_do_not_change_what_is_learned():
    made = table(lambda row: row["price"] or 0)
    other = Table(
        "made up", "?", made.train, made.valid, Part(made.test.rows[:5], ~made.test.yes[:5]), ("price",), ("note",)
    )
    for fit in BASELINES.values():
        rows = made.test.rows[:5]
        assert np.array_equal(fit(made).probability(rows), fit(other).probability(rows))


def test_arrays_say_what_the_rows_say():
    made = table(lambda row: 0)
    encode = Encoder(made)
    rows = made.train.rows
    hot, placed = encode.one_hot(rows), encode.ordinal(rows)
    assert (hot[:, :5].sum(1) == 2).all() and abs(hot[:, 5].mean()) < 0.1
    assert (
        encode.is_category[:2].all() and not encode.is_category[2:].any() and placed.shape[1] == len(encode.is_category)
    )
    assert np.array_equal(np.isnan(placed[:, 2]), [row["price"] is None for row in rows])
    assert hot[:, 6:].any(0).all(), "a phrase that no training row has"


def test_a_table_explains_itself():
    made = table(lambda row: -9)
    assert "train 450 rows, 0.0% yes" in made.explain() and "price p" in made.records().text(made.test.rows[0])
