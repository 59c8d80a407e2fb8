"""`hf-qep plan`: figures as JSON and as tables, and one sentence for what cannot be planned."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from tests.cli.test_commands import refusal, run
from tests.tiny_models import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny float model with its weights."""
    place = tmp_path_factory.mktemp("plan") / "model"
    build_model("cohere2").to(torch.bfloat16).save_pretrained(place)
    return place


def test_json_has_every_figure_and_the_verdicts(folder):
    words = ["--effort", "fast", "--context", 8, "--context", 64, "--gpu", "24GB", "--ram", "1kB", "--disk", "1TB"]
    result = run("plan", folder, *words, "--embedding-bits", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    out = found["output"]
    parts = sum(out[name] for name in ("linears", "embedding", "head", "rest", "headers"))
    assert out["file_bytes"] == parts and 0 < out["saving"] < 1 and out["exact"] is True
    assert set(found["bits"]) == {"bits_linear", "bits_tables", "bits_model"}
    assert [d["context"] for d in found["decoding"]] == [8, 64]
    assert found["dtype"] == "bfloat16" and "headers" in found["dtype_from"]
    assert found["quantising"]["on_cpu"]["streaming"] is True
    assert found["quantising"]["whole_model"]["streaming"] is False
    assert found["quantising"]["on_cpu"]["ram"]["bytes"] == sum(found["quantising"]["on_cpu"]["ram"]["parts"].values())
    assert found["seconds"]["total"] > 0 and found["limits"]["gpu"] == 24 * 10**9
    fits = {(v["what"].partition(",")[0], v["place"]): v["fits"] for v in found["verdicts"]}
    assert fits["decoding", "gpu"] and fits["quantising", "disk"] and not fits["decoding", "ram"]


def test_tables_say_what_fits_and_what_would(folder):
    result = run("plan", folder / "config.json", "--ram", "700MB", "--context", 16)
    assert result.exit_code == 0, result.output
    for words in (
        "output, weight files",
        "bits per weight, whole model",
        "all weights at once",
        "what fits",
        "together",
    ):
        assert words in result.stdout
    assert "distill_epochs 2 trains all signs together" in result.stdout
    assert "driver" in result.stderr and run("plan", folder, "--quiet").stderr == ""


def test_an_encoder_is_planned_without_a_cache(tmp_path):
    build_model("bert").save_pretrained(tmp_path)
    found = json.loads(run("plan", tmp_path, "--effort", "fast", "--gpu", "1GB", "--json").stdout)
    assert [d["context"] for d in found["decoding"]] == [None] and found["decoding"][0]["cache"] == 0
    assert any(v["what"] == "running" and v["fits"] for v in found["verdicts"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "lots"], 'like "14GB"'),
        (["--ram", "0GB"], 'like "14GB"'),
        (["--stream-room", "much"], 'like "14GB"'),
        (["--bits", "9"], "bits"),
        (["--method", "magic"], "magic"),
        (["--skip", "nothing_of_this_name"], "matches no module"),
        (["--group-size", "48"], "divide"),
    ],
)
def test_options_that_cannot_be_served_are_refused_in_one_sentence(folder, words, said):
    assert said in refusal(run("plan", folder, *words))


def test_models_that_are_nowhere_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "neither a folder" in refusal(run("plan", "no such/folder/here"))
    assert "HF_HUB_OFFLINE" in refusal(run("plan", "nobody/has-this-model"))
    assert "missing" in refusal(run("plan", tmp_path))
    error = json.loads(run("plan", "nobody/has-this-model", "--json").stdout)["error"]
    assert error["type"] == "CheckpointError" and "nobody/has-this-model" in error["message"]


def test_a_configuration_without_blocks_is_refused(tmp_path):
    tf.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8).save_pretrained(tmp_path)
    assert "list of blocks" in refusal(run("plan", tmp_path)) or "nothing is left" in refusal(run("plan", tmp_path))
