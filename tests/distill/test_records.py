"""Rows of tables as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.distill.records import RecordText, words
from hf_qep.errors import ConfigError

ROWS = [
    {"age": age, "job": job, "pdays": pdays, "balance": balance, "note": note}
    for age, job, pdays, balance, note in [
        (20, "blue-collar", -1, -50.0, "Wants a  call\nback; soon."),
        (30, "admin.", -1, 10.0, None),
        (40, "self_employed", 7, 20.0, "x"),
        (50, None, 100, 30.0, "y"),
    ]
]
OPTIONS = {
    "names": {"pdays": "days since last contact"},
    "notes": ["note"],
    "special": {"pdays": {-1: "never"}, "job": {"Admin.": "office"}},
    "negative": ["balance"],
    "levels": 4,
}
anything = st.one_of(
    st.none(), st.text(max_size=8), st.floats(), st.integers(), st.integers().map(lambda n: 10**400 * n)
)


def test_a_row_reads_as_said():
    made = RecordText.fit(ROWS, **OPTIONS)
    assert made.texts(ROWS[:3]) == [
        "age p0 ; job blue collar ; days since last contact never ; balance negative ; note Wants a call back; soon.",
        "age p25 ; job office ; days since last contact never ; balance p0 ; note missing",
        "age p50 ; job self employed ; days since last contact p0 ; balance p25 ; note x",
    ]
    assert made.text(ROWS[3]).startswith("age p75 ; job missing ; days since last contact p50")


def test_texts_of_digits_are_numbers_only_when_declared():
    rows = [{"code": str(n)} for n in range(10)]
    assert RecordText.fit(rows).text({"code": "7"}) == "code 7"
    made = RecordText.fit(rows, numbers=["code"])
    assert [made.text({"code": v}) for v in ("7", "7.5", "seven", "", "nan")] == [
        "code p70", "code p80", "code other", "code missing", "code other",
    ]  # fmt: skip


@given(st.lists(st.integers(-5, 5) | st.floats(-9, 9), min_size=1, max_size=30), st.integers(2, 12))
@settings(max_examples=100, deadline=None)
def test_a_level_is_the_share_of_training_rows_below(values, levels):
    made = RecordText.fit([{"v": v} for v in values], levels=levels)
    for value in (*values, -99, 99, 0.5):
        below = sum(v < value for v in values)
        assert made.text({"v": value}) == f"v p{100 * min(levels - 1, levels * below // len(values)) // levels}"


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.data())
@settings(max_examples=60, deadline=None)
def test_levels_never_fall_as_numbers_rise(values, data):
    made = RecordText.fit([{"v": v} for v in values])
    asked = sorted(data.draw(st.lists(st.floats(allow_nan=False), min_size=2, max_size=10)))
    found = [int(made.text({"v": v}).removeprefix("v p")) for v in asked]
    assert found == sorted(found)


@given(st.lists(st.fixed_dictionaries({name: anything for name in ROWS[0]}), max_size=5))
@settings(max_examples=100, deadline=None)
def test_every_value_has_a_word_on_the_same_line_and_survives_json(rows):
    made = RecordText.fit(ROWS, **OPTIONS)
    again = RecordText.from_dict(made.to_dict())
    for row in rows:
        line = made.text(row)
        assert len(line.splitlines()) == 1 and line == again.text(row)
        assert not line.partition(" ; note ")[0].count(";") > 3


@given(st.lists(st.fixed_dictionaries({"a": st.text(max_size=4), "b": st.floats(-9, 9) | st.none()}), min_size=1))
@settings(max_examples=60, deadline=None)
def test_what_was_fitted_comes_back_from_a_file(tmp_path_factory, rows):
    try:
        made = RecordText.fit(rows)
    except ConfigError as error:
        assert "read alike" in str(error)
        return
    path = tmp_path_factory.mktemp("records") / "records.json"
    made.save(path)
    assert RecordText.load(path) == made
    assert all("other" not in made.text(row).split() or "other" in str(row["a"]).lower() for row in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"columns": ["age", "salary"]}, "salary"),
        ({"names": {"salary": "pay"}}, "salary"),
        ({"names": {"age": "age ; job"}}, "age ; job"),
        ({"names": {"age": "job"}}, "'age' and 'job'"),
        ({"special": {"pdays": {-1: "not; ever"}}}, "pdays"),
        ({"special": {"pdays": {"soon": "never"}}}, "pdays"),
        ({"numbers": ["job"]}, "job"),
        ({"levels": 1}, "levels"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, says):
    with pytest.raises(ConfigError, match=says):
        RecordText.fit(ROWS, **options)


def test_rows_and_values_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ConfigError, match="no row"):
        RecordText.fit([])
    with pytest.raises(ConfigError, match="'a-b' and 'a_b'.*'kind'"):
        RecordText.fit([{"kind": "a-b"}, {"kind": "a_b"}])
    with pytest.raises(ConfigError, match="'v'.*inf"):
        RecordText.fit([{"v": 1.0}, {"v": math.inf}])
    made = RecordText.fit([{"kind": "-1"}, {"kind": "YES"}])
    assert made.text({"kind": "1"}) == "kind other" and made.text({"kind": " yes "}) == "kind yes"
    with pytest.raises(ConfigError, match="no column 'kind'"):
        made.text({"sort": "yes"})


@pytest.mark.parametrize("text", ["", "[]", '{"columns": [{"column": "a"}]}', '{"columns": [{"name": "a", "x": 1}]}'])
def test_a_file_that_says_something_else_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError):
        RecordText.load(tmp_path / "r.json")
    with pytest.raises(ConfigError):
        RecordText.load(tmp_path / "absent.json")


def test_words_lose_what_joins_them():
    assert words("Self-Employed_since.2020") == "self employed since 2020"
