from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.search.costs import Choice, Cost
from hf_qep.search.halving import Correlation, Rung, halve
from hf_qep.search.journal import Journal
from hf_qep.search.limits import Limits
from hf_qep.search.results import PICKS, Candidate, SearchResult
from hf_qep.search.study import StudyOptions, search
from hf_qep.students.spec import CandidateSpec, LayerSpec
from tests.search.shapes import loss, prices, space

LIMITS = Limits(latency_ms=10)


def student(width, bits=None, vocabulary=None):
    return Choice(CandidateSpec((LayerSpec(0, 1, 1, width),), 8, vocabulary=vocabulary), bits)


def candidate(number, value, ms, mb=1.0, rung="late", **others):
    return Candidate(student(number), Cost(ms, mb, 10.0 * number), {"search": value, rung: value}, **others)


def result(*candidates, limits=LIMITS, **others):
    return SearchResult(tuple(candidates), limits, ("search", "late"), **others).measured({})


FOUND = result(
    candidate(1, value=9.0, ms=1),
    candidate(2, value=3.0, ms=2),
    candidate(3, value=2.5, ms=6),
    candidate(4, value=2.0, ms=9),
    candidate(5, value=1.0, ms=12),  # beyond the limit
    candidate(6, value=4.0, ms=3),  # dominated
    Candidate(student(7), Cost(0.5, 0.1, 1.0), {"search": 0.1}),  # not judged by the last rung
    Candidate(student(8), Cost(0.1, 0.1, 1.0), {}),  # not judged at all
)


def picked(found, rule, **others):
    return found.pick(rule, **others).choice.spec.layers[0].intermediate_size


def test_the_rules_take_what_they_say():
    assert [picked(FOUND, rule) for rule in PICKS] == [2, 1, 4]
    assert picked(FOUND, "accurate", limits=Limits()) == 5
    assert picked(FOUND, "fast", limits=Limits(parameters=35)) == 1
    assert picked(FOUND, "accurate", limits=Limits(parameters=35)) == 3


def test_the_front_holds_finalists_within_the_limits_only():
    assert [c.choice.spec.layers[0].intermediate_size for c in FOUND.front()] == [1, 2, 3, 4]


def test_no_finalist_within_the_limits_is_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match="none of 6 students meets the limits; the nearest one"):
        FOUND.pick("fast", limits=Limits(latency_ms=0.9))
    with pytest.raises(ConfigError, match="pick one of"):
        FOUND.pick("cheap")


def test_measured_costs_count_and_the_error_of_the_prediction_is_told():
    again = FOUND.measured({student(4).key(): Cost(12.0, 2.0, 40.0)})
    assert picked(again, "accurate") == 3
    changed = next(c for c in again.candidates if c.measured)
    assert changed.errors() == {"latency_ms": -0.25, "memory_mb": -0.5, "parameters": 0} and not changed.pareto


CORRELATION = Correlation("search", "late", 6, 0.5, -0.1, 0.9, 0.4, 0.25)


def test_files_say_the_same_and_are_the_same_each_time(tmp_path):
    failures = (("late", "abc", "no | memory\nleft"),)
    found = result(*FOUND.candidates, correlations=(CORRELATION,), failures=failures, settings={"seed": 1})
    found = found.measured({student(2).key(): Cost(2.5, 1.0, 20.0)})
    for name in ("a", "b"):
        found.write(tmp_path / name)
    names = ["candidates.jsonl", "pareto.svg", "report.md", "result.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert SearchResult.read(tmp_path / "a") == found
    lines = [json.loads(line) for line in (tmp_path / "a" / "candidates.jsonl").read_text().splitlines()]
    assert [line["pareto"] for line in lines] == [c.pareto for c in found.candidates]
    report = (tmp_path / "a" / "report.md").read_text()
    assert "| search | late | 6 | 0.50 | -0.10 to 0.90 | 0.40 | 0.25 |" in report
    assert "latency -20.0%" in report and "no \\| memory left" in report and "latency ≤ 10 ms" in report
    assert sum(line.endswith("accurate |") for line in report.splitlines()) == 1
    assert "<svg" in (tmp_path / "a" / "pareto.svg").read_text()


def test_long_vocabularies_are_written_once(tmp_path):
    ids = tuple(range(5000))
    candidates = [Candidate(student(n, 1.0, ids), Cost(1, 1, 1), {"late": float(n)}) for n in range(1, 6)]
    found = result(*candidates, candidate(9, 1.0, 1.0))
    found.write(tmp_path)
    assert SearchResult.read(tmp_path) == found
    assert (tmp_path / "result.json").read_text().count("4999") == 1
    assert (tmp_path / "candidates.jsonl").read_text().count("4999") == 0


def test_a_result_without_a_student_within_the_limits_can_be_written(tmp_path):
    result(candidate(1, 1.0, 99.0)).write(tmp_path)
    assert "No student within the limits." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("content", [None, "[]", "{}", "nonsense"])
def test_what_is_no_result_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(CheckpointError, match="no result of a search"):
        SearchResult.read(tmp_path)


def test_study_and_ladder_make_a_result(tmp_path):
    pytest.importorskip("optuna")
    limits = Limits(latency_ms=4.0)
    study = search(
        space(),
        lambda c: loss(c) + 1,
        prices(),
        storage=tmp_path / "s.log",
        limits=limits,
        options=StudyOptions(trials=12),
    )
    judged = [e.choice for e in study.judged()]
    ladder = halve(judged, [Rung("late", loss, 2)], journal=Journal(tmp_path / "j.jsonl", {}))
    found = SearchResult.of(study, limits, ladder, {"seed": 0})
    assert len(found.candidates) == len(study.evaluated) and len(found.finalists()) == len(judged)
    assert found.pick("accurate").choice == min(judged, key=loss)
    assert [(c.first, c.second) for c in found.correlations] == [("search", "late")]
    assert found.correlations[0].spearman == pytest.approx(1)
    assert SearchResult.of(study, limits).pick("accurate").choice == judged[0]
    clash = halve(judged, [Rung("search", loss, 2)], journal=Journal(tmp_path / "k.jsonl", {}))
    with pytest.raises(ConfigError, match="no rung may be called"):
        SearchResult.of(study, limits, clash)


def test_where_the_machine_was_busy_the_predicted_costs_decide():
    slow = {c.choice.key(): replace(c.predicted, latency_ms=90 * c.predicted.latency_ms) for c in FOUND.candidates}
    busy = FOUND.measured(slow)
    with pytest.warns(UserWarning, match="busier"):
        assert busy.pick("accurate").choice == FOUND.pick("accurate").choice
    with pytest.raises(ConfigError, match="nearest"):
        busy.pick("accurate", limits=Limits(latency_ms=0.001))
