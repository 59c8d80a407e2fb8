"""The command line as a person or a script meets it: help, exit codes, one sentence per error, JSON."""

from __future__ import annotations

import inspect
import json

import pytest
import typer
from typer.testing import CliRunner, Result

import hf_qep
from hf_qep.cli import COMMANDS, all_commands, app, output
from hf_qep.config import QepConfig
from hf_qep.errors import CheckpointError

GROUP = typer.main.get_command(app)


def run(*words: object) -> Result:
    """One call of hf-qep in this process."""
    return CliRunner().invoke(app, [str(w) for w in words])


def refusal(result: Result) -> str:
    """The sentence on standard error of a refused call."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    # transformers was imported before the command in this process, so its bars may stand before the sentence.
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return said


@pytest.mark.parametrize(
    "words", [[], ["space"], *(name.split() for name in all_commands())], ids=lambda w: " ".join(w) or "hf-qep"
)
def test_help_names_its_options_and_exits_with_zero(words):
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "--help" in result.stdout


def test_root_help_lists_every_command_with_a_sentence():
    shown = run("--help").stdout
    for name in COMMANDS:
        assert name in shown
        assert GROUP.get_command(None, name).get_short_help_str()


def test_every_option_has_a_help_text():
    silent = [(n, p.name) for n, c in all_commands().items() for p in c.params if not getattr(p, "help", None)]
    assert silent == []


def test_every_command_takes_json():
    without = [n for n, c in all_commands().items() if not any("--json" in p.opts for p in c.params)]
    assert without == []


def test_version_is_that_of_the_package():
    assert run("--version").stdout == f"{hf_qep.__version__}\n"


def test_unknown_command_is_wrong_usage():
    result = run("quantise")
    assert result.exit_code == 2
    assert "quantise" in result.stderr


def test_defaults_of_quantize_are_those_of_the_config():
    config = inspect.signature(QepConfig).parameters
    shared = {p.name: p.default for p in GROUP.get_command(None, "quantize").params if p.name in config}
    assert {"bits", "method", "propagation", "damping", "seed"} <= shared.keys()
    assert shared.pop("effort") == "balanced"  # from_pretrained shall not train for hours unless it is asked to
    assert shared == {name: config[name].default for name in shared}


def test_an_unknown_method_is_refused_with_the_nearest_name(tmp_path):
    said = refusal(run("quantize", tmp_path / "none", "--out", tmp_path / "out", "--method", "sing"))
    assert "sing" in said
    assert "did you mean `sign`" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("--bits", 9), ("--bits", "nan"), ("--propagation", 1.5), ("--damping", -1), ("--num-samples", 0), ("--seed", -1)],
)
def test_a_number_out_of_range_is_refused_with_name_and_value(tmp_path, option, value):
    said = refusal(run("quantize", tmp_path, "--out", tmp_path / "out", option, value))
    assert option.removeprefix("--").replace("-", "_") in said
    assert str(value) in said


def test_an_output_folder_with_files_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    said = refusal(run("quantize", "no/such-model", "--out", tmp_path))
    assert "not empty" in said
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_a_model_that_does_not_exist_is_refused(tmp_path):
    said = refusal(run("quantize", tmp_path / "nowhere", "--out", tmp_path / "out"))
    assert "nowhere" in said
    assert not (tmp_path / "out").exists()


def test_json_gives_the_error_as_a_value_on_standard_output(tmp_path):
    result = run("quantize", tmp_path, "--out", tmp_path / "out", "--method", "nope", "--json")
    assert result.exit_code == 2
    assert result.stderr == ""
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UnknownNameError"
    assert "nope" in error["message"]


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_QEP_DEBUG", "1")
    result = run("inspect", tmp_path / "nowhere")
    assert isinstance(result.exception, CheckpointError)


def test_a_defect_is_not_disguised_as_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_qep.cli.inspect.describe_checkpoint", lambda folder: 1 / 0)
    assert isinstance(run("inspect", tmp_path).exception, ZeroDivisionError)


def test_json_of_values_that_are_not_finite_is_null(capsys):
    output.print_json({"a": [float("nan"), float("inf"), 1.5], "b": (2,)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [2]}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_500_000, "5.5 MB"), (3 * 10**15, "3000.0 TB")]
)
def test_sizes_are_shown_in_decimal_units(count, text):
    assert output.human_bytes(count) == text
