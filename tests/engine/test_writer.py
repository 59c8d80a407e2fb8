"""Saving: the folder is complete or not there, and tells how it was made without telling where."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.headers import MANIFEST
from hf_qep.engine.manifest import build_manifest
from hf_qep.engine.report import QuantizationReport
from hf_qep.engine.source import load_float_model
from hf_qep.engine.writer import save_checkpoint
from hf_qep.errors import CheckpointError, DiskSpaceError, OutputExistsError
from hf_qep.public_names import public_name, without_folders

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


def manifest():
    config = QepConfig(method="rtn", num_samples=2, seq_len=8)
    calibration = load_calibration(torch.ones(2, 8).long(), None, num_samples=2, seq_len=8, seed=0)
    return build_manifest(
        base_model="/data/models/base",
        config=config,
        calibration=calibration,
        report=QuantizationReport(),
        licence="mit",
    )


def save(model, out, tokenizer=None, **options):
    return save_checkpoint(model, out, tokenizer=tokenizer, manifest=manifest(), **options)


def test_what_was_saved_loads_and_gives_the_same_outputs(tiny_model, tiny_tokenizer, tiny_batch, tmp_path):
    model = tiny_model("llama").eval()
    out = save(model, tmp_path / "out", tiny_tokenizer)
    loaded, tokenizer = load_float_model(out)
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch("llama"))[0], model(**tiny_batch("llama"))[0])
    assert tokenizer("hello")["input_ids"] == tiny_tokenizer("hello")["input_ids"]
    assert (out / "generation_config.json").is_file()


def test_the_manifest_lists_every_file_with_its_checksum_and_size(tiny_model, tiny_tokenizer, tmp_path):
    out = save(tiny_model("llama"), tmp_path / "out", tiny_tokenizer, max_shard_size="100KB")
    listed = json.loads((out / MANIFEST).read_text())["files"]
    assert set(listed) == {p.name for p in out.iterdir()} - {MANIFEST}
    assert sum(name.endswith(".safetensors") for name in listed) > 1
    for name, entry in listed.items():
        raw = (out / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}


def test_the_manifest_says_how_the_checkpoint_was_made(tiny_model, tmp_path):
    out = save(tiny_model("llama"), tmp_path / "out")
    found = json.loads((out / MANIFEST).read_text())
    assert (found["base_model"], found["revision"], found["licence"]) == ("base", None, "mit")
    assert found["recipe"]["method"] == "rtn" and found["recipe"]["num_samples"] == 2
    assert len(found["calibration"]["fingerprint"]) == 64 and found["calibration"]["tokens"] == 16
    assert found["bits"]["bits_model"] == 32 and found["bits"]["file_bytes"] > found["bits"]["weight_bytes"]
    assert (
        found["report"]["layers"] == []
        and "calibration" not in found["report"]
        and {"python", "torch", "transformers"} <= found["versions"].keys()
    )


def test_all_files_may_be_read_by_the_same_people(tiny_model, tmp_path):
    out = save(tiny_model("llama"), tmp_path / "out", max_shard_size="100KB")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_no_file_shows_a_folder_of_this_machine(tiny_model, tiny_tokenizer, tmp_path):
    source = tmp_path / "private" / "source"
    tiny_model("llama").save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    model, tokenizer = load_float_model(source)
    model.config.quantization_notes = {"dataset": f"{source}/a.txt*0.5,org/set*0.5", "other": str(source)}
    tokenizer.init_kwargs["custom_path"] = str(source / "x.json")
    out = save_checkpoint(
        model, tmp_path / "out", tokenizer=tokenizer, manifest=manifest() | {"note": str(source / "a.txt")}
    )
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert json.loads((out / "config.json").read_text())["quantization_notes"] == {
        "dataset": "a.txt*0.5,org/set*0.5",
        "other": "source",
    }


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("/a/b/model", "model"),
        ("/a/b/model/", "model"),
        ("~/models/x", "x"),
        ("../up/x", "x"),
        ("deep/er/folder/x", "x"),
        ("C:\\models\\x", "x"),
        ("org/set:config:train:text", "org/set:config:train:text"),
        ("/a/b.jsonl:text*0.7,org/set*0.3", "b.jsonl:text*0.7,org/set*0.3"),
    ],
)
def test_a_public_name_keeps_hub_ids_and_drops_folders(name, public):
    assert public_name(name) == public


def test_tokens_and_templates_that_look_a_little_like_paths_stay():
    value = {"a": "/", "b": "//", "c": "{{ x }}\n/a/b", "d": ["</s>", "a/b"], "e": 5, "f": None}
    assert without_folders(value) == value


def test_a_folder_that_is_not_empty_is_replaced_only_when_asked(tiny_model, tmp_path):
    out = save(tiny_model("llama"), tmp_path / "out")
    (out / "old.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="out' is not empty"):
        save(tiny_model("llama"), out)
    save(tiny_model("llama"), out, overwrite=True)
    assert not (out / "old.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_noticed_before_anything_is_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 1000))
    with pytest.raises(DiskSpaceError, match="0.00 GB are free"):
        save(tiny_model("llama"), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("moment", ["weights", "tokenizer", "manifest"])
def test_an_interruption_leaves_nothing_new_and_the_old_untouched(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch, error, moment
):
    model = tiny_model("llama")
    out = save(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stop(*args, **options):
        raise error

    if moment == "weights":
        original = type(model).save_pretrained
        monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: (original(*a, **k), stop()))
    elif moment == "tokenizer":
        monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", stop)
    else:
        monkeypatch.setattr("hf_qep.engine.writer.file_table", stop)
    for folder, overwrite in ((tmp_path / "fresh", False), (out, True)):
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            save(model, folder, tiny_tokenizer, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_only_a_partial_sibling(tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "old.txt").write_text("old")
    script = f"""
        import os, signal
        from hf_qep.engine import writer
        from tests.tiny_models import build_model
        writer.file_table = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        writer.save_checkpoint(build_model("gpt2"), {str(out)!r}, tokenizer=None, manifest={{}}, overwrite=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    partial = [p for p in tmp_path.iterdir() if p != out]
    assert len(partial) == 1 and partial[0].name.startswith(".out.") and partial[0].name.endswith(".partial")
    assert (partial[0] / "model.safetensors").is_file() and not (partial[0] / MANIFEST).exists()
    assert [p.name for p in out.iterdir()] == ["old.txt"] if exists else not out.exists()


def test_a_file_that_was_written_short_is_noticed(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    original = type(model).save_pretrained

    def short(self, folder, **options):
        original(self, folder, **options)
        path = Path(folder) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    monkeypatch.setattr(type(model), "save_pretrained", short)
    with pytest.raises(CheckpointError, match="'model.safetensors' is truncated"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_not_written_are_noticed(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    original = type(model).save_pretrained

    def partly(self, folder, **options):
        state = {name: tensor for name, tensor in self.state_dict().items() if "mlp" not in name}
        original(self, folder, state_dict=state, **options)

    monkeypatch.setattr(type(model), "save_pretrained", partly)
    with pytest.raises(CheckpointError, match=r"holds \d+ bytes of weights, but the model has 312576"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
