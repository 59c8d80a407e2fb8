"""`hf-qep serve` on the command line: what it passes on, what it says before the server speaks."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

import hf_qep.serving as serving
from hf_qep.cli import app
from hf_qep.cli.demo import DEMO_MODEL
from tests.serving.conftest import SPECIALIST


@pytest.fixture
def passed(monkeypatch) -> list[str]:
    """What reaches the server instead of starting one."""
    arguments: list[str] = []
    monkeypatch.setattr(serving, "serve", arguments.extend)
    return arguments


def test_options_of_the_server_are_passed_on(passed):
    words = ["serve", str(SPECIALIST), "--port", "8123", "--json", "--", "--continuous-batching", "--default-seed", "3"]
    result = CliRunner().invoke(app, words)
    assert json.loads(result.stdout) == {
        "url": "http://localhost:8123/v1",
        "model": str(SPECIALIST),
        "chat_template": True,
    }
    start = [str(SPECIALIST), "--host", "localhost", "--port", "8123"]
    assert passed == [*start, "--continuous-batching", "--default-seed", "3"]
    passed.clear()
    assert CliRunner().invoke(app, ["serve", "--", "--default-seed", "3"]).exit_code == 0
    assert passed == ["--host", "localhost", "--port", "8000", "--default-seed", "3"]


def test_a_model_without_a_chat_template_is_said_to_have_none(passed):
    assert serving.NO_TEMPLATE in CliRunner().invoke(app, ["serve", str(DEMO_MODEL)]).stderr
    assert serving.NO_TEMPLATE not in CliRunner().invoke(app, ["serve", str(SPECIALIST)]).stderr
    assert serving.NO_TEMPLATE not in CliRunner().invoke(app, ["serve", "owner/name"]).stderr
    assert passed


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    result = CliRunner().invoke(app, ["serve", str(SPECIALIST)])
    assert result.exit_code == 2
    assert "hf-qep[serve]" in result.stderr


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path):
    pytest.importorskip("openai")
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "nowhere"), "--quiet"])
    assert result.exit_code == 2
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "cannot be served" in said
