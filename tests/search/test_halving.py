from __future__ import annotations

import pytest
import torch

from hf_qep.algorithms.ranks import kendall, regret_at_1, spearman
from hf_qep.errors import ConfigError
from hf_qep.search.costs import Choice
from hf_qep.search.halving import Rung, halve
from hf_qep.search.journal import Journal
from tests.search.shapes import loss, space

ROOM = space()
GENERATOR = torch.Generator().manual_seed(0)
CHOICES = list(dict.fromkeys(Choice(ROOM.random(GENERATOR)) for _ in range(16)))


def noisy(choice):
    return loss(choice) + (int(choice.key(), 16) % 7) / 2


def ladder(calls=None, stop=None, **replaced):
    def counted(name, evaluate):
        def run(choice):
            if calls is not None:
                if len(calls) == stop:
                    raise KeyboardInterrupt
                calls.append((name, choice.key()))
            return evaluate(choice)

        return run

    steps = {"rough": (noisy, 0.5), "short": (lambda c: loss(c) + 0.1, 3), "long": (loss, 1)} | replaced
    return [Rung(name, counted(name, evaluate), keep) for name, (evaluate, keep) in steps.items()]


def journal(tmp_path, name="journal.jsonl"):
    return Journal(tmp_path / name, {"data": "toy"})


def test_fewer_are_judged_on_every_rung_and_the_best_stays(tmp_path):
    calls = []
    found = halve(CHOICES, ladder(calls), journal=journal(tmp_path))
    half = -(-len(CHOICES) // 2)
    assert [len(found.values[name]) for name in ("rough", "short", "long")] == [len(CHOICES), half, 3]
    assert len(calls) == len(set(calls)) == len(CHOICES) + half + 3
    best = sorted(CHOICES, key=noisy)[:half]
    assert found.survivors == (min(best, key=loss),)


def test_each_rung_is_compared_with_the_next(tmp_path):
    found = halve(CHOICES, ladder(), journal=journal(tmp_path))
    first, second = found.correlations
    seen = sorted(CHOICES, key=noisy)[: first.students]
    x, y = [noisy(c) for c in seen], [loss(c) + 0.1 for c in seen]
    assert (first.first, first.second) == ("rough", "short")
    assert first.spearman == pytest.approx(spearman(x, y)) and first.kendall == pytest.approx(kendall(x, y))
    assert first.regret == pytest.approx(regret_at_1(x, y)) and first.low <= first.spearman <= first.high
    assert second.spearman == pytest.approx(1) and second.students == 3


@pytest.mark.parametrize("stop", [0, 5, 17, 25])
def test_a_ladder_that_was_left_is_taken_up_where_it_was(tmp_path, stop):
    whole = halve(CHOICES, ladder(), journal=journal(tmp_path, "whole.jsonl"))
    before, after = [], []
    with pytest.raises(KeyboardInterrupt):
        halve(CHOICES, ladder(before, stop), journal=journal(tmp_path))
    assert halve(CHOICES, ladder(after), journal=journal(tmp_path)) == whole
    assert not set(before) & set(after)
    none = []
    assert halve(CHOICES, ladder(none), journal=journal(tmp_path)) == whole and not none


def test_what_fails_is_out_with_its_message(tmp_path):
    bad = sorted(CHOICES, key=noisy)[0]

    def broken(choice):
        if choice == bad:
            raise RuntimeError("no memory")
        return loss(choice)

    found = halve(CHOICES, ladder(short=(broken, 3)), journal=journal(tmp_path))
    assert found.failures == {("short", bad.key()): "RuntimeError: no memory"}
    assert bad.key() not in found.values["long"]
    with pytest.raises(ConfigError, match="rung 'rough' failed for all .*: the value is nan"):
        halve(CHOICES, ladder(rough=(lambda c: float("nan"), 3)), journal=journal(tmp_path, "nan.jsonl"))


def test_one_student_has_no_order(tmp_path):
    found = halve(CHOICES[:1], ladder(), journal=journal(tmp_path))
    assert [c.spearman for c in found.correlations] == [None, None] and found.survivors == (CHOICES[0],)


@pytest.mark.parametrize("keep, count", [(0.5, 4), (0.34, 3), (0.01, 1), (1, 1), (3, 3), (99, 7)])
def test_a_share_is_rounded_up_and_a_number_is_a_number(keep, count):
    assert Rung("r", loss, keep).survivors(7) == count


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_an_impossible_share_is_refused(keep):
    with pytest.raises(ConfigError, match="share below 1"):
        Rung("r", loss, keep)


@pytest.mark.parametrize("choices, rungs", [([], ladder()), (CHOICES, []), (CHOICES, ladder()[:1] * 2)])
def test_nothing_to_do_is_refused(tmp_path, choices, rungs):
    with pytest.raises(ConfigError, match="at least one each"):
        halve(choices, rungs, journal=journal(tmp_path))
