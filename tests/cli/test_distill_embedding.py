"""`hf-qep distill` of an encoder of images whose test has classes: scored by one-shot recognition, taught without."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from hf_qep.evaluation.estimates import Estimate
from hf_qep.hub.cards.numbers import estimate
from tests.cli.distilling import SEARCH, Work, distil, refused
from tests.cli.test_commands import run

TASK = ("--task", "image-embedding")
SCORED = "one-shot recognition among 4 classes: nearest by cosine to one image of each"


@pytest.fixture(scope="module")
def unseen_folder(tmp_path_factory):
    """Four other classes of eight images than those that are learned from."""
    folder, draw = tmp_path_factory.mktemp("unseen") / "others", np.random.default_rng(1)
    for n in range(32):
        (folder / "vwxy"[n % 4]).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 60, (16, 16, 3)) + np.roll([150, 60, 0], n % 4)
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / "vwxy"[n % 4] / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory, teacher_folder, image_folder, unseen_folder):
    work = Work(tmp_path_factory.mktemp("work") / "encoder")
    words = ("--data", image_folder, "--test", unseen_folder, "--out", work.folder)
    work.analysis = distil("analyze", teacher_folder("clip_vision_model"), *words, *TASK)
    work.search = distil("search", work.folder, "--parameters", 60_000, *SEARCH)
    return work


@pytest.fixture(scope="module")
def taught(work, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "encoder"
    return out, distil("train", work.folder, "--out", out, "--epochs", 2)


def test_an_analysis_says_what_the_teacher_recognises(work):
    found = work.analysis["teacher"]
    assert (found["scored"], found["majority"], found["nll"], found["auc"]) == (SCORED, 0.25, None, None)
    assert found["accuracy"] > 0.25


def test_teacher_and_student_answer_the_same_questions(work, taught):
    out, said = taught
    scores = {who: model["score"] for who, model in said["models"].items()}
    assert {score["answers"] for score in scores.values()} == {32} and said["rows"]["test"] == 32
    assert {score["scored"] for score in scores.values()} == {SCORED}
    assert scores["teacher"]["accuracy"] == work.analysis["teacher"]["accuracy"], "asked or told, it says the same"
    kept = said["retention"]
    assert kept["paired"] and kept["raw"]["value"] == pytest.approx(
        scores["student"]["accuracy"] / scores["teacher"]["accuracy"]
    )
    assert json.loads((out / "distillation.json").read_text()).items() <= said.items()


def test_labels_are_not_learned_from(work, taught):
    _, said = taught
    assert said["loss"]["alpha"] == 0 and said["training"]["after"].keys() == {"loss"}
    assert "no labels to learn from" in refused("train", work.folder, "--out", work.folder / "s", "--alpha", 0.5)
    assert "no labels to learn from" in refused("train", work.folder, "--out", work.folder / "s", "--baselines")


def test_a_report_and_a_card_say_what_was_asked(taught):
    out, said = taught
    table = run("distill", "report", out).stdout
    assert SCORED in " ".join(table.split()) and "student, before" in table
    distil("report", out, "--card", "--repo-id", "bob/encoder")
    card = (out / "README.md").read_text()
    assert SCORED in card and "chance: 25.0 %" in card and "the teacher's embeddings" in card
    for model in said["models"].values():
        score = model["score"]
        assert estimate(Estimate(score["accuracy"], score["accuracy_stderr"], score["answers"]), factor=100) in card
    assert "nll" not in card and "hidden states" not in card
    checked = json.loads(run("verify", out, "--json").stdout)
    assert checked["ok"], checked["differs"]
    assert any("scores of the task (accuracy)" in line for line in checked["not_checked"])


def test_a_test_without_two_rows_of_a_class_is_not_scored(
    taught, teacher_folder, image_folder, unseen_folder, tmp_path
):
    for name in "vwxy":
        (tmp_path / "few" / name).mkdir(parents=True)
        first = min((unseen_folder / name).iterdir())
        (tmp_path / "few" / name / "0.png").write_bytes(first.read_bytes())
    words = ("--data", image_folder, "--test", tmp_path / "few", "--out", tmp_path / "w", *TASK)
    found = distil("analyze", teacher_folder("clip_vision_model"), *words)
    assert found["teacher"].keys() == {"parameters", "rows", "tokens"}
    spec = ("--spec", taught[0] / "student.json")
    said = distil("train", tmp_path / "w", *spec, "--out", tmp_path / "s", "--epochs", 1)
    assert said["models"]["student"]["score"] == {} and said["retention"] is None
    assert "give its test labels" in refused("report", tmp_path / "s", "--card")
