"""`space init`, `space run` and what a wheel contains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from hf_qep.cli.space_run import prepare
from hf_qep.errors import OutputExistsError, QepError, SpaceError
from hf_qep.hub.space_folder import (
    MAX_SHORT_DESCRIPTION,
    SpaceReadme,
    SpaceSettings,
    readme_problems,
    space_files,
    write_space,
)
from tests.cli.test_commands import refusal, run
from tests.space.conftest import SPACE

ROOT = SPACE.parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_space(tmp_path / "space", SpaceSettings("acme/tiny-1bit", "", "acme/tiny"))
    return tmp_path / "space"


def test_the_readme_pins_gradio_as_the_constraints_do_and_names_the_models(folder):
    data = SpaceCard.load(folder / "README.md").data.to_dict()
    assert data["sdk"] == "gradio"
    assert data["sdk_version"] == pins()["gradio"]
    assert data["python_version"] == "3.12"
    assert data["license"] == "apache-2.0"
    assert data["app_file"] == "app.py"
    assert data["models"] == ["acme/tiny-1bit", "acme/tiny"]
    assert data["suggested_hardware"] == "cpu-basic"
    assert 0 < len(data["short_description"]) <= MAX_SHORT_DESCRIPTION
    assert readme_problems((folder / "README.md").read_text()) == []


def test_every_requirement_is_pinned_to_the_constraints(folder):
    lines = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        name, _, version = line.partition("==")
        assert pins()[name.lower()] == version
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = {re.match(r"[\w.-]+", line)[0] for line in base} - {"typer", "rich", "tqdm", "jinja2"}
    assert needed <= {line.partition("==")[0] for line in lines}


def test_the_folder_holds_the_app_and_this_package_and_nothing_else(folder):
    found = space_files(folder)
    assert found.problems == []
    assert {"app.py", "README.md", "requirements.txt", "settings.json", "style.css"} <= set(found.names)
    assert "hf_qep/engine/source.py" in found.names
    rooms = {name.split("/")[1] for name in found.names if name.startswith("hf_qep/")}
    assert not rooms & {"cli", "hub", "demo_model", "bundled", "__pycache__"}
    assert json.loads((folder / "settings.json").read_text()) == {"MODEL_ID": "acme/tiny-1bit", "BASE_ID": "acme/tiny"}


def test_lent_accelerators_keep_the_torch_of_their_machine(tmp_path):
    write_space(tmp_path / "s", SpaceSettings("acme/x"), SpaceReadme(hardware="zero-a10g"))
    lines = (tmp_path / "s" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("torch")] == ["torch>=2.8,<2.12"]


def test_with_a_requirement_the_package_is_not_copied(tmp_path):
    names = write_space(tmp_path / "s", SpaceSettings("acme/x"), SpaceReadme(requirement="hf-qep==0.1.0"))
    assert not [name for name in names if name.startswith("hf_qep/")]
    assert (tmp_path / "s" / "requirements.txt").read_text().endswith("\nhf-qep==0.1.0\n")
    with pytest.raises(SpaceError, match="requirements.txt"):
        write_space(tmp_path / "t", SpaceSettings("acme/x"), SpaceReadme(requirement="a\nb"))
    assert not (tmp_path / "t").exists()


def test_a_title_cannot_break_the_front_matter(tmp_path):
    title = 'Tricky: "a" # b\n---\nsdk: docker'
    write_space(tmp_path / "s", SpaceSettings("acme/x"), SpaceReadme(title=title, hardware="l4x1"))
    data = SpaceCard.load(tmp_path / "s" / "README.md").data.to_dict()
    assert (data["title"], data["sdk"], data["suggested_hardware"]) == (title, "gradio", "l4x1")


def test_a_folder_that_is_not_empty_is_kept(folder):
    (folder / "own.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        write_space(folder, SpaceSettings("acme/x"))
    assert (folder / "own.txt").read_text() == "mine"


def test_init_by_the_command_line(tmp_path):
    out = tmp_path / "space"
    done = run("space", "init", out, "--model", "acme/tiny-1bit", "--original", "recorded", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"] == {"MODEL_ID": "acme/tiny-1bit", "ORIGINAL": "recorded"}
    assert "not empty" in refusal(run("space", "init", out, "--model", "acme/tiny-1bit"))
    assert run("space", "init", out, "--model", "acme/tiny-1bit", "--overwrite", "--quiet").exit_code == 0
    assert "--original 'maybe'" in refusal(
        run("space", "init", tmp_path / "x", "--model", "a/b", "--original", "maybe")
    )
    assert "OWNER/NAME" in refusal(run("space", "init", tmp_path / "x", "--model", "a b/c"))
    words = ("--model", "a/b", "--specialist", "acme/deals@abc", "--specialist", "acme/glyphs")
    done = run("space", "init", tmp_path / "y", *words, "--json")
    assert json.loads(done.stdout)["settings"]["SPECIALISTS"] == "acme/deals@abc,acme/glyphs"
    assert "OWNER/NAME" in refusal(run("space", "init", tmp_path / "x", "--model", "a/b", "--specialist", "a b/c"))


def test_run_finds_what_it_is_given(folder, pair, monkeypatch):
    options = {"base": None, "original": None, "host": "127.0.0.1", "port": 7999, "quiet": True}
    assert prepare(str(folder), **options).folder == folder.resolve()
    launch = prepare(str(pair[1]), **options | {"base": str(pair[0])})
    assert launch.folder.name == "compare"
    assert launch.variables == {"MODEL_ID": str(pair[1].resolve()), "BASE_ID": str(pair[0].resolve())}
    assert prepare("acme/tiny-1bit", **options).variables == {"MODEL_ID": "acme/tiny-1bit"}
    assert launch.url == "http://127.0.0.1:7999"
    tried = prepare("acme/tiny-1bit", **options, specialists=[str(pair[0]), "acme/deals@abc"])
    assert tried.variables["SPECIALISTS"] == f"{pair[0].resolve()},acme/deals@abc"
    with pytest.raises(QepError, match="--host"):
        prepare(str(folder), **options | {"port": None, "host": "256.1.1.1"})


def test_a_wheel_holds_the_space(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    tree = tmp_path / "tree"
    tree.mkdir()
    listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the files of a wheel")
    import shutil

    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, tree / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("this environment has no setuptools to build a wheel with")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("hf_qep/bundled/spaces/compare/")}
    wanted = {f.name for f in SPACE.iterdir() if f.is_file()}
    assert {n.rsplit("/", 1)[1] for n in inside} == wanted
