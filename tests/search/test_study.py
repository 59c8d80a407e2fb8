from __future__ import annotations

import multiprocessing
import os
import signal
import warnings

import pytest

from hf_qep.errors import ConfigError
from hf_qep.search.costs import Choice
from hf_qep.search.limits import Limits
from hf_qep.search.store import OBJECTIVES, open_study
from hf_qep.search.study import StudyOptions, search
from hf_qep.students.spec import CandidateSpec
from tests.search.shapes import loss, prices, space, teacher

pytest.importorskip("optuna")

ROOM = space(bits=(None, 1.0))
LIMITS = Limits(latency_ms=4.5, memory_mb=0.09)
OPTIONS = StudyOptions(trials=24, population=6, seed=3)


def run(storage, evaluate=loss, *, options=OPTIONS, limits=LIMITS, **others):
    return search(ROOM, evaluate, prices(), storage=storage, limits=limits, options=options, **others)


class Counting:
    """The loss, with the keys it was asked for; from the `stop`-th on it raises."""

    def __init__(self, stop=None, error=KeyboardInterrupt):
        self.keys, self.stop, self.error = [], stop, error

    def __call__(self, choice):
        if len(self.keys) == self.stop:
            raise self.error("stopped")
        self.keys.append(choice.key())
        return loss(choice)


@pytest.fixture(autouse=True)
def a_disk_that_need_not_be_waited_for(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


SEEDS = [Choice(CandidateSpec(ROOM.teacher.layers[:2], 32)), Choice(ROOM.teacher.identity(), 1.0)]


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_search_is_reproducible_and_judges_every_student_once(tmp_path, sampler):
    options = StudyOptions(trials=24, population=6, seed=3, sampler=sampler)
    counting = Counting()
    found = run(tmp_path / "a" / "study.log", counting, options=options)
    again = run(tmp_path / "b.log", options=options)
    assert found == again and found.trials == 24
    assert len(counting.keys) == len(set(counting.keys)) == len(found.judged())
    other = run(tmp_path / "c.log", options=StudyOptions(trials=24, population=6, seed=4, sampler=sampler))
    assert other != found


def test_only_students_within_the_limits_are_judged(tmp_path):
    found = run(tmp_path / "study.log")
    assert all((e.value is None) == bool(LIMITS.violations(e.cost)) for e in found.evaluated)
    values = [e.value for e in found.judged()]
    assert values == sorted(values) and values == [loss(e.choice) for e in found.judged()]


def test_the_sampler_learns_what_is_good_and_what_is_allowed(tmp_path):
    options = StudyOptions(trials=70, population=10, seed=1)
    found = run(tmp_path / "study.log", options=options, limits=Limits(latency_ms=1.6, memory_mb=0.04))
    early = [e for e in found.evaluated if e.slot < 10]
    late = [e for e in found.evaluated if e.slot >= 50]
    share = [sum(e.value is not None for e in part) / len(part) for part in (early, late)]
    assert share[0] < 0.5 < share[1]
    assert found.judged()[0].slot >= 10


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
@pytest.mark.parametrize("stop", [0, 1, 4, 7, 9])
def test_a_search_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, stop, sampler):
    options = StudyOptions(trials=24, population=6, seed=3, sampler=sampler)
    whole = run(tmp_path / "whole.log", options=options, seeds=SEEDS)
    stopped, resumed = Counting(stop), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "study.log", stopped, options=options, seeds=SEEDS)
    assert run(tmp_path / "study.log", resumed, options=options, seeds=SEEDS) == whole
    assert len(stopped.keys) == stop and not set(stopped.keys) & set(resumed.keys)


def test_seeds_are_tried_first_and_more_trials_go_on(tmp_path):
    few = StudyOptions(trials=3, population=6, seed=3)
    first = run(tmp_path / "study.log", options=few, seeds=SEEDS)
    assert [e.choice for e in first.evaluated][:2] == SEEDS
    counting = Counting()
    more = run(tmp_path / "study.log", counting, seeds=SEEDS)
    assert more.trials == 24 and more.evaluated[:3] == first.evaluated
    assert not {e.choice.key() for e in first.judged()} & set(counting.keys)


def test_sqlite_is_a_storage_too(tmp_path):
    few = StudyOptions(trials=4, population=2, seed=3)
    assert run(f"sqlite:///{tmp_path}/study.db", options=few) == run(tmp_path / "study.log", options=few)


