"""Rows of files, as tensors: which token is an answer, which number a class, which pixels an image."""

from __future__ import annotations

import copy
import json
import warnings

import datasets
import pytest
import torch
import transformers as tf
from PIL import Image

from hf_qep.distill.reading import Columns, answer_tokens, read_rows, read_task
from hf_qep.distill.samples import IGNORED
from hf_qep.errors import ConfigError

SQUARE = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(tmp_path):
    """`rows(list of dicts)`: the name of a jsonl file with them."""

    def write(values, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
        return str(tmp_path / name)

    return write


def test_only_the_completion_and_its_end_are_answers(rows, tiny_tokenizer):
    source = rows([{"prompt": "ab", "completion": "yes"}, {"prompt": "abcd", "completion": "no"}])
    data = read_task(source, "causal-lm", tiny_tokenizer)
    first, mask = data.inputs["input_ids"][0], data.inputs["attention_mask"][0]
    assert tiny_tokenizer.decode(first[mask.bool()]) == "<s>abyes</s>"
    assert tiny_tokenizer.decode(data.labels[0][data.labels[0] != IGNORED]) == "yes</s>"
    for ids, labels in zip(data.inputs["input_ids"], data.labels, strict=True):
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_an_answer_is_its_first_token_and_long_prompts_lose_their_beginning(rows, tiny_tokenizer):
    source = rows([{"prompt": "x" * 30 + "end", "completion": "yes"}])
    data = read_task(source, "causal-lm", tiny_tokenizer, answers=("no", "yes"), max_length=5)
    assert data.answers == answer_tokens(tiny_tokenizer, ("no", "yes"))
    assert tiny_tokenizer.decode(data.inputs["input_ids"][0]) == "xendy"
    assert data.labels[0].tolist() == [IGNORED] * 4 + [data.answers[1]]


def test_a_template_puts_columns_into_a_text(rows, tiny_tokenizer):
    source = rows([{"a": 1, "b": "two", "verdict": True}, {"a": 2, "b": "x", "verdict": False}])
    columns = Columns(template="{a}-{b}", label="verdict")
    data = read_task(source, "text-classification", tiny_tokenizer, columns=columns)
    assert tiny_tokenizer.decode(data.inputs["input_ids"][0]) == "<s>1-two"
    assert data.labels.tolist() == [1, 0] and data.classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "names"),
    [
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        (["b", "a", "b"], ("b", "a"), [0, 1, 0], ("b", "a")),
        ([2, 0, 1], None, [2, 0, 1], ("0", "1", "2")),
        ([1.0, 0.0, 1.0], None, [1, 0, 1], ("0", "1")),
        ([1, 0, 1], ("no", "yes"), [1, 0, 1], ("no", "yes")),
    ],
)
@pytest.mark.filterwarnings("ignore:the outputs of the teacher")
def test_classes_are_numbered_as_given_or_in_order(rows, tiny_tokenizer, labels, classes, numbers, names):
    source = rows([{"text": "t", "label": label} for label in labels])
    data = read_task(source, "text-classification", tiny_tokenizer, classes=classes)
    assert data.labels.tolist() == numbers and data.classes == names


def test_an_order_that_was_guessed_is_said(rows, tiny_tokenizer):
    source = rows([{"text": "t", "label": label} for label in ("spam", "ham")])
    with pytest.warns(UserWarning, match="ham, spam, in alphabetical order"):
        read_task(source, "text-classification", tiny_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_task(source, "text-classification", tiny_tokenizer, classes=("spam", "ham"))


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ([{"text": "t", "label": None}, {"text": "t", "label": "a"}], "row 0 has nothing in the column `label`"),
        ([{"text": "t", "label": "a"}, {"text": None, "label": "a"}], "row 1 has nothing in the column `text`"),
        ([{"text": "t", "label": -1}, {"text": "t", "label": 1}], "the label -1 is none of the 2 classes"),
        ([{"text": "t", "label": 10**9}], "no number of a class"),
        ([{"text": "t", "label": 0.5}], "the label 0.5"),
    ],
)
@pytest.mark.filterwarnings("ignore:the outputs of the teacher")
def test_labels_that_are_none_are_refused(rows, tiny_tokenizer, values, hint):
    classes = ("0", "1") if "0.5" in hint else None
    with pytest.raises(ConfigError, match=hint):
        read_task(rows(values), "text-classification", tiny_tokenizer, classes=classes)


def test_a_tokenizer_without_padding_is_refused(rows, tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    with pytest.raises(ConfigError, match="pad_token"):
        read_task(rows([{"text": "t", "label": 0}]), "text-classification", bare)


def test_a_file_that_changed_is_read_again(rows):
    assert read_rows(rows([{"text": "old"}]))["text"][0] == "old"
    assert read_rows(rows([{"text": "new, and longer"}]))["text"][0] == "new, and longer"


def test_rows_are_drawn_by_their_seed_and_keep_their_order(rows):
    source = rows([{"n": n} for n in range(50)])
    drawn = list(read_rows(source, 10, seed=1)["n"])
    assert (
        drawn == sorted(drawn) == list(read_rows(source, 10, seed=1)["n"]) != list(read_rows(source, 10, seed=2)["n"])
    )


def images_of(folder):
    for name, shade in (("cat", 0), ("dog", 200)):
        (folder / name).mkdir(parents=True)
        for n in range(2):
            Image.new("L", (16, 16), shade + n).save(folder / name / f"{n}.png")
    return folder


def test_images_of_a_folder_and_of_bytes_are_the_same(tmp_path):
    processor, folder = tf.ViTImageProcessorPil(size=SQUARE), images_of(tmp_path / "animals")
    by_folder = read_task(str(folder), "image-classification", processor)
    assert by_folder.classes == ("cat", "dog") and by_folder.labels.tolist() == [0, 0, 1, 1]
    assert by_folder.inputs["pixel_values"].shape == (4, 3, 16, 16)
    files = sorted(folder.glob("*/*.png"))
    held = datasets.Dataset.from_dict({"image": [{"bytes": f.read_bytes(), "path": None} for f in files]})
    held.to_parquet(tmp_path / "i.parquet")
    by_bytes = read_task(str(tmp_path / "i.parquet"), "image-embedding", processor)
    assert torch.equal(by_bytes.inputs["pixel_values"], by_folder.inputs["pixel_values"])
    assert by_bytes.labels is None


def test_paths_of_images_are_relative_to_their_file(rows, tmp_path):
    images_of(tmp_path / "animals")
    source = rows([{"image": "animals/cat/0.png", "label": 0}, {"image": "animals/dog/0.png", "label": 1}])
    data = read_task(source, "image-classification", tf.ViTImageProcessorPil(size=SQUARE))
    assert data.inputs["pixel_values"][1].mean() > data.inputs["pixel_values"][0].mean()


@pytest.mark.parametrize("listed", [False, True])
def test_boxes_are_relative_and_categories_have_numbers(rows, tmp_path, listed):
    Image.new("RGB", (40, 20)).save(tmp_path / "i.png")
    objects = {"bbox": [[10, 5, 20, 10]], "category": ["dog"]}
    if listed:
        objects = [{"bbox": objects["bbox"][0], "category": "dog"}]
    source = rows([{"image": "i.png", "objects": objects}])
    processor = tf.DetrImageProcessorPil(size={"height": 32, "width": 32})
    data = read_task(source, "object-detection", processor, classes=("cat", "dog"))
    assert data.labels[0]["class_labels"].tolist() == [1]
    assert torch.allclose(data.labels[0]["boxes"], torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
