import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.errors import ConfigError
from hf_qep.evaluation.cloze import FEWEST_WORDS, NEIGHBOURS, SENTENCES_BEFORE, cloze_rows
from hf_qep.evaluation.prompts import load_task

WORDS = ["river", "stone", "morning", "door", "house", "bread", "road", "night", "garden", "window", "fire", "boat"]


def sentence(generator, last):
    return f"{' '.join(generator.choices(WORDS, k=FEWEST_WORDS + 1)).capitalize()} {last}."


def a_text(seed=0, sentences=60):
    """Sentences whose last words are drawn with falling frequency."""
    generator = random.Random(seed)
    ends = generator.choices(WORDS, [1 / (i + 1) for i in range(len(WORDS))], k=sentences)
    return " ".join(sentence(generator, word) for word in ends)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), options=st.integers(2, 5), breaks=st.sampled_from([" ", "\n", "\r\n", "\n\n", "  "]))
def test_an_item_asks_for_the_word_that_follows_in_the_text(seed, options, breaks):
    text = re.sub(r"(?<=\.) ", lambda _: breaks, a_text(seed))
    rows = cloze_rows([text], options=options, seed=seed)
    plain = " ".join(text.split())
    assert len(rows) == 60 - SENTENCES_BEFORE
    for row in rows:
        assert f"{row['query']} {row['choices'][row['gold']]}." in plain
        assert len(set(row["choices"])) == options == len(row["choices"])
        assert set(row["choices"]) <= set(WORDS)


def test_the_seed_decides_and_the_right_answer_stands_anywhere():
    text = [a_text(sentences=600)]
    rows = cloze_rows(text, options=4, seed=1)
    assert rows == cloze_rows(text, options=4, seed=1) != cloze_rows(text, options=4, seed=2)
    places = Counter(row["gold"] for row in rows)
    assert all(0.18 < places[place] / len(rows) < 0.32 for place in range(4))


def test_other_options_are_about_as_frequent_as_the_right_one():
    generator = random.Random(0)
    names = ["".join(generator.choices("abcdefghijklmnop", k=7)) for _ in range(200)]
    ends = [name for count, name in enumerate(names, 1) for _ in range(count % 8 + 1)]
    generator.shuffle(ends)
    counts = Counter(ends)
    order = sorted(counts.values(), reverse=True)
    unasked = ["river"] * SENTENCES_BEFORE
    for row in cloze_rows([" ".join(sentence(generator, word) for word in [*unasked, *ends])]):
        place = order.index(counts[row["choices"][row["gold"]]])
        last = len(order) - 1 - order[::-1].index(counts[row["choices"][row["gold"]]])
        least, most = order[min(last + NEIGHBOURS, len(order) - 1)], order[max(place - NEIGHBOURS, 0)]
        assert all(least <= counts[word] <= most for word in row["choices"])


def test_names_short_sentences_and_beginnings_are_not_asked_for():
    before = " ".join(["The old man walked down to the river."] * SENTENCES_BEFORE)
    for end in ("They went along the road to London.", "He saw a house.", "It was as large as 100."):
        with pytest.raises(ConfigError, match="0 different words"):
            cloze_rows([f"{before} {end}"], options=2)
    texts = [f"{before} They went along the road to the {word}." for word in ("house", "door")]
    assert [row["choices"][row["gold"]] for row in cloze_rows(texts, options=2)] == ["house", "door"]


def test_long_contexts_are_cut_before_a_word():
    long_word = "x" * 150
    text = " ".join(f"Here {long_word} and {long_word} stand by the {word}." for word in WORDS)
    for row in cloze_rows([text], options=2):
        assert len(row["query"]) <= 400
        assert re.match(r"(Here|x{150}|and|stand|by|the|[a-z]+\.) ", row["query"])


def test_one_option_and_a_text_of_few_words_are_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        cloze_rows([a_text()], options=1)
    with pytest.raises(ConfigError, match="longer text"):
        cloze_rows([a_text()], options=13)


def test_plain_text_is_a_task_in_a_text_file_and_in_a_column(tmp_path):
    (tmp_path / "held.txt").write_text(a_text())
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": a_text(), "title": "A tale"}) + "\n")
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cloze_rows([a_text()], seed=3)))
    made, *read = (load_task("c", tmp_path / name, seed=3) for name in ("made.jsonl", "held.txt", "held.jsonl"))
    assert made == read[0] == read[1]
    assert (made.chance, made.form, made.rows_in_file) == (pytest.approx(0.2), "continuation", 57)
    some = load_task("c", tmp_path / "held.txt", limit=20, seed=3)
    assert len(some.items) == 20 and set(some.items) <= set(made.items)


def test_a_text_column_beside_those_of_a_task_changes_nothing(tmp_path):
    row = {"text": a_text(), "query": "He opened the", "choices": ["door", "river"], "gold": 0}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert load_task("t", tmp_path / "t.jsonl").items[0].continuations == ("door", "river")
