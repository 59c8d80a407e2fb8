"""`hf-qep env`: enough for a bug report, nothing about the person who sends it."""

from __future__ import annotations

import json
import platform
import re

import pytest

from tests.cli.test_commands import run

TOKEN = "hf_" + "aB3" * 12


def collected() -> dict:
    result = run("env", "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def test_versions_are_those_that_are_installed():
    import torch
    import transformers

    import hf_qep

    versions = collected()["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert versions["hf-qep"] == hf_qep.__version__
    assert {"python", "huggingface_hub", "safetensors"} <= versions.keys()


def test_the_kernels_are_named_with_the_reason_if_there_are_none(monkeypatch):
    from hf_qep.kernels import native

    found = collected()["kernels"]
    assert found["backend"] in native.BACKENDS
    assert (found["instruction_set"] is None) == (found["backend"] == "torch")
    monkeypatch.setattr(native, "_chosen", native.Kernels("torch", why="no C++ compiler"))
    assert collected()["kernels"] == {"backend": "torch", "instruction_set": None, "why": "no C++ compiler"}


def test_extras_are_those_of_the_package_with_what_is_missing():
    import importlib.metadata

    found = collected()["extras"]
    assert set(found) >= {"dev", "eval"}
    for packages in found.values():
        for name, version in packages.items():
            try:
                assert version == importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                assert version is None


@pytest.mark.parametrize("words", [[], ["--json"], ["--quiet"]])
@pytest.mark.parametrize("where", ["the variable", "the login file"])
def test_a_token_is_there_or_not_and_never_shown(monkeypatch, tmp_path, where, words):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert collected()["token"] is False
    if where == "the variable":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        (tmp_path / "token").write_text(TOKEN)
    assert collected()["token"] is True
    result = run("env", *words)
    assert TOKEN not in result.output
    assert not re.search(r"hf_[A-Za-z0-9]{30,}", result.output)


@pytest.mark.parametrize(
    ("cache", "shown"),
    [
        ("{home}/.cache/huggingface/hub", "~/.cache/huggingface/hub"),
        ("/big/disk/hub", "/big/disk/hub"),
        ("/big/jonquil/hub", "/big/[user]/hub"),
        ("/" + "home/marigold/hub", "/" + "home/[user]/hub"),
        ("/" + "Users/marigold/hub", "/" + "Users/[user]/hub"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_no_name_of_a_user_is_shown(monkeypatch, tmp_path, cache, shown, words):
    from huggingface_hub import constants

    home = tmp_path / "jonquil"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "jonquil")
    monkeypatch.setenv("LOGNAME", "jonquil")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache.format(home=home))
    result = run("env", *words)
    assert result.exit_code == 0
    assert shown in result.stdout
    for name in ("jonquil", "marigold", str(tmp_path)):
        assert name not in result.output


def test_no_name_of_this_machine_is_shown():
    name = platform.node()
    if len(name) < 4:
        pytest.skip("the name of this machine is too short to be told from other text")
    assert name not in run("env").output


def test_a_password_in_the_address_of_the_hub_is_not_shown(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://" + "me:very-secret@hub.example")
    assert collected()["endpoint"] == "https://hub.example"
    assert "very-secret" not in run("env").output


def test_what_is_missing_is_said_with_how_to_install_it(monkeypatch):
    from hf_qep.cli import env

    monkeypatch.setattr(env, "_version", lambda package: None)
    result = run("env")
    assert re.search(r"extra dev\s+missing: .*pytest", result.stdout)
    assert "pip install 'hf-qep[NAME]'" in result.stderr
