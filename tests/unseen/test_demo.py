"""The whole demonstration on invented characters: what it leaves behind, and that it goes on where it was."""

from __future__ import annotations

import json

import demo_unseen
import pytest
import torch
from safetensors.torch import load_file
from unseen import pipeline
from unseen.vit import embed

from hf_qep.distill.pictures import centred
from hf_qep.errors import ConfigError
from hf_qep.students.saving import load_student


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
