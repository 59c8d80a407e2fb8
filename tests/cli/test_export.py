"""`hf-qep export` from the command line."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_qep.cli import app
from hf_qep.formats import factored, sign
from tests.export.conftest import checkpoint

__all__ = ["checkpoint"]

pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")


def run(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_export_and_check(checkpoint, tmp_path):
    _, folder = checkpoint("cohere2")
    file = tmp_path / "m.gguf"
    done = run("gguf", folder, "--out", file)
    assert done.exit_code == 0, done.output
    assert "1.125" in done.output and "those of the checkpoint" in done.output and "llama-cli -m" in done.output
    done = run("check", file, folder)
    assert done.exit_code == 0 and "all facts are those of" in done.output
    done = run("gguf", folder, "--out", file, "--json")
    assert done.exit_code == 2
    assert json.loads(done.output)["error"]["type"] == "OutputExistsError"
    done = run("gguf", folder, "--out", file, "--overwrite", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    report = json.loads(run("gguf", folder, "--out", file, "--overwrite", "--json").output)
    assert report["lossless"] is True and report["parts"]["Q1_0"]["tensors"] == 14
    assert report["file_bytes"] == file.stat().st_size


def test_check_ends_with_3_where_something_differs(checkpoint, tmp_path):
    _, folder = checkpoint("cohere2")
    run("gguf", folder, "--out", tmp_path / "m.gguf")
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    done = run("check", tmp_path / "m.gguf", other, "--json")
    assert done.exit_code == 3
    (found,) = json.loads(done.output)["differs"]
    assert "'blk.0.ffn_up.weight'" in found


def test_errors_are_one_sentence(checkpoint, tmp_path):
    for folder, words, match in [
        (checkpoint("llama", factored.Spec(24))[1], [], "factored"),
        (checkpoint("llama", sign.Spec(128, column_scale=True))[1], [], "--approximate"),
        (tmp_path / "nowhere", [], "neither a folder nor a Hub id"),
    ]:
        done = run("gguf", folder, "--out", tmp_path / "m.gguf", *words)
        assert done.exit_code == 2 and match in done.output and "Traceback" not in done.output
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    done = run("check", tmp_path / "m.gguf", checkpoint("llama")[1])
    assert done.exit_code == 2 and "no whole GGUF file" in done.output
    done = run(
        "gguf", checkpoint("llama", sign.Spec(128, column_scale=True))[1], "--approximate", "--out", tmp_path / "a"
    )
    assert done.exit_code == 0 and "relative squared error" in done.output


def test_without_the_package_the_extra_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    done = run("gguf", checkpoint("llama")[1], "--out", tmp_path / "m.gguf")
    assert done.exit_code == 2 and "hf-qep[gguf]" in done.output
