"""Whole jobs on tiny models: quantize, inspect and demo, as commands."""

from __future__ import annotations

import errno
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_qep.accounting import bits_report
from hf_qep.cli import demo
from hf_qep.cli import job as job_module
from hf_qep.engine.streams import StreamStore
from tests.cli.test_commands import refusal, run

SMALL = ("--num-samples", 4, "--seq-len", 16)
TEXT = "He walked down to the river in the morning and sat upon a stone. " * 8


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A bfloat16 Cohere2 checkpoint with a character tokenizer."""
    folder = tmp_path_factory.mktemp("float") / "tiny"
    tiny_model("cohere2").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, float_folder, text_file):
    """(folder, what the command printed) of one run of `hf-qep quantize --json`."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    options = ("--dataset", text_file, "--dtype", "float32", "--method", "onebit", "--json")
    result = run("quantize", float_folder, "--out", out, *SMALL, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return out, json.loads(result.stdout)


def test_quantize_says_what_was_stored(quantized):
    out, said = quantized
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {k: said[k] for k in ("bits_linear", "bits_model", "file_bytes")}.items() <= bits_report(model, out).items()
    assert said["method"] == "onebit"
    assert said["layers"] == 3 * 7
    assert 0 < said["mean_error"] < 1
    assert said["calibration"]["tokens"] == 4 * 16


def test_inspect_agrees_with_quantize(quantized):
    out, said = quantized
    found = json.loads(run("inspect", out, "--json").stdout)
    for key in ("bits_linear", "bits_model", "file_bytes", "linear_weights", "model_weights"):
        assert found[key] == pytest.approx(said[key]), key
    assert len(found["layers"]) == said["layers"]
    assert [x["name"] for x in found["skipped"]] == ["model.embed_tokens.weight"]
    assert found["skipped"][0]["reason"]
    assert math.isclose(sum(x["error"] for x in found["layers"]) / len(found["layers"]), said["mean_error"])


def test_files_keep_the_stored_dtype_whatever_dtype_was_computed_in(quantized, float_folder):
    out, _ = quantized
    written, original = load_file(out / "model.safetensors"), load_file(float_folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert written[name].dtype == torch.bfloat16
    assert torch.equal(written[name], original[name])


def test_tables_are_printed_without_json(float_folder, text_file, tmp_path):
    result = run("quantize", float_folder, "--out", tmp_path / "q", "--dataset", text_file, "--method", "rtn", *SMALL)
    assert result.exit_code == 0, result.exception
    assert "bits per weight, quantised linears" in result.stdout
    assert "hf-qep eval" in result.stderr


def test_a_quantised_model_is_refused_as_input(quantized, tmp_path):
    assert "quantised already" in refusal(run("quantize", quantized[0], "--out", tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_overwrite_replaces_the_folder(float_folder, text_file, tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    (out / "old.txt").write_text("old")
    words = ("quantize", float_folder, "--out", out, "--dataset", text_file, "--method", "rtn", *SMALL)
    assert run(*words, "--overwrite").exit_code == 0
    assert not (out / "old.txt").exists()


def test_a_job_without_training_reads_block_by_block_and_can_be_resumed(float_folder, text_file, tmp_path, monkeypatch):
    words = ("quantize", float_folder, "--dataset", text_file, "--method", "rtn", "--effort", "fast", *SMALL)
    result = run(*words, "--out", tmp_path / "whole")
    assert result.exit_code == 0 and "one block at a time" in result.stderr
    with monkeypatch.context() as patch:
        patch.setattr("hf_qep.engine.assembly._write", full_disk)
        assert "no space is left" in refusal(run(*words, "--out", tmp_path / "q"))
    assert "--resume" in refusal(run(*words, "--out", tmp_path / "q"))
    assert "recipe.damping" in refusal(run(*words, "--out", tmp_path / "q", "--resume", "--damping", 0.5))
    assert run(*words, "--out", tmp_path / "q", "--resume").exit_code == 0
    name = "model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "q"}


@pytest.mark.parametrize("effort", [("fast",), ("fast", "--tune-epochs", 1)], ids=["block by block", "in memory"])
def test_a_small_room_for_activations_sends_them_to_the_disk_and_changes_nothing(
    float_folder, text_file, tmp_path, monkeypatch, effort
):
    stores = []

    class Watched(StreamStore):
        def __init__(self, *args):
            super().__init__(*args)
            stores.append(self)

    monkeypatch.setattr("hf_qep.engine.job.StreamStore", Watched)
    words = ("quantize", float_folder, "--dataset", text_file, "--method", "rtn", "--effort", *effort, *SMALL)
    for name, room in (("much", ()), ("little", ("--stream-room", "9kB")), ("none", ("--stream-room", "0B"))):
        result = run(*words, "--out", tmp_path / name, *room)
        assert result.exit_code == 0, (result.output, result.exception)
    much, little, none = stores
    assert much.spilled_bytes == 0 and 0 < little.spilled_bytes < none.spilled_bytes
    assert (little.budget_bytes, none.budget_bytes) == (9000, 0)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("much", "little", "none")]
    assert written[0] == written[1] == written[2]
    assert "14GB" in refusal(run(*words, "--out", tmp_path / "q", "--stream-room", "some"))


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_job_that_trains_is_in_memory_and_says_why(float_folder, text_file, tmp_path):
    words = ("quantize", float_folder, "--out", tmp_path / "q", "--dataset", text_file, "--method", "rtn", *SMALL)
    assert "distill_epochs 2 trains all signs" in refusal(run(*words, "--resume"))
    assert "in memory: distill_epochs 2" in run(*words).stderr
    one_by_one = run(*words, "--no-distill-signs", "--resume", "--overwrite")
    assert one_by_one.exit_code == 0 and "one block at a time" in one_by_one.stderr


def test_skipped_modules_stay_float(float_folder, text_file, tmp_path):
    words = ("--dataset", text_file, "--method", "rtn", "--skip", "down_proj", *SMALL)
    assert run("quantize", float_folder, "--out", tmp_path / "q", *words).exit_code == 0
    found = json.loads(run("inspect", tmp_path / "q", "--json").stdout)
    assert sum("down_proj" in x["name"] for x in found["skipped"]) == 3
    assert not any("down_proj" in x["name"] for x in found["layers"])


def test_bits_that_a_method_cannot_have_are_refused(float_folder, text_file, tmp_path):
    words = ("--dataset", text_file, "--method", "onebit", "--bits", 1.5, *SMALL)
    assert "1.5" in refusal(run("quantize", float_folder, "--out", tmp_path / "q", *words))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("option", "value"), [("--device", "tpu9"), ("--device", "cuda:99"), ("--dtype", "float8")])
def test_an_unknown_place_or_dtype_is_refused(float_folder, tmp_path, option, value):
    assert value in refusal(run("quantize", float_folder, "--out", tmp_path / "q", option, value))


def test_a_folder_that_loads_back_differently_is_removed(float_folder, text_file, tmp_path, monkeypatch):
    save = job_module.save_checkpoint

    def spoil(model, out, **options):
        save(model, out, **options)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)

    monkeypatch.setattr(job_module, "save_checkpoint", spoil)
    words = ("--dataset", text_file, "--method", "rtn", *SMALL)
    assert "answers differently" in refusal(run("quantize", float_folder, "--out", tmp_path / "q", *words))
    assert not (tmp_path / "q").exists()


@pytest.fixture(scope="module")
def demo_result(tmp_path_factory, float_folder, text_file):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_MODEL", float_folder)
        patch.setattr(demo, "WINDOW", 32)
        patch.setattr(demo, "NEW_TOKENS", 8)
        words = ("--method", "rtn", "--method", "onebit", "--distill-epochs", 1, "--text", text_file)
        result = run("demo", *words, "--out", out, *SMALL, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return out, json.loads(result.stdout)


def test_demo_compares_the_float_model_and_every_method(demo_result):
    _, said = demo_result
    assert [row["name"] for row in said["rows"]] == ["float", "rtn", "onebit", "onebit-distilled"]
    base, *others = said["rows"]
    assert (base["bits_linear"], base["kl"], base["top1_agreement"]) == (16, 0, 1)
    for row in others:
        assert 1 < row["bits_linear"] < 2
        assert row["kl"] > 0
        assert row["file_bytes"] < base["file_bytes"]
    assert said["best"] == min(others, key=lambda row: row["kl"])["name"]


def test_demo_shows_what_the_float_and_the_best_model_write(demo_result):
    _, said = demo_result
    assert list(said["samples"]) == ["float", said["best"]]


def test_demo_leaves_checkpoints_with_their_measurements(demo_result):
    out, said = demo_result
    for row in said["rows"][1:]:
        record = json.loads((out / row["name"] / "hf_qep_eval.json").read_text())
        assert record["text"]["kl"]["value"] == row["kl"]


def test_the_bundled_text_is_plain_english_prose():
    text = demo.HELD_OUT.read_text(encoding="utf-8")
    assert text.isascii()
    assert 14_000 < len(text) < 20_000


def test_shard_size_splits_the_weights_and_nothing_else(tmp_path, float_folder, text_file, quantized):
    options = ("--dataset", text_file, "--dtype", "float32", "--method", "onebit", "--effort", "fast", "--quiet")
    for name, size in (("one", "1GB"), ("some", "3kB")):
        result = run("quantize", float_folder, "--out", tmp_path / name, *SMALL, *options, "--shard-size", size)
        assert result.exit_code == 0, result.output
    one, some = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "some"))
    assert len(one) == 1 < len(some)
    tensors = {key: tensor for path in some for key, tensor in load_file(path).items()}
    whole = load_file(one[0])
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[key], whole[key]) for key in whole)
