"""`hf-qep quantize owner/name` with weight files that come one by one: as a command, killed, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_qep.engine.unfinished import Unfinished
from tests.cli.test_commands import refusal, run
from tests.hub.test_loopback import XET_PROBE
from tests.loopback_hub.fixtures import loopback_hub
from tests.loopback_hub.server import LoopbackHub

__all__ = ["loopback_hub"]
REPO = "acme/tiny"
TEXT = "He walked down to the river in the morning and sat upon a stone. " * 8
SMALL = ("--num-samples", 4, "--seq-len", 16, "--method", "rtn", "--effort", "fast")
KILLED_BEHIND_A_BLOCK = """
import os, signal, sys
from hf_qep.cli import app
from hf_qep.engine.remote.shards import HubShards
durable = HubShards.durable
def die(shards, done):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    durable(shards, done)
HubShards.durable = die
app(sys.argv[1:] or {words!r})
"""


@pytest.fixture
def hub(loopback_hub, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A Hub with a model of three blocks in several weight files, and the working folder with a text beside it."""
    folder = tmp_path / "float"
    tiny_model("cohere2").save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(folder)
    loopback_hub.add_repo(REPO, files={p.name: p.read_bytes() for p in folder.iterdir()}, card={"license": "mit"})
    (tmp_path / "river.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return loopback_hub


def words(model, out, *more):
    return [str(word) for word in ("quantize", model, "--out", out, "--dataset", "river.txt", *SMALL, *more)]


def cached(hub):
    return {path.name for path in hub.home.rglob("snapshots/*/*.safetensors")}


def test_a_killed_job_goes_on_and_leaves_no_weight_file_that_it_brought(hub, tmp_path):
    assert run(*words("float", "expected")).exit_code == 0
    command = words(REPO, "out", "--drop-shards")
    done = hub.run_python(KILLED_BEHIND_A_BLOCK.format(words=command))
    assert done.returncode == -9, done.stderr
    found = Unfinished(Path("out"))
    assert found.latest()[0] == 2
    begun, repo = found.revision, hub.repo(REPO)
    repo.add_commit("main", "moved", {**repo.commit("main").tree}, repo.commit("main").id, "alice")
    brought = json.loads(found.shards.read_text())
    assert cached(hub) and cached(hub) <= brought.keys()
    done = run(*command, "--resume")
    assert done.exit_code == 0, (done.output, done.exception)
    assert cached(hub) == set()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "hf_qep_manifest.json").read_text())
    assert manifest["revision"] == begun != repo.commit("main").id and manifest["licence"] == "mit"
    assert not found.folder.exists()


def test_without_the_option_the_weight_files_stay(hub):
    assert run(*words(REPO, "out")).exit_code == 0
    assert cached(hub) == {path.name for path in Path("float").glob("*.safetensors")}


def test_dropping_is_refused_where_it_cannot_be(hub):
    assert "nothing is removed" in refusal(run(*words("float", "out", "--drop-shards")))
    trained = words(REPO, "out", "--drop-shards", "--tune-epochs", 1)
    assert "can drop its shards; this one cannot: tune_epochs 1" in refusal(run(*trained))
    assert cached(hub) == set()


def test_a_revision_that_is_not_there_is_named(hub):
    assert "has no revision 'v9'" in refusal(run(*words(REPO, "out", "--revision", "v9")))
    whole = words(REPO, "out", "--revision", "v9", "--tune-epochs", 1)
    assert "has no revision 'v9'" in refusal(run(*whole))


THROUGH_XET = """
import shutil
from pathlib import Path
from huggingface_hub import HfApi, constants
from hf_qep.cli import app
api = HfApi()
def run(*words):
    try:
        app(list(words))
    except SystemExit as done:
        assert not done.code, done.code
def files():
    found = [p for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.is_file() and not p.is_symlink()]
    return sorted(p.stat().st_size for p in found if p.stat().st_size > 30_000)
run(*{stay!r})
print("STAY", files())
shutil.rmtree(constants.HF_HUB_CACHE)
run(*{go!r})
print("GO", files())
"""
UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo("alice/tiny")
HfApi().upload_folder(repo_id="alice/tiny", folder_path={folder!r})
"""


def test_through_xet_as_well(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """The cache then holds links to content that all repositories share."""
    monkeypatch.chdir(tmp_path)
    tiny_model("cohere2").save_pretrained("float", max_shard_size="60KB")
    tiny_tokenizer.save_pretrained("float")
    Path("river.txt").write_text(TEXT)
    assert run(*words("float", "expected")).exit_code == 0
    hub = LoopbackHub(tmp_path / "hub", xet=True).start()
    try:
        if hub.run_python(XET_PROBE.format(store=f"local://{tmp_path / 'probe'}")).returncode:
            pytest.skip("this hf_xet does not offer a local store")
        done = hub.run_python(UPLOAD.format(folder=str(tmp_path / "float")))
        assert done.returncode == 0, done.stderr
        commands = {"stay": words("alice/tiny", "stay"), "go": words("alice/tiny", "go", "--drop-shards")}
        done = hub.run_python(THROUGH_XET.format(**commands))
        assert done.returncode == 0, done.stdout + done.stderr
        assert any("xet-read-token" in path for _, path, _ in hub.log)
    finally:
        hub.stop()
    sizes = sorted(path.stat().st_size for path in Path("float").glob("*.safetensors"))
    assert f"STAY {sizes}" in done.stdout and "GO []" in done.stdout
    for name in ("stay", "go"):
        assert Path(name, "model.safetensors").read_bytes() == Path("expected", "model.safetensors").read_bytes()
