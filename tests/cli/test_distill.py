"""`hf-qep distill` from a teacher to a student, for every task, as a user calls it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qep.cli import distill_train
from hf_qep.distill.student_trainer import train_student
from hf_qep.engine.source import load_float_model, load_quantized
from hf_qep.evaluation.estimates import Estimate
from hf_qep.hub.cards.numbers import estimate
from hf_qep.students.saving import load_student
from tests.cli.conftest import write_rows
from tests.cli.distilling import CAUSAL, SEARCH, distil, refused
from tests.cli.test_commands import run

ONE = ("--epochs", 1)
NAMES = ["teacher", "student, before", "student"]


def answers_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_student(folder)(input_ids=tokens).logits


def test_an_analysis_says_how_good_the_teacher_is_and_what_its_layers_do(question_work):
    found = question_work.analysis
    assert found["teacher"]["parameters"] == 78_144 and found["teacher"]["rows"] == 29
    assert found["teacher"].keys() >= {"nll", "accuracy", "auc", "majority"}
    assert [row["layer"] for row in found["layers"]] == ["0", "1"]
    assert all(0 <= row["influence"] <= 2 and row["mlp"] > 0 for row in found["layers"])


def test_a_search_gives_students_within_the_limit_and_says_which_to_pick(question_work):
    found = question_work.search
    measured = {c["key"]: c["measured"] for c in found["candidates"] if c["measured"]}
    assert found["picks"].keys() == {"balanced", "fast", "accurate"}
    assert all(measured[key]["parameters"] <= 65_000 for key in found["picks"].values())
    assert found["teacher"]["parameters"] == 78_144
    assert {c["bits"] for c in found["candidates"]} <= {None, 1.0}


def test_a_student_is_written_before_it_learns(question_work, tmp_path):
    said = distil("materialize", question_work.folder, "--out", tmp_path / "s")
    model, tokenizer = load_student(tmp_path / "s"), AutoTokenizer.from_pretrained(tmp_path / "s")
    assert model.num_parameters() == said["parameters"] <= 65_000
    assert said["changes"]["vocabulary"] == [128, model.config.vocab_size] and len(tokenizer) <= model.config.vocab_size
    note = json.loads((tmp_path / "s" / "student.json").read_text())
    assert note["teacher"] == "llama", "where a teacher lay on this machine is nobody's business"


@pytest.fixture(scope="module")
def taught(question_work, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "student"
    words = ("--epochs", 2, "--baselines", "--learning-rate", 0.002)
    return out, distil("train", question_work.folder, "--out", out, *words)


def test_a_training_measures_everybody_on_the_same_rows(taught):
    out, said = taught
    assert list(said["models"]) == [*NAMES[:2], "student, labels only", "student"]
    assert {m["score"]["answers"] for m in said["models"].values()} == {said["rows"]["test"]} == {6}
    assert said["models"]["teacher"]["distance"] == 0 < said["models"]["student"]["distance"]
    assert json.loads((out / "distillation.json").read_text()).items() <= said.items()


def test_the_file_of_a_training_holds_what_a_card_and_a_benchmark_need(taught):
    out, said = taught
    for model in said["models"].values():
        assert model["score"].keys() >= {"nll", "nll_stderr", "accuracy", "accuracy_stderr", "auc", "auc_stderr"}
    assert said["models"]["teacher"]["latency_ms"] > 0 < said["models"]["student"]["latency_ms"]
    assert said["schedule"]["learning_rate"] == 0.002 and said["loss"]["alpha"] == 0.5
    assert said["training"]["steps"] == 4 and said["training"]["before"]["loss"] > said["training"]["after"]["loss"]
    assert said["made_of"]["student_bytes"] == (out / "model.safetensors").stat().st_size
    assert said["versions"].keys() >= {"torch", "transformers", "optuna"}
    assert said["retention"].keys() == {"raw", "corrected", "paired", "note"}
    assert str(out.parent) not in (out / "distillation.json").read_text()


def test_a_taught_student_is_an_ordinary_checkpoint(taught, rows_file):
    out, said = taught
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.num_parameters() == said["models"]["student"]["parameters"]
    prompt = json.loads(rows_file.read_text().splitlines()[0])["prompt"]
    assert tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True) == prompt
    assert torch.isfinite(model(**tokenizer(prompt, return_tensors="pt")).logits).all()


def test_training_leaves_nothing_behind_but_what_the_teacher_said(taught, question_work):
    assert not list((question_work.folder / "training").glob("*"))
    assert list((question_work.folder / "teacher").glob("train-*"))


def test_a_card_shows_the_numbers_of_the_file(taught):
    out, said = taught
    shown = distil("report", out, "--card", "--repo-id", "bob/digits", "--specialised-for", "comparing digits")
    card = (out / "README.md").read_text()
    assert shown["models"] == said["models"]
    assert "comparing digits" in card and "student, labels only" in card
    for model in said["models"].values():
        score = model["score"]
        assert estimate(Estimate(score["accuracy"], score["accuracy_stderr"], score["answers"]), factor=100) in card
    for name, change in said["changes"].items():
        assert name in card and (not isinstance(change, list) or f"{change[0]} before, {change[1]} now" in card)
    assert "base_model:" not in card, "a folder is nothing that the Hub knows"


def test_the_card_of_a_teacher_of_the_hub_names_it(taught, tmp_path):
    out = tmp_path / "student"
    shutil.copytree(taught[0], out)
    facts = json.loads((out / "distillation.json").read_text())
    facts |= {"teacher": "acme/large", "start": "acme/large"}
    (out / "distillation.json").write_text(json.dumps(facts))
    distil("report", out, "--card")
    card = (out / "README.md").read_text()
    assert "base_model: acme/large" in card and "base_model_relation: finetune" in card


def test_a_report_of_a_work_folder_shows_the_search(question_work):
    shown = distil("report", question_work.folder)
    assert shown == question_work.search
    table = run("distill", "report", question_work.folder).stdout
    assert "Pareto" in table and "teacher" in table and "accurate" in table


def test_tables_are_printed_without_json(taught, question_work, tmp_path):
    result = run("distill", "report", taught[0])
    assert "student, labels only" in result.stdout and "AUC" in result.stdout
    words = ("materialize", question_work.folder, "--out", tmp_path / "s")
    assert "hf-qep distill train" in run("distill", *words).stderr
    assert "hf-qep" not in run("distill", *words, "--overwrite", "--quiet").stderr


def test_a_student_can_be_picked_by_its_key(question_work, tmp_path):
    key = question_work.search["picks"]["fast"]
    said = distil("materialize", question_work.folder, "--out", tmp_path / "s", "--pick", key.partition("-")[0][:8])
    assert key.startswith(said["key"])


def test_a_search_under_other_limits_uses_what_was_measured(question_work, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(question_work.folder, folder)
    more = ("--trim-vocabulary", "--bits", 1, "--max-added", 1)
    before = (folder / "search" / "latency.json").read_bytes()
    found = distil("search", folder, "--parameters", 55_000, *SEARCH, *more)
    assert (folder / "search" / "latency.json").read_bytes() == before
    assert all(c["measured"]["parameters"] <= 55_000 for c in found["candidates"] if c["pareto"])


def test_a_search_begins_again_and_one_that_was_stopped_goes_on(question_work, tmp_path, monkeypatch):
    from hf_qep.search import study

    folder, judge, calls = tmp_path / "work", study._Worker._judge, []
    shutil.copytree(question_work.folder, folder)

    def stopped(self, trial):
        calls.append(trial.number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(self, trial)

    monkeypatch.setattr(study._Worker, "_judge", stopped)
    words = ("search", folder, "--parameters", 65_000, *SEARCH)
    result = run("distill", *words, "--overwrite")
    assert result.exit_code == 130 and "goes on" in result.stderr
    assert distil(*words)["picks"] and len(calls) == 3 + 4, "two were judged before, and the third again"


def test_a_training_that_was_stopped_goes_on_to_the_same_student(question_work, tmp_path, monkeypatch):
    words = ("train", question_work.folder, "--epochs", 2, "--pick", "fast")
    whole = distil(*words, "--out", tmp_path / "whole")
    assert whole["training"]["best_epoch"] in (0, 1, 2)

    def stopped(student, *args, **kwargs):
        train_student(copy.deepcopy(student), *args, **kwargs | {"epochs": 2.0})
        drop = max(Path(kwargs["output_dir"]).glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
        assert drop.name == "checkpoint-4"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill_train, "train_student", stopped)
        result = run("distill", *words, "--out", tmp_path / "resumed")
    assert result.exit_code == 130 and "--resume" in result.stderr
    assert not (tmp_path / "resumed").exists()
    resumed = distil(*words, "--out", tmp_path / "resumed", "--resume")
    assert resumed["models"]["student"]["score"] == whole["models"]["student"]["score"]
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(answers_of(tmp_path / "whole", tokens), answers_of(tmp_path / "resumed", tokens))


def test_a_student_goes_on_learning_in_its_own_vocabulary(taught, question_work, tmp_path):
    out, said = taught
    again = distil("train", question_work.folder, "--student", out, "--out", tmp_path / "again", *ONE)
    assert again["models"]["student, before"]["score"] == pytest.approx(said["models"]["student"]["score"], rel=1e-4)
    assert again["changes"] == said["changes"] and again["start"] == "llama"
    assert (tmp_path / "again" / "vocab_map.safetensors").is_file()


def test_a_packed_student_learns_and_is_packed_afterwards(question_work, teacher_folder, rows_file, tmp_path):
    words = ("--dataset", f"{rows_file}:text", "--num-samples", 4, "--seq-len", 16, "--method", "onebit")
    assert run("quantize", teacher_folder("llama"), "--out", tmp_path / "q", *words, "--effort", "fast").exit_code == 0
    said = distil("train", question_work.folder, "--student", tmp_path / "q", "--out", tmp_path / "s", "--epochs", 2)
    before, after = (said["models"][name]["score"]["nll"] for name in NAMES[1:])
    assert after <= before and said["changes"] == {} and said["spec"] is None
    settings = json.loads((tmp_path / "s" / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == "qep"
    model = load_quantized(tmp_path / "s", dtype=torch.float32)
    assert torch.isfinite(model(input_ids=torch.arange(3, 15)[None]).logits).all()
    assert {m["parameters"] for m in said["models"].values()} == {78_144}, "weights, however few bits hold them"
    assert (tmp_path / "s" / "model.safetensors").stat().st_size < 78_144 * 4 / 2


def test_adapters_are_merged_into_the_student(sentence_work, tmp_path):
    said = distil("train", sentence_work.folder, "--out", tmp_path / "s", "--lora-rank", 2, *ONE)
    model, _ = load_float_model(tmp_path / "s")
    assert model.num_parameters() == said["models"]["student"]["parameters"]
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert said["schedule"]["lora_rank"] == 2 and said["schedule"]["learning_rate"] == 2e-3


def test_a_classifier_of_texts_with_a_trimmed_vocabulary(sentence_work, tmp_path):
    said = distil("train", sentence_work.folder, "--out", tmp_path / "s", "--epochs", 2)
    assert said["changes"]["vocabulary"][0] == 128
    assert said["models"]["student"]["score"]["nll"] <= said["models"]["student, before"]["score"]["nll"]
    assert said["calibration"] is None or len(said["calibration"]["bias"]) == 3


@pytest.mark.parametrize("source", ["image_folder", "image_parquet"])
def test_a_classifier_of_images(source, teacher_folder, tmp_path, request):
    data = request.getfixturevalue(source)
    words = ("--data", data, "--task", "image-classification", "--out", tmp_path / "w")
    assert distil("analyze", teacher_folder("vit"), *words)["teacher"]["majority"] >= 0.2
    if source == "image_parquet":
        return
    distil("search", tmp_path / "w", "--parameters", 65_000, *SEARCH)
    words = ("train", tmp_path / "w", "--out", tmp_path / "s", *ONE)
    assert "to calibrate by" in refused(*words, "--calibrate"), "five rows to judge by do not show all five classes"
    done = run("distill", *words)
    assert done.exit_code == 0 and "without calibration" in done.stderr
    said = json.loads((tmp_path / "s" / "distillation.json").read_text())
    assert list(said["models"]) == NAMES and said["made_of"]["auto_class"] == "AutoModelForImageClassification"
    assert said["calibration"] is None and (tmp_path / "s" / "preprocessor_config.json").is_file()


def test_an_encoder_of_images_learns_without_labels(image_folder, teacher_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": str(path)} for path in sorted(image_folder.glob("*/*.png"))])
    words = ("--data", rows, "--task", "image-embedding", "--out", tmp_path / "w")
    assert "accuracy" not in distil("analyze", teacher_folder("clip_vision_model"), *words)["teacher"]
    distil("search", tmp_path / "w", "--parameters", 60_000, *SEARCH)
    said = distil("train", tmp_path / "w", "--out", tmp_path / "s", "--epochs", 4)
    assert said["models"]["student"]["distance"] <= said["models"]["student, before"]["distance"]
    assert said["training"]["before"]["loss"] > 0, "the distance to the teacher decides which epoch is kept"
    assert said["loss"]["alpha"] == 0 and said["retention"] is None and said["models"]["student"]["score"] == {}


def test_a_detector(scenes_file, teacher_folder, tmp_path):
    words = ("--data", scenes_file, "--task", "object-detection", "--out", tmp_path / "w")
    found = distil("analyze", teacher_folder("detr"), *words)
    assert [row["layer"] for row in found["layers"]] == ["0", "1", "decoder 0", "decoder 1", "decoder 2"]
    distil("search", tmp_path / "w", "--parameters", 195_000, *SEARCH)
    said = distil("train", tmp_path / "w", "--out", tmp_path / "s", *ONE)
    assert said["models"]["student"]["score"] == {} and said["models"]["student"]["distance"] > 0
    assert said["training"]["after"]["loss"] <= said["training"]["before"]["loss"]


def test_homogeneous_students_are_of_a_stock_class_and_processes_can_share_a_storage(
    teacher_folder, rows_file, tmp_path
):
    distil("analyze", teacher_folder("cohere2"), "--data", rows_file, "--out", tmp_path / "w", "--task", "causal-lm")
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    words = ("--memory-mb", 0.4, *SEARCH, "--homogeneous", "--storage", storage)
    distil("search", tmp_path / "w", *words)
    assert (tmp_path / "shared.db").is_file() and not (tmp_path / "w" / "search" / "study.log").exists()
    said = distil("materialize", tmp_path / "w", "--out", tmp_path / "s")
    assert said["class"] == "Cohere2ForCausalLM" and not (tmp_path / "s" / "modeling_student.py").exists()


def test_nothing_but_the_value_is_printed_by_a_command_of_its_own(rows_file, teacher_folder, tmp_path):
    words = ["analyze", teacher_folder("llama"), "--data", rows_file, "--out", tmp_path / "w", *CAUSAL, "--json"]
    code = "import sys; from hf_qep.cli import main; sys.argv[0] = 'hf-qep'; main()"
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    call = [sys.executable, "-c", code, "distill", *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["teacher"]["rows"] == 29
