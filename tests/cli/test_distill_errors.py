"""What `hf-qep distill` refuses, each with one sentence and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import transformers as tf
from PIL import Image

from tests.cli.conftest import write_rows
from tests.cli.distilling import CAUSAL, SEARCH, refused
from tests.cli.test_commands import run
from tests.students.teachers import teacher

TEXTS, IMAGES, OBJECTS = (
    ("--task", task) for task in ("text-classification", "image-classification", "object-detection")
)


@pytest.fixture
def analysis(tmp_path):
    """`analysis(teacher, data, *words)`: the sentence that `analyze` is refused with; nothing is left behind."""

    def refusal_of(folder, data, *words):
        said = refused("analyze", folder, "--data", data, "--out", tmp_path / "work", *words)
        assert not (tmp_path / "work").exists()
        return said

    return refusal_of


def test_a_task_that_nobody_knows(analysis, teacher_folder, rows_file):
    said = analysis(teacher_folder("llama"), rows_file, "--task", "haiku")
    assert "haiku" in said and "causal-lm" in said


@pytest.mark.parametrize(
    ("family", "words", "kind"),
    [
        ("bert", TEXTS, "BertForMaskedLM"),
        ("vit", TEXTS, "ViTForImageClassification"),
        ("llama", IMAGES, "LlamaForCausalLM"),
        ("vit", ("--task", "image-embedding"), "ViTForImageClassification"),
    ],
)
def test_a_teacher_without_the_head_of_the_task(analysis, teacher_folder, rows_file, family, words, kind):
    said = analysis(teacher_folder(family), rows_file, *words)
    assert kind in said and "AutoModel" in said


def test_a_teacher_that_is_quantised(analysis, teacher_folder, rows_file, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(teacher_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "qep"}}))
    assert "quantised already" in analysis(folder, rows_file, *CAUSAL)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--text", "body"), "no column `body`; the columns are prompt, completion"),
        (("--label", "mark"), "no column `mark`"),
        (("--template", "{first} and {third}"), "third"),
        (("--template", "{first"), "template"),
        (("--classes", "less", "--classes", "more"), "'same' is none of the 2 classes"),
        (("--answer", "less"), "answers belong to causal-lm"),
        (("--held-out", 0.6), "0.6"),
        (("--limit", 0), "at least 1 row"),
        (("--limit", 3), "of 3 rows"),
        (("--max-length", 1), "at least 2 tokens"),
        (("--device", "tpu9"), "tpu9"),
    ],
)
def test_what_cannot_be_read_from_the_rows(analysis, teacher_folder, rows_file, words, hint):
    assert hint in analysis(teacher_folder("bert_classifier"), rows_file, *TEXTS, *words)


def test_answers_that_cannot_be_told_apart_or_are_not_among_the_completions(analysis, teacher_folder, rows_file):
    words = ("--task", "causal-lm", "--answer", "yes")
    assert "begin with the same token" in analysis(teacher_folder("llama"), rows_file, *words, "--answer", "yeah")
    assert "'no', which is none of" in analysis(teacher_folder("llama"), rows_file, *words, "--answer", "maybe")


def test_a_number_of_classes_that_is_not_the_teachers(analysis, teacher_folder, rows_file, tmp_path):
    rows = write_rows(tmp_path / "four.jsonl", [{"text": str(n), "label": n % 4} for n in range(40)])
    assert "run from 0 to 3, and there are 3 classes" in analysis(teacher_folder("bert_classifier"), rows, *TEXTS)


@pytest.mark.parametrize(("name", "text"), [("rows.txt", "a\nb\n"), ("rows.jsonl", "{no json"), ("rows.csv", "")])
def test_files_that_are_no_rows(analysis, teacher_folder, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "jsonl" in analysis(teacher_folder("llama"), tmp_path / name, *CAUSAL)


def test_a_source_that_does_not_exist(analysis, teacher_folder, tmp_path):
    assert "no rows could be read" in analysis(teacher_folder("llama"), "nobody/knows-this", *CAUSAL)


def test_images_of_another_size_than_the_teachers(analysis, teacher_folder, image_folder, tmp_path):
    folder = tmp_path / "vit"
    shutil.copytree(teacher_folder("vit"), folder)
    tf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    assert "32 x 32, and the model takes 16 x 16" in analysis(folder, image_folder, *IMAGES)


@pytest.mark.parametrize("image", ["torn.png", "gone.png", None])
def test_an_image_that_cannot_be_read(analysis, teacher_folder, tmp_path, image):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    rows = [{"image": "good.png", "label": 0}, {"image": image, "label": 1}]
    assert "row 1" in analysis(teacher_folder("vit"), write_rows(tmp_path / "rows.jsonl", rows), *IMAGES)


@pytest.mark.parametrize(
    ("objects", "hint"),
    [
        ({"bbox": [[30, 5, 10, 12]], "category": [0]}, "outside of its image of 32 x 32"),
        ({"bbox": [[3, 5, 10]], "category": [0]}, "x, y, width and height"),
        ({"bbox": [[3, 5, 0, 4]], "category": [0]}, "above 0"),
        ({"bbox": [[3, 5, 10, 4]], "category": []}, "of equal number"),
        ({"bbox": [[3, 5, 10, 4]], "category": ["cat"]}, "'cat'"),
        ({"bbox": [[3, 5, 10, 4]], "category": [7]}, "3 classes"),
        ({"boxes": [[3, 5, 10, 4]], "category": [0]}, "bbox"),
        (None, "row 0"),
    ],
)
def test_objects_that_are_none(analysis, teacher_folder, tmp_path, objects, hint):
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": "i.png", "objects": objects, "n": n} for n in range(20)])
    assert hint in analysis(teacher_folder("detr"), rows, *OBJECTS)


@pytest.mark.parametrize("command", ["search", "materialize", "train", "report"])
def test_a_folder_that_is_none_of_a_distillation(tmp_path, command):
    out = () if command in ("search", "report") else ("--out", tmp_path / "s")
    assert "hf-qep distill" in refused(command, tmp_path / "none", *out) or command == "report"


def test_a_search_without_a_limit_or_with_one_that_nothing_meets(question_work, tmp_path):
    assert "--latency-ms" in refused("search", question_work.folder, *SEARCH)
    more = ("--trim-vocabulary", "--bits", 1, "--max-added", 1)
    said = refused("search", question_work.folder, "--parameters", 10, *SEARCH, *more)
    assert "the nearest one" in said and "above the limit of 10" in said


def test_a_search_in_a_folder_with_another_space_says_how_to_begin_again(question_work):
    assert "another search" in refused("search", question_work.folder, "--parameters", 60_000, *SEARCH, "--homogeneous")


def test_work_that_the_teacher_has_no_positions_for(question_work):
    words = ("--parameters", 60_000, "--sequence", 1, "--context", 500)
    assert "128 positions, and the work has 501" in refused("search", question_work.folder, *words)


def test_a_vocabulary_to_trim_of_a_model_that_reads_none(teacher_folder, image_parquet, tmp_path):
    words = ("--data", image_parquet, *IMAGES, "--out", tmp_path / "w")
    assert run("distill", "analyze", teacher_folder("vit"), *words).exit_code == 0
    assert "no vocabulary" in refused("search", tmp_path / "w", "--parameters", 60_000, "--trim-vocabulary", *SEARCH)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--pick", "best"), "balanced, fast, accurate"),
        (("--pick", "ffff0000"), "balanced, fast, accurate"),
        (("--lora-rank", -1), "-1"),
        (("--alpha", 2), "alpha"),
        (("--epochs", 0), "epochs"),
        (("--divergence", "far"), "far"),
        (("--spec", "nowhere.json"), "nowhere.json"),
        (("--student", "nowhere/else/at-all"), "neither a folder nor a Hub id"),
        (("--alpha", 1, "--calibrate"), "--calibrate"),
    ],
)
def test_a_training_that_cannot_be(question_work, tmp_path, words, hint):
    assert hint in refused("train", question_work.folder, "--out", tmp_path / "s", *words)
    assert not (tmp_path / "s").exists()


def test_a_specification_of_another_teacher(question_work, tmp_path):
    spec = next(c for c in question_work.search["candidates"])["spec"] | {"hidden_size": 128, "vocabulary": None}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = ("--spec", tmp_path / "spec.json", "--out", tmp_path / "s")
    assert "hidden_size 128" in refused("materialize", question_work.folder, *words)


def test_a_student_that_reads_or_answers_something_else(question_work, sentence_work, teacher_folder, tmp_path):
    other = teacher("llama")
    other.resize_token_embeddings(100)
    other.save_pretrained(tmp_path / "small")
    words = ("--out", tmp_path / "s", "--student")
    assert "100 tokens" in refused("train", question_work.folder, *words, tmp_path / "small")
    assert "causal-lm" in refused("train", question_work.folder, *words, teacher_folder("bert_classifier"))
    tf.BertForSequenceClassification(
        tf.BertConfig(**teacher("bert_classifier").config.to_dict() | {"num_labels": 2})
    ).save_pretrained(tmp_path / "two")
    assert "classes" in refused("train", sentence_work.folder, *words, tmp_path / "two")


def test_adapters_of_a_packed_student(question_work, teacher_folder, rows_file, tmp_path):
    words = ("--dataset", f"{rows_file}:text", "--num-samples", 2, "--seq-len", 8, "--method", "rtn")
    assert run("quantize", teacher_folder("llama"), "--out", tmp_path / "q", *words).exit_code == 0
    words = ("--student", tmp_path / "q", "--out", tmp_path / "s", "--lora-rank", 2)
    assert "not adapters" in refused("train", question_work.folder, *words)


def test_a_teacher_or_rows_that_changed_after_the_analysis(teacher_folder, rows_file, tmp_path):
    shutil.copytree(teacher_folder("llama"), tmp_path / "teacher")
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    words = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "w", *CAUSAL)
    assert run("distill", "analyze", tmp_path / "teacher", *words).exit_code == 0
    text = rows_file.read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace('"is 4', '"is 5'))
    assert "analyse them again" in refused("search", tmp_path / "w", "--parameters", 60_000, *SEARCH)
    (tmp_path / "rows.jsonl").write_text(text)
    model = teacher("llama")
    model.lm_head.weight.data.mul_(1.01)
    model.save_pretrained(tmp_path / "teacher")
    assert "has changed since" in refused("search", tmp_path / "w", "--parameters", 60_000, *SEARCH)


def test_an_encoder_of_images_has_no_labels_to_learn_from(teacher_folder, image_parquet, tmp_path):
    words = ("--data", image_parquet, "--task", "image-embedding", "--out", tmp_path / "w")
    assert run("distill", "analyze", teacher_folder("clip_vision_model"), *words).exit_code == 0
    words = ("train", tmp_path / "w", "--student", teacher_folder("clip_vision_model"), "--out", tmp_path / "s")
    assert "--baselines" in refused(*words, "--baselines")
    assert "--alpha" in refused(*words, "--alpha", 0.5)


@pytest.mark.parametrize("package", ["optuna", "datasets"])
def test_a_package_that_is_not_installed(question_work, rows_file, teacher_folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    words = ("analyze", teacher_folder("llama"), "--data", rows_file, "--out", tmp_path / "w", *CAUSAL)
    if package == "optuna":
        words = ("search", question_work.folder, "--memory-mb", 0.2, *SEARCH, "--trim-vocabulary", "--bits", 1)
        words += ("--max-added", 1)
    assert "hf-qep[distill]" in refused(*words)


def test_a_card_of_what_has_no_score(question_work, tmp_path):
    assert "no student that was trained" in refused("report", question_work.folder, "--card")
    assert "no result of a search" in refused("report", tmp_path)
