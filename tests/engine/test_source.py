"""Where the float model comes from, and loading it in the class it was saved in."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import namedtuple

import pytest
import torch

from hf_qep.engine import source
from hf_qep.engine.source import (
    check_checkpoint,
    free_space_check,
    licence_of,
    load_float_model,
    resolve_model,
    snapshot_revision,
)
from hf_qep.errors import CheckpointError, DiskSpaceError
from tests.tiny_models import FAMILIES

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_checked_and_loaded_unchanged(tiny_model, tiny_batch, tmp_path, family):
    model = tiny_model(family).eval()
    model.save_pretrained(tmp_path / "model")
    check_checkpoint(tmp_path / "model")
    loaded, tokenizer = load_float_model(tmp_path / "model", dtype=torch.float32)
    assert type(loaded) is type(model) and not loaded.training and tokenizer is None
    batch = tiny_batch(family)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtype_asked_for_is_the_dtype_given(tiny_model, tmp_path, dtype):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    assert load_float_model(tmp_path / "model", dtype=dtype)[0].dtype == torch.bfloat16
    assert load_float_model(tmp_path / "model")[0].dtype == torch.float32


def test_the_tokenizer_comes_along(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    _, tokenizer = load_float_model(tmp_path / "model")
    assert tokenizer("hello")["input_ids"] == tiny_tokenizer("hello")["input_ids"]


def test_a_tokenizer_that_cannot_be_read_is_told(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="AutoTokenizer of 'model' cannot be loaded"):
        assert load_float_model(tmp_path / "model")[1] is None


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", "LlamaForCausalLM"), ("vit", "ViTModel")],
)
def test_without_architectures_the_model_type_decides(tiny_model, tmp_path, family, expected):
    model = tiny_model(family)
    (model.base_model if family == "vit" else model).save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(load_float_model(tmp_path / "model")[0]).__name__ == expected


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model(tmp_path) == tmp_path == resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "a/b/c", "~/nowhere/at/all", "a b", "x/../y", "file"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id.*'owner/name'"):
        resolve_model(name)


def test_a_download_that_fails_says_what_to_do():
    with pytest.raises(CheckpointError, match="cannot download 'nobody/nothing' from the Hub.*local folder"):
        resolve_model("nobody/nothing")


def test_downloads_ask_for_no_code_and_no_pickles(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(source, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path))
    assert resolve_model("owner/name", revision="abc") == tmp_path
    names = [
        *("model.safetensors", "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md"),
        *("pytorch_model.bin", "modeling_x.py", "x.pkl", "onnx/model.onnx", "sub/x.safetensors", "x.gguf"),
    ]
    kept = filter_repo_objects(names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == names[:6] and asked["revision"] == "abc"


def test_the_commit_of_a_cache_folder_is_its_revision(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert snapshot_revision(tmp_path / "snapshots" / commit) == commit
    assert snapshot_revision(tmp_path / commit) is None
    assert snapshot_revision(tmp_path / "snapshots/main") is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# Model", "cc-by-nc-4.0"),
        ("---\ntags: [x]\nlicense: 'mit'\n---\n", "mit"),
        ("---\ntags: [x]\n---\nlicense: mit", None),
        ("license: mit", None),
        (None, None),
    ],
)
def test_the_licence_is_read_from_the_front_of_the_card(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == expected


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 3 * 10**9))
    free_space_check(tmp_path / "not" / "yet" / "there", 3 * 10**9)
    with pytest.raises(DiskSpaceError, match=r"'.*out' needs 5\.00 GB, and 3\.00 GB are free; free some"):
        free_space_check(tmp_path / "out", 5 * 10**9)
