"""The measured part of the page says what the numbers say, whoever wins."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from crm import page
from crm.scores import difference_name, score, summary
from crm.tabular import BASELINES

from hf_qep.errors import ConfigError

README = Path(__file__).resolve().parents[2] / "scripts" / "crm" / "README.md"


def results(student=0.8, boosting=0.75, spread=0.01):
    """Results with one task; every interval has the half-width `spread`."""

    def row(value, **more):
        interval = [value - spread, value + spread]
        return {"accuracy": value, "auc": value, "accuracy_interval": interval, "auc_interval": interval} | more

    rows = {
        page.MAJORITY: row(0.6, auc=0.5, auc_interval=[0.5, 0.5]),
        page.BOOSTING: row(boosting, parameters=600),
        page.TEACHER: row(0.7, parameters=27_000_000, latency_equal_ms=130.0, latency_real_ms=700.0, memory_mb=108.0),
        page.STUDENT: row(
            student, parameters=250_000, latency_equal_ms=4.0, latency_real_ms=3.5, memory_mb=1.0, seeds=3
        ),
    }
    differences = {
        difference_name(page.STUDENT, other, metric): {
            "mean": student - rows[other][metric],
            "low": student - rows[other][metric] - spread,
            "high": student - rows[other][metric] + spread,
        }
        for other in (page.TEACHER, page.BOOSTING)
        for metric in ("accuracy", "auc")
    }
    return {
        "tasks": {"Made-up world": {"rows": rows, "differences": differences, "bayes": 0.9, "note": "No drift."}},
        "teacher_skill": [{"shots": n, "accuracy": 0.5 + n / 100, "auc": 0.5 + n / 90, "bayes": 0.94} for n in (0, 16)],
        "machine": {"processor": "two cores", "torch": "2.13"},
        "command": "python scripts/demo_crm.py --seeds 3",
    }  # fmt: skip


def said(found):
    return "\n".join(page.sentences(found["tasks"]["Made-up world"]))


def test_the_page_holds_tables_sentences_and_pictures(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{page.START}\nstale\n{page.END}\nbelow\n")
    written = page.write_page(results(), readme)
    text = readme.read_text()
    assert text.startswith(f"above\n{page.START}\n") and text.endswith(f"{page.END}\nbelow\n") and "stale" not in text
    assert [p.name for p in written] == ["README.md", "made-up-world.svg", "shots.svg"]
    assert all(f"]({p.name})" in text for p in written[1:]) and "python scripts/demo_crm.py --seeds 3" in text
    for picture in written[1:]:
        assert ET.parse(picture).getroot().tag.endswith("svg")
    assert "student" in written[1].read_text() and "best possible" in written[1].read_text()
    before = [p.read_bytes() for p in written]
    page.write_page(json.loads(json.dumps(results())), readme)
    assert [p.read_bytes() for p in written] == before


def test_a_table_shows_intervals_and_what_is_missing():
    found = results()["tasks"]["Made-up world"]
    lines = page.table(found).splitlines()
    assert lines[0].startswith("| method | parameters | accuracy (95 %) | AUC (95 %) |") and "NLL" not in lines[0]
    assert len({line.count("|") for line in lines}) == 1
    assert "| student | 250,000 | 80.0 % (79.0 to 81.0) | 0.800 (0.790 to 0.810) | 4 | 3.5 | 1 | 3 |" in lines
    assert "| majority | not measured | 60.0 % (59.0 to 61.0) |" in lines[2]
    assert "–" not in page.measured_part(results()) and "—" not in page.measured_part(results())


def test_a_student_that_wins_is_said_to_win_in_points_and_relative():
    told = said(results())
    assert "In accuracy the student (80.0 %) is better than the few-shot teacher, calibrated" in told
    assert "95 % interval +9.0 to +11.0; relative to the accuracy that is +14 %, to the errors -33 %" in told
    assert "1/108 of the parameters" in told and "1/32.5 of the time with the same prompt" in told
    assert "Gradient boosting on the raw columns loses to the student in accuracy (75.0 % against 80.0 %)" in told
    assert "should take it" not in told and "fine-tuned" not in told
    assert "of the way there from the commoner answer the student makes 67 %" in told


def test_a_student_that_loses_is_said_to_lose():
    told = said(results(student=0.59, boosting=0.75))
    assert "In accuracy the student (59.0 %) is worse than the few-shot teacher" in told
    assert "Gradient boosting on the raw columns beats the student in accuracy" in told and "should take it" in told
    assert "Always giving the commoner answer is right in 60.0 %: in accuracy the student is not above that" in told


def test_a_difference_within_its_interval_is_none():
    told = said(results(student=0.705, boosting=0.705))
    assert "cannot be told from the few-shot teacher" in told and "is better" not in told and "is worse" not in told
    assert "does as well as the student in accuracy" in told


def test_a_difference_counts_either_way_round_and_values_count_without_one():
    found = results()["tasks"]["Made-up world"]
    straight = page.verdict(found, page.STUDENT, page.TEACHER, "accuracy")
    turned = page.verdict(found, page.TEACHER, page.STUDENT, "accuracy")
    assert straight[0] == 1 and turned[0] == -1 and turned[1]["low"] == pytest.approx(-straight[1]["high"])
    found["differences"] = {}
    assert page.verdict(found, page.STUDENT, page.TEACHER, "accuracy") == (1, None)
    assert "no interval was measured" in "\n".join(page.sentences(found))


def test_the_negative_control_tells_of_leaks():
    found = results()["tasks"]["Made-up world"] | {"control": True}
    assert "something leaks" in page.sentences(found)[0] and "student" in page.sentences(found)[0]
    for row in found["rows"].values():
        row["auc_interval"] = [0.47, 0.53]
    assert "no method did better than chance" in page.sentences(found)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["tasks"]["Made-up world"]["rows"]["student"].update(acuracy=1), "acuracy"),
        (lambda r: r["tasks"]["Made-up world"].update(baize=1), "baize"),
        (lambda r: r["tasks"]["Made-up world"]["differences"].update(x={"mean": 1}), "low"),
        (lambda r: r.update(tasks={}), "no task"),
        (lambda r: r.update(computer="fast"), "computer"),
    ],
)
def test_results_that_would_be_shown_wrongly_are_refused(change, says):
    found = deepcopy(results())
    change(found)
    with pytest.raises(ConfigError, match=says):
        page.measured_part(found)


def test_a_page_without_marks_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text(f"{page.END}{page.START}")
    with pytest.raises(ConfigError, match="marks"):
        page.write_page(results(), tmp_path / "README.md")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_our_own_page_takes_what_scores_give(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    make = np.random.default_rng(0)
    yes = make.random(400) < 0.4
    good = [np.clip(0.5 * yes + 0.5 * make.random(400), 0, 1) for _ in range(2)]
    runs = {
        page.STUDENT: [score(p[:200], yes[:200], p[200:], yes[200:]) for p in good],
        page.MAJORITY: [score(np.full(200, 0.4), yes[:200], np.full(200, 0.4), yes[200:])],
    }
    task = summary(runs, [(page.STUDENT, page.MAJORITY)], samples=50)
    task["rows"][page.STUDENT]["parameters"] = 1000
    page.write_page({"tasks": {"bank": task}}, readme)
    assert "| student | 1,000 | " in readme.read_text(encoding="utf-8")
    assert {page.BOOSTING, page.MAJORITY} <= set(BASELINES)
    for name in (*BASELINES, page.STUDENT, page.TEACHER, page.TUNED, page.ALONE):
        assert f"`{name}`" in README.read_text(encoding="utf-8")
