"""The whole demonstration on invented characters: what it leaves behind, and that it goes on where it was."""

from __future__ import annotations

import json
import shutil

import demo_unseen
import pytest
import torch
from safetensors.torch import load_file
from unseen import pipeline
from unseen.evidence import rows_of
from unseen.material import load_material
from unseen.offer import WORDS, offer
from unseen.pipeline import Job
from unseen.presets import PRESETS
from unseen.vit import embed

from hf_qep.distill.pictures import centred
from hf_qep.errors import ConfigError
from hf_qep.hub.cards.card import is_generated, render_student_card
from hf_qep.hub.cards.distilled import student_values
from hf_qep.hub.preflight import check_folder
from hf_qep.search.scoring import score
from hf_qep.students.saving import load_student
from hf_qep.students.spec import CandidateSpec
from tests.cli.test_commands import run
from tests.hub.card_checkpoints import numbers_in, unexplained_of_student


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    demo_unseen.main(arguments(folder))
    return folder


def arguments(folder, *more):
    words = ["--work", str(folder), "--preset", "quick", "--parts", "omniglot", "--workers", "1", "--quiet", *more]
    return demo_unseen.parsed(words)


def test_results_hold_every_method_seed_and_trial(work):
    found = json.loads((work / "results.json").read_text())["parts"]["omniglot"]
    assert set(found["units"]) == set(found["shown"]) and len(found["units"]) == 8
    for units in found["units"].values():
        assert set(units) == {"0", "1"}
        assert all(torch.tensor(unit["official"]).shape == (2, 20) for unit in units.values())
    costs = found["shrunk"]["costs"]
    assert all(costs[name]["parameters"] < costs["teacher"]["parameters"] for name in ("usual", "ours"))
    assert "our loss on the usual student" in (work / "report.md").read_text()


def test_teacher_and_student_load_and_place_a_drawing(work):
    image = centred(torch.rand(1, 1, 28, 28))
    for name in ("teacher", "student"):
        folder = work / "omniglot" / name
        assert embed(load_student(folder), image).shape == (1, 32)
        assert json.loads((folder / "preparation.json").read_text())["side"] == 28


def test_a_space_can_show_both(work):
    folder = work / "space" / "glyphs"
    facts, pictures = json.loads((folder / "specialist.json").read_text()), load_file(folder / "support.safetensors")
    assert pictures["images"].shape == (len(facts["names"]), facts["image_size"], facts["image_size"])
    assert pictures["queries"].min() >= 0 and pictures["queries"].max() <= 1 and facts["centred"]
    assert (folder.parent / facts["teacher"] / "config.json").exists() and load_student(folder)


def test_our_student_has_a_record_of_what_the_package_measures(work):
    """Scored again by the package alone, on the drawings that no student saw; the rest is as the results have it."""
    folder, results = work / "space" / "glyphs", json.loads((work / "results.json").read_text())
    facts, results = json.loads((folder / "distillation.json").read_text()), results["parts"]["omniglot"]
    test = rows_of(load_material(PRESETS["quick"](), None).unseen)
    for who, name in (("teacher", "glyphs-teacher"), ("student", "glyphs")):
        model = facts["models"][who]
        assert model["score"] == score(load_student(folder.parent / name), test).summary()
        assert model["score"]["answers"] == facts["rows"]["test"] == 400 and model["latency_ms"] > 0
    assert facts["models"]["teacher"]["parameters"] > facts["models"]["student"]["parameters"]
    assert facts["retention"]["paired"] and facts["made_of"]["auto_class"] == "AutoModel"
    assert facts["training"]["steps"] == facts["schedule"]["steps"] == PRESETS["quick"]().student.steps
    assert facts["training"]["seconds"] == results["units"]["ours"]["0"]["seconds"]
    assert facts["spec"] == CandidateSpec.from_dict(results["shrunk"]["spec"]).key()
    assert facts["teacher"] == json.loads((folder / "student.json").read_text())["teacher"] == "glyphs-teacher"


def test_the_card_has_no_number_that_is_in_no_file(work):
    folder = work / "space" / "glyphs"
    facts, card = json.loads((folder / "distillation.json").read_text()), (folder / "README.md").read_text()
    code = (folder / "modeling_student.py").is_file()
    values = student_values(facts, "glyphs", specialised_for=WORDS, remote_code=code)
    assert is_generated(card) and card == render_student_card(values)
    assert len(numbers_in(card)) > 30 and unexplained_of_student(card, values) == []
    assert "one-shot recognition among 20 classes" in card and "chance: 5.0 %" in card


def test_our_student_can_be_pushed_and_verified(work, tmp_path, loopback_hub):
    folder = shutil.copytree(work / "space" / "glyphs", tmp_path / "glyphs")
    report = check_folder(folder)
    assert report.problems == report.warnings == []
    words = ("--card", "--repo-id", "alice/glyphs", "--specialised-for", WORDS)
    assert run("distill", "report", folder, *words, "--json").exit_code == 0
    planned = json.loads(run("push", folder, "alice/glyphs", "--dry-run", "--json").stdout)
    assert planned["problems"] == [] and planned["visibility"] == "private"
    assert {file["path"] for file in planned["files"]} == {path.name for path in folder.iterdir()}
    checked = json.loads(run("verify", folder, "--json").stdout)
    assert checked["ok"] and any("(accuracy)" in line for line in checked["not_checked"])


def test_a_folder_without_the_first_weights_is_offered_too(work, tmp_path):
    """A folder that was made small keeps the teacher, the student, the lessons and the results."""
    small, results = tmp_path / "omniglot", json.loads((work / "results.json").read_text())["parts"]["omniglot"]
    for name in ("teacher", "student", "lessons"):
        shutil.copytree(work / "omniglot" / name, small / name)
    folder = offer(Job("omniglot", PRESETS["quick"](), None, small), results, tmp_path / "space")
    whole, found = (
        json.loads((place / "distillation.json").read_text()) for place in (work / "space" / "glyphs", folder)
    )
    assert "student, before" in whole["models"] and "student, before" not in found["models"]
    assert "| student, before it was taught |  | not measured |" in (folder / "README.md").read_text()
    assert found["models"]["student"]["score"] == whole["models"]["student"]["score"]


def test_nothing_is_done_twice(work, monkeypatch):
    monkeypatch.setattr(pipeline, "_pooled", lambda *_: iter(()))
    before = (work / "results.json").read_text()
    demo_unseen.main(arguments(work))
    after = json.loads((work / "results.json").read_text())
    assert after["parts"]["omniglot"]["units"] == json.loads(before)["parts"]["omniglot"]["units"]


def test_without_data_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_unseen, "SHARED", tmp_path / "nothing")
    monkeypatch.delenv("HF_QEP_DATA", raising=False)
    words = ["--work", str(tmp_path), "--parts", "omniglot", "--quiet"]
    with pytest.raises(ConfigError, match="--fetch"):
        demo_unseen.main(demo_unseen.parsed(words))
