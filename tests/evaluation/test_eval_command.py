import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hf_qep.cli import app
from hf_qep.cli.compare import HeldOut, run_comparison, split
from hf_qep.config import QepConfig
from hf_qep.engine import fitting
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.fitting import load_to_run
from hf_qep.errors import ConfigError
from hf_qep.evaluation import EvalOptions, EvalRecord, find_tasks
from hf_qep.evaluation.samples import FILE_NAME

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 4, "and then it sleeps all day long. " * 4]
ROW = {"kl", "top1_agreement", "perplexity", "cosine_distance", "tasks", "bits_linear", "seconds", "reason"}


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_model, tiny_tokenizer):
    """(float folder, quantised folder, text file)"""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_model("llama").save_pretrained(folder / "float")
    tiny_tokenizer.save_pretrained(folder / "float")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    done = run(
        "quantize", folder / "float", "--out", folder / "packed", "--method", "rtn", "--num-samples", 2,
        "--seq-len", 16, "--dataset", folder / "text.txt", "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "float", folder / "packed", folder / "text.txt"


def test_eval_prints_the_record_and_writes_it_into_the_checkpoint(checkpoints):
    model, packed, text = checkpoints
    done = run("eval", packed, "--baseline", model, "--text", text, "--window", 32, "--json")
    assert done.exit_code == 0, done.output
    record = EvalRecord.from_dict(json.loads(done.stdout))
    assert record == EvalRecord.read(packed)
    assert record.text.kl.value > 0 and record.text.source == "text.txt"
    assert record.bits.linear > 1 and record.bits.file > 0
    assert (record.subject.name, record.baseline.name) == ("packed", "float")
    assert record.subject.parameters == record.baseline.parameters
    assert record.cost.subject.weight_bytes < record.cost.baseline.weight_bytes


def test_eval_measures_the_text_of_the_package_when_none_is_given(checkpoints, tmp_path):
    model, packed, _ = checkpoints
    words = ("--baseline", model, "--max-tokens", 100, "--window", 64, "--out", tmp_path / "record.json", "--speed")
    done = run("eval", packed, *words)
    assert done.exit_code == 0, done.output
    record = EvalRecord.read(tmp_path / "record.json")
    assert record.text.source == "held_out.txt" and record.cost.subject.speed.decode.value > 0
    assert "KL to float" in done.stdout and "decode, tokens/s" in done.stdout
    assert "only the first 100 tokens" in done.stdout


def test_eval_runs_tasks_and_shows_why_a_retention_is_missing(checkpoints, tmp_path):
    pytest.importorskip("lm_eval")
    model, packed, text = checkpoints
    rows = [{"query": f"q {i}", "choices": ["ab", "ba"], "gold": i % 2} for i in range(8)]
    (tmp_path / "guess.json").write_text(json.dumps(rows))
    words = ("--baseline", model, "--text", text, "--window", 32, "--tasks", f"guess={tmp_path / 'guess.json'}")
    done = run("eval", packed, *words, "--out", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    assert "own:guess" in done.stdout and "cannot show what quantisation costs" in " ".join(done.stdout.split())
    assert EvalRecord.read(tmp_path / "r.json").tasks[0].items == 8


@pytest.mark.parametrize(
    "words, message",
    [
        (["--window", 500], "outside 2..128"),
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--tasks", "own:x"], "no file for task"),
        (["--bos", "never"], "never"),
        (["--tasks-dir", "nowhere"], "not a folder"),
    ],
)
def test_eval_refuses_what_it_cannot_do(checkpoints, words, message):
    model, packed, _ = checkpoints
    done = run("eval", packed, "--baseline", model, *words)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_eval_says_when_the_float_model_is_unknown_or_gone(checkpoints, tmp_path):
    _, packed, _ = checkpoints
    gone = run("eval", packed)  # the manifest knows the name of a folder, not where it is
    assert gone.exit_code == 2 and "the manifest names 'float'" in gone.stderr and "--baseline" in gone.stderr
    (tmp_path / "bare").mkdir()
    unknown = run("eval", tmp_path / "bare")
    assert unknown.exit_code == 2 and "--baseline MODEL" in unknown.stderr


def test_eval_refuses_a_float_checkpoint_as_subject(checkpoints):
    model, _, text = checkpoints
    done = run("eval", model, "--baseline", model, "--text", text)
    assert done.exit_code == 2 and "hf-qep quantize" in done.stderr


def compare(model, tokenizer, configs, **held_out):
    calibration = load_calibration(TEXTS * 8, tokenizer, num_samples=16, seq_len=32, seed=0, model=model)
    return run_comparison(model, tokenizer, configs, calibration, HeldOut(TEXTS, "texts", **held_out))


def test_comparison_gives_one_row_per_recipe_and_leaves_the_model_alone(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configs = [QepConfig(method="rtn", propagation=p) for p in (0.0, 1.0)] + [QepConfig(method="rtn", bits=1.5)]
    rows = compare(model, tiny_tokenizer, configs, options=EvalOptions(window=32))
    assert [row["status"] for row in rows] == ["ok", "ok", "impossible"]
    assert all(row.keys() >= ROW and row.keys() == rows[0].keys() for row in rows)
    assert rows[0]["kl"]["value"] != rows[1]["kl"]["value"]
    assert "1.0" in rows[2]["reason"] and rows[2]["kl"] is None
    assert rows[0]["cosine_distance"] is None
    assert json.loads(json.dumps(rows)) == rows
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_comparison_of_an_encoder_measures_embeddings(tiny_model, tiny_tokenizer):
    (row,) = compare(tiny_model("bert"), tiny_tokenizer, [QepConfig(method="rtn")])
    assert row["status"] == "ok" and row["kl"] is None
    assert 0 < row["cosine_distance"]["value"] <= 2


def test_comparison_runs_tasks(tiny_model, tiny_tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "pairs.json").write_text(json.dumps([{"good": f"cat {i} is", "bad": f"cat {i} are"} for i in range(6)]))
    rows = compare(
        tiny_model("llama"),
        tiny_tokenizer,
        [QepConfig(method="rtn")],
        tasks=find_tasks([], tmp_path),
        options=EvalOptions(window=32),
    )
    assert rows[0]["tasks"]["pairs/acc"]["float"]["n"] == 6


def test_compare_command_prints_a_table_and_names_impossible_recipes(checkpoints):
    model, _, text = checkpoints
    words = ["compare", model, "--methods", "rtn", "--bits", "1.0,1.5", "--dataset", text, "--text", text]
    words += ["--num-samples", 2, "--seq-len", 16, "--window", 32]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "float perplexity" in done.stdout and "* rtn, 1.5 bits, group row" in done.stdout
    result = json.loads(run(*words, "--json").stdout)
    assert [row["status"] for row in result["rows"]] == ["ok", "impossible"]


@pytest.mark.parametrize("words, read", [("1.0,x", float), ("", str), (" , ", str)])
def test_lists_that_cannot_be_read_are_refused(words, read):
    with pytest.raises(ConfigError, match="--bits"):
        split(words, "bits", read)


def test_lists_keep_their_order_and_lose_doubles():
    assert split("b, a,b", "methods", str) == ["b", "a"]


def test_an_original_that_does_not_fit_is_measured_all_the_same(checkpoints, tmp_path, monkeypatch):
    model, packed, text = checkpoints
    words = ("--baseline", model, "--text", text, "--window", 32, "--samples", 1, "--out")
    whole = run("eval", packed, *words, tmp_path / "whole" / "r.json")
    monkeypatch.setattr(fitting, "free_memory", lambda: 0)
    done = run("eval", packed, *words, tmp_path / "blocks" / "r.json")
    assert done.exit_code == 0, done.output
    assert "read block by block" in " ".join(done.output.split()) and "block by block" not in whole.output
    first, second = (EvalRecord.read(tmp_path / name / "r.json") for name in ("whole", "blocks"))
    assert replace(first, command=second.command, created=second.created) == second
    answers = [json.loads((tmp_path / name / FILE_NAME).read_text())["items"] for name in ("whole", "blocks")]
    assert answers[0] == answers[1]


def test_an_original_that_is_timed_is_in_memory(checkpoints, tmp_path, monkeypatch):
    model, packed, text = checkpoints
    monkeypatch.setattr(fitting, "free_memory", lambda: 0)
    words = ("--baseline", model, "--text", text, "--window", 32, "--out", tmp_path / "r.json", "--speed")
    done = run("eval", packed, *words)
    assert done.exit_code == 0 and "block by block" not in done.output


def test_memory_that_a_model_needs_follows_the_dtype(checkpoints):
    stored = sum(8 * p.numel() for p in load_to_run(checkpoints[0]).model.parameters()) // 2
    assert fitting.needed_bytes(checkpoints[0]) == stored
    assert fitting.needed_bytes(checkpoints[0], torch.bfloat16) == stored // 2
