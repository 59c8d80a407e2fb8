"""The scripts that publish, as a person runs them: in processes of their own, against the loopback Hub."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_qep.cli import all_commands

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
TEXT = "He walked down to the river in the morning and sat upon a stone. "


def run_script(hub, name, *words):
    """Run `python scripts/NAME WORDS` in a process that talks to the Hub."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, words)]
    return subprocess.run(command, env=hub.environment(), capture_output=True, text=True, timeout=280)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_from_a_float_model_to_a_repository_that_verifies_and_a_running_space(loopback_hub, tmp_path):
    card = {"license": "apache-2.0", "language": ["en"], "pipeline_tag": "text-generation"}
    original = files_of(ROOT / "hf_qep" / "demo_model")
    original.pop("README.md")
    loopback_hub.add_repo("acme/demo", files=original, card=card)
    small = ("--num-samples", 16, "--seq-len", 128, "--effort", "fast")
    done = run_script(
        loopback_hub, "publish.py", "acme/demo", "--namespace", "alice", "--work", tmp_path / "work", *small
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 not checked" in done.stdout or "everything that was checked agrees" in done.stdout
    assert "The old man opened the door, and" in done.stdout  # the reader's process has loaded it by its id
    pushed, local = loopback_hub.files("alice/demo-QEP-1bit"), tmp_path / "work" / "demo-QEP-1bit"
    assert pushed["model.safetensors"] == (local / "model.safetensors").read_bytes()
    assert loopback_hub.repo("alice/demo-QEP-1bit").private
    assert b"base_model: acme/demo" in pushed["README.md"]
    space = loopback_hub.repo("alice/demo-QEP-1bit-compare", "space")
    assert space.private
    assert space.variables["MODEL_ID"] == "alice/demo-QEP-1bit"
    record = json.loads(pushed["hf_qep_eval.json"])
    assert record["baseline"]["name"] == "acme/demo"


@pytest.fixture(scope="module")
def recipes():
    """RECIPES of the script."""
    spec = importlib.util.spec_from_file_location("command_a", SCRIPTS / "command_a.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPTS))
    sys.modules["command_a"] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
        yield module.RECIPES
    finally:
        sys.path.remove(str(SCRIPTS))
        del sys.modules["command_a"]


def test_recipes_keep_what_they_measure_out_of_the_calibration(recipes):
    for recipe in recipes.values():
        sources = [name.partition(":")[0] for name in recipe.calibration]
        assert recipe.held_out.partition(":")[0] not in sources
        assert abs(sum(recipe.calibration.values()) - 1) < 1e-9
        assert any("jpn" in name for name in recipe.calibration), "Japanese is one of the languages of the family"


@pytest.mark.parametrize(
    "name", ["command-a", "command-a-reasoning", "command-a-vision", "command-a-translate", "command-r7b"]
)
def test_printed_commands_are_accepted_by_the_command_line(loopback_hub, name):
    printed = [
        *run_script(loopback_hub, "command_a.py", "run", name, "--out", "out", "--print").stdout.splitlines(),
        *run_script(
            loopback_hub, "command_a.py", "push", name, "out", "--namespace", "alice", "--public", "--print"
        ).stdout.splitlines(),
    ]
    assert [line.split()[1] for line in printed] == ["quantize", "eval", "card", "card", "push"]
    for line in printed:
        words = shlex.split(line)[1:]
        all_commands()[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize(("name", "family"), [("command-a", "cohere2"), ("command-a-vision", "cohere2_vision")])
def test_a_recipe_runs_from_plan_to_push_on_a_tiny_model_of_its_architecture(
    loopback_hub, recipes, tiny_model, tiny_tokenizer, tmp_path, name, family
):
    recipe = recipes[name]
    tiny_model(family).save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    card = {
        "license": recipe.licence,
        "language": ["en", "ja"],
        "extra_gated_prompt": "You agree to the licence.",
        "extra_gated_fields": {"Name": "text"},
    }
    base = loopback_hub.add_repo(recipe.model, files=files_of(tmp_path / "float"), gated="auto", card=card)
    base.granted.add("alice")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    out = tmp_path / "out"
    small = ("--num-samples", 4, "--seq-len", 16, "--tasks", "none", "--out", out)
    texts = ("--dataset", tmp_path / "text.txt", "--text", tmp_path / "text.txt")

    plan = run_script(loopback_hub, "command_a.py", "plan", name, "--json")
    assert plan.returncode == 0, plan.stderr[-2000:]
    done = run_script(loopback_hub, "command_a.py", "run", name, *small, *texts)
    assert done.returncode == 0, done.stderr[-3000:]
    push = ("push", name, out, "--namespace", "alice")
    repo_id = f"alice/{recipe.card_name}"
    if name == "command-a":  # what is refused does not depend on the architecture
        tried = run_script(loopback_hub, "command_a.py", *push, "--dry-run")
        assert tried.returncode == 0, tried.stdout[-2000:] + tried.stderr[-2000:]
        assert not loopback_hub.has_repo(repo_id)
        refused = run_script(loopback_hub, "command_a.py", *push, "--public")
        assert refused.returncode == 2
        assert "--accept-license" in refused.stderr
    assert not loopback_hub.has_repo(repo_id)
    done = run_script(loopback_hub, "command_a.py", *push)
    assert done.returncode == 0, done.stderr[-3000:]
    repo, files = loopback_hub.repo(repo_id), loopback_hub.files(repo_id)
    assert (repo.private, repo.gated) == (True, "auto")
    front = files["README.md"].decode()
    assert f"base_model: {recipe.model}" in front and f"license: {recipe.licence}" in front
    assert "extra_gated_prompt: You agree to the licence." in front
    assert f'from_pretrained("{repo_id}"' in front, "the card must name what readers load"
    manifest = json.loads(files["hf_qep_manifest.json"])
    assert manifest["revision"] == base.commit("main").id
    # The plan knows the parameters that the run quantised.
    planned, found = json.loads(plan.stdout), json.loads(files["hf_qep_eval.json"])
    assert planned["bits"]["bits_linear"] == pytest.approx(found["bits"]["linear"], rel=1e-6)
