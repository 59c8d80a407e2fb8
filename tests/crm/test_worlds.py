"""Made-up worlds: their rule can be found, and nothing can be right more often than they say."""

from __future__ import annotations

import numpy as np
import pytest
from crm.prompts import ANSWERS, shown, write
from crm.tasks import TARGET_WORLD, Sizes, examples, target_bayes, world_table
from crm.teacher import FIRST_WORLD, TeacherPlan, batch, curriculum, train_tokenizer, world_text
from crm.worlds import NOTE, TARGET, Recipe, World
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_who_knows_the_rule_is_right_as_often_as_the_world_says(seed):
    world = World(seed)
    drawn = world.deals(4_000, 1)
    assert abs((drawn.won == drawn.truth).mean() - world.bayes) < 0.025
    assert 0.05 < drawn.truth.mean() < 0.95
    assert 0.88 <= world.bayes <= 0.98


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 50))
def test_the_record_says_all_that_the_outcome_depends_on(seed, which):
    """Deals that read alike have the same true outcome."""
    world = World(seed, Recipe(fields=(2, 3), remarks=(2, 2), sentences=(1, 1)))
    drawn = world.deals(3_000, which)
    known = [(tuple(v), tuple(sorted(s))) for v, s in zip(drawn.values.tolist(), drawn.said.tolist(), strict=True)]
    outcome = dict(zip(known, drawn.truth, strict=True))
    assert all(outcome[key] == truth for key, truth in zip(known, drawn.truth, strict=True))


def test_rows_hold_what_the_rule_reads():
    world = World(TARGET_WORLD, TARGET)
    drawn = world.deals(200, 0)
    rows = world.rows(drawn)
    for k, field in enumerate(world.fields):
        values = [row[field.name] for row in rows]
        if field.values is None:
            assert [value // 10 for value in values] == drawn.values[:, k].tolist()
        else:
            assert values == [list(field.values)[v] for v in drawn.values[:, k]]
    assert all(row[NOTE].count(" . ") == 1 for row in rows)
    assert list(rows[0]) == world.columns


def test_worlds_and_deals_come_again_with_their_seeds_and_never_without():
    def same(one, two):
        return np.array_equal(one.values, two.values) and np.array_equal(one.won, two.won)

    assert same(World(3).deals(50, 1), World(3).deals(50, 1))
    assert not same(World(3).deals(50, 1), World(3).deals(50, 2))
    assert World(3).columns != World(4).columns


def test_interactions_are_no_effects_of_single_columns():
    world = World(TARGET_WORLD, TARGET)
    assert len(world.products) == 3
    for _, _, table in world.products:
        np.testing.assert_allclose(table.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(table.mean(1), 0, atol=1e-9)
        assert np.abs(table).max() > 0.1


def test_the_target_is_none_of_the_worlds_that_are_taught():
    assert target_bayes() == pytest.approx(0.94)
    assert TARGET_WORLD < FIRST_WORLD
    table = world_table(Sizes(300, 100, 100))
    texts = [set(table.records().texts(part.rows)) for part in (table.train, table.valid, table.test)]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_a_batch_marks_the_outcomes_and_nothing_else():
    plan = TeacherPlan(vocabulary=400, tokens=448, batch=2, steps=10)
    tokenizer = train_tokenizer([world_text(FIRST_WORLD + k, 5) for k in range(40)], plan.vocabulary)
    general = np.array(tokenizer("nothing about deals. " * 60)["input_ids"])
    answers = {tokenizer(answer)["input_ids"][0] for answer in ANSWERS}
    sizes = set()
    for step in range(plan.steps):
        ids, marked = batch(plan, step, tokenizer, general)
        again, _ = batch(plan, step, tokenizer, general)
        assert (ids == again).all()
        assert marked.any() and set(ids[marked].tolist()) <= answers
        assert ids.numel() - len(ids) == plan.tokens * plan.batch
        sizes.add(tuple(ids.shape))
    assert len(sizes) > 2, "rows grow with the training"
    assert curriculum(0.0)[1].fields[1] < curriculum(1.0)[1].fields[1]


def test_examples_fit_and_are_balanced():
    table = world_table(Sizes(400, 50, 50))
    tokenizer = train_tokenizer((world_text(FIRST_WORLD + k, 5) for k in range(60)), 600)
    records = table.records()
    for room in (900, 400, 60):
        text, shots = examples(table, records, tokenizer, room, 0)
        assert text.startswith(f"{table.question} ?\n") and text.endswith("\n")
        assert text.count(" -> yes") == text.count(" -> no") == shots // 2
        assert shots == 0 or len(tokenizer(text)["input_ids"]) < room
    assert examples(table, records, tokenizer, 900, 0) != examples(table, records, tokenizer, 900, 1)
    assert shots == 0


def test_a_world_is_written_as_its_table_would_be():
    """Levels that are known and those that are learnt from many rows give the same words but at their edges."""
    table, world = world_table(Sizes(4_000, 50, 200)), World(TARGET_WORLD, TARGET)
    learnt, known = table.records().texts(table.test.rows), write(world, table.test.rows)
    same = np.mean([one == two for one, two in zip(learnt, known, strict=True)])
    assert same > 0.6
    assert shown("will it be", ["age p40"], [True]) == "will it be ?\nage p40 -> yes\n"
