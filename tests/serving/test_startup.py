"""The line that Python runs when it starts: plain programs load packed checkpoints, and it goes without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_qep.startup as startup
from hf_qep.cli import app
from hf_qep.errors import ConfigError

LOOK = """
import sys
print('hf_qep' in sys.modules, {'torch', 'transformers'} & set(sys.modules))
print(any(type(finder).__module__ == 'hf_qep.registration' for finder in sys.meta_path))
"""
"""What follows from the finder, `tests/plugin/test_registration.py` tests."""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A Python of its own whose packages are those of this one: (interpreter, its folder of packages)."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    monkeypatch.setattr(startup.sysconfig, "get_path", lambda _: packages.strip())
    monkeypatch.setenv("HOME", str(tmp_path))
    return python, Path(packages.strip())


def run(python: Path, code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


def test_programs_that_import_nothing_know_the_method(environment):
    python, packages = environment
    result = CliRunner().invoke(app, ["register", "--python", "--json"])
    assert str(packages / startup.FILE_NAME) in json.loads(result.stdout)["files"]
    here = [Path(startup.__file__).resolve().parents[1], *map(Path, filter(None, sys.path))]
    assert run(python, LOOK, *here).stdout == "True set()\nTrue\n"


def test_without_the_package_the_line_does_nothing_and_it_can_be_taken_back(environment):
    python, packages = environment
    file = startup.add_startup()
    assert startup.add_startup() == file == packages / startup.FILE_NAME
    done = run(python, "import sys; print('hf_qep' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")
    result = CliRunner().invoke(app, ["unregister", "--json"])
    assert json.loads(result.stdout) == {"startup": str(file)}
    assert not file.exists() and startup.remove_startup() is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(startup.sysconfig, "get_path", lambda _: str(tmp_path / "file" / "packages"))
    with pytest.raises(ConfigError, match="hf-qep serve"):
        startup.add_startup()
