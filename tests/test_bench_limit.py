"""The bench of a checkpoint larger than memory, in small."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.script_modules import imported

SIZES = {"hidden": 128, "ffn": 192, "layers": 2, "vocab": 320}


@pytest.fixture
def bench():
    """The bench as a module."""
    with imported("bench_limit") as modules:
        yield modules.bench_limit


def test_the_checkpoint_is_written_in_shards_and_loads(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHARD", "300kB")
    bench.make_checkpoint(tmp_path / "m", Namespace(**SIZES))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    text = "A stone, naïve."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space and /proc")
def test_a_step_beyond_its_limit_says_so(bench, tmp_path):
    bench.make_checkpoint(tmp_path / "m", Namespace(**SIZES))
    row = bench.take("float", [str(tmp_path / "m")], Namespace(allow=1 << 18, verbose=False))
    assert row["step"] == "float" and row["ok"] is False and row["limit"] == 1 << 18, row
    # Usually "memory"; where an extension module meets the limit first, Python only knows that it failed.
    assert "memory" in row["error"].lower() or "SystemError" in row["error"], row
