"""`hf qep ...`: the real `hf` finds this installation through its folder of extensions, and loses it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_qep.errors import CheckpointError, OutputExistsError
from hf_qep.hub.extension import OWNER, extension_folder, is_ours, register, unregister
from tests.cli.test_commands import refusal, run

ROOT = Path(__file__).resolve().parents[2]
HF = "import sys; sys.argv[0] = 'hf'; from huggingface_hub.cli.hf import main; main()"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder of this test, with a name that a shell would take apart."""
    folder = tmp_path / "home of 'somebody' $HOME"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def hf(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The `hf` command line of huggingface_hub in a process of its own, without network."""
    more = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", HF, *words],
        env={**os.environ, **more},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_hf_finds_the_extension_and_loses_it_again(home, tmp_path):
    # A folder that holds something called like this package is no place to import it from.
    (tmp_path / "hf_qep").mkdir()
    (tmp_path / "hf_qep" / "__init__.py").write_text("raise SystemExit('imported from the current folder')")
    assert register().command == "hf qep"

    shown = hf("qep", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "hf-qep" in shown.stdout
    assert "quantize" in shown.stdout
    assert hf("qep", "--version", cwd=tmp_path).stdout == run("--version").stdout
    assert "qep" in hf("--help", cwd=tmp_path).stdout
    assert OWNER in hf("extensions", "list", cwd=tmp_path).stdout

    assert unregister() == extension_folder()
    assert not extension_folder().exists()
    assert hf("qep", "--version", cwd=tmp_path).returncode != 0


def test_arguments_and_exit_codes_pass_through(home, tmp_path):
    register()
    name = "a 'quoted' $name; exit 7"
    refused = hf("qep", "inspect", name, "--json", cwd=tmp_path)
    assert refused.returncode == 2
    assert name in json.loads(refused.stdout)["error"]["message"]
    (tmp_path / "model").mkdir()
    assert hf("qep", "verify", "model", "--json", cwd=tmp_path).returncode == 3


def test_the_command_says_what_it_writes_and_what_it_removes(home):
    wrote = json.loads(run("register", "--json").stdout)
    folder = home / ".local" / "share" / "hf" / "extensions" / "hf-qep"
    assert wrote["command"] == "hf qep"
    assert Path(wrote["folder"]) == folder
    assert sorted(wrote["files"]) == sorted(str(p) for p in folder.iterdir())
    for file in wrote["files"]:
        assert f"wrote {file}" in run("register").stdout
    assert json.loads(run("unregister", "--json").stdout) == {"removed": str(folder)}


def test_registering_twice_is_harmless_and_leaves_nothing_else(home):
    register()
    again = register()
    assert sorted(p.name for p in again.folder.parent.iterdir()) == ["hf-qep"]
    assert is_ours(again.folder)
    assert os.access(again.files[0], os.X_OK)


def test_the_manifest_is_what_hf_itself_reads(home):
    from huggingface_hub.cli.extensions import ExtensionManifest

    done = register()
    manifest = ExtensionManifest.load(done.folder)
    assert Path(manifest.executable_path) == done.files[0]
    assert manifest.short_name == "qep"


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"owner": "somebody"}'])
def test_another_extension_of_this_name_is_left_alone_unless_forced(home, manifest):
    folder = extension_folder()
    folder.mkdir(parents=True)
    (folder / "tool").write_text("x")
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    assert "another extension is installed in '~/" in refusal(run("register"))
    with pytest.raises(CheckpointError, match="was not made by hf-qep register"):
        unregister()
    assert (folder / "tool").exists()
    register(force=True)
    assert is_ours(folder)
    assert not (folder / "tool").exists()


def test_a_link_or_file_in_its_place_is_replaced_but_not_followed(home, tmp_path):
    folder = extension_folder()
    folder.parent.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("x")
    folder.symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(OutputExistsError):
        register()
    register(force=True)
    assert (elsewhere / "mine").exists()
    assert not folder.is_symlink()
    unregister()
    folder.write_text("a file")
    register(force=True)
    assert is_ours(folder)


def test_nothing_to_remove_is_said(home):
    assert "is not registered" in refusal(run("unregister"))