def test_the_constraints_are_those_of_the_current_interface(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "study.log")
    study = open_study(tmp_path / "study.log", "search", "nsga2", 6, 3)
    for trial in study.trials:
        assert set(trial.constraints) == {"latency_ms", "memory_mb"} and len(trial.values) == len(OBJECTIVES)
        assert all(v <= 0 for v in trial.constraints.values()) == (trial.user_attrs["value"] is not None)


def test_a_failure_is_recorded_and_not_tried_again(tmp_path):
    failed = []

    def shaky(choice):
        if len(choice.spec.layers) == 2:
            failed.append(choice.key())
            raise RuntimeError("out of memory")
        return float("nan") if len(choice.spec.layers) == 3 else loss(choice)

    found = run(tmp_path / "study.log", shaky, options=StudyOptions(trials=40, population=6))
    assert set(found.failures.values()) == {"RuntimeError: out of memory", "ConfigError: the proxy is nan"}
    assert len(failed) == len(set(failed)) and set(failed) < set(found.failures)
    assert {len(e.choice.spec.layers) for e in found.judged()} <= {1, 4}
    before = len(failed)
    run(tmp_path / "study.log", shaky, options=StudyOptions(trials=40, population=6))
    assert len(failed) == before


def test_all_failures_end_the_search_with_the_first_message(tmp_path):
    def broken(choice):
        raise RuntimeError("no such layer")

    with pytest.raises(ConfigError, match="all 24 evaluations failed; the first: RuntimeError: no such layer"):
        run(tmp_path / "study.log", broken, limits=Limits())


def test_nothing_within_the_limits_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="none of .* students meets the limits; the nearest one.*`latency_ms`"):
        run(tmp_path / "study.log", limits=Limits(latency_ms=0.5))


def test_another_search_in_the_same_storage_is_refused(tmp_path):
    run(tmp_path / "study.log", fingerprint={"data": "a"})
    with pytest.raises(ConfigError, match="`limits` is not the same"):
        run(tmp_path / "study.log", limits=Limits(latency_ms=5), fingerprint={"data": "a"})
    with pytest.raises(ConfigError, match="`data` is not the same"):
        run(tmp_path / "study.log", fingerprint={"data": "b"})


@pytest.mark.parametrize("options", [{"trials": 0}, {"sampler": "grid"}, {"population": 1}])
def test_impossible_options_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options)).rstrip("s")):
        run(tmp_path / "study.log", options=StudyOptions(**options))


def test_a_line_that_a_crash_cut_off_does_not_end_a_study(tmp_path):
    path = tmp_path / "study.log"
    few = StudyOptions(trials=5, population=6, seed=3)
    run(path, options=few)
    path.write_bytes(path.read_bytes() + b'{"op_code": 6, "wor')
    assert run(path) == run(tmp_path / "whole.log")


def _share(path, evaluated):
    """One of two processes; what it judged is put into the queue."""
    counting = Counting()
    result = run(path, counting)
    evaluated.put((counting.keys, [e.choice.key() for e in result.evaluated], result.trials))


def _die(path):
    count = []

    def evaluate(choice):
        count.append(choice)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(choice)

    run(path, evaluate)


def test_two_processes_share_one_study(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_share, args=(tmp_path / "study.log", queue)) for _ in range(2)]
    for process in both:
        process.start()
    done = [queue.get(timeout=60) for _ in both]
    for process in both:
        process.join(timeout=60)
        assert process.exitcode == 0
    (mine, all_mine, trials), (theirs, all_theirs, _) = done
    assert all_mine == all_theirs and trials == 24
    found = run(tmp_path / "study.log", Counting(0))
    assert set(mine) | set(theirs) == {e.choice.key() for e in found.judged()}


def test_a_killed_process_loses_one_trial_and_it_is_made_up_for(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_die, args=(tmp_path / "study.log",))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    counting = Counting()
    whole = run(tmp_path / "whole.log")
    assert run(tmp_path / "study.log", counting) == whole
    assert len(counting.keys) == len(whole.judged()) - 3


def test_a_trial_of_another_machine_is_waited_for_until_it_is_stale(tmp_path):
    study = open_study(tmp_path / "study.log", "search", "nsga2", 6, 3)
    study.enqueue_trial({}, user_attrs={"slot": 0})
    study.ask().set_user_attr("owner", "elsewhere 1")
    options = StudyOptions(trials=6, population=6, seed=3, stale_after=0.5)
    assert run(tmp_path / "study.log", options=options) == run(tmp_path / "whole.log", options=options)


def test_the_teacher_of_the_tests_is_too_dear():
    assert LIMITS.violations(prices()(Choice(teacher().identity())))
