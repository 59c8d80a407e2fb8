"""A packed checkpoint never becomes a running model in a process without hf_qep."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugin.conftest import Packed
from tests.plugin.packing import pack_model
from tests.plugin.processes import QUIET, run_python

TRY = """
for auto, folder in {loads!r}:
    try:
        getattr(transformers, auto).from_pretrained(folder)
        print("LOADED", folder)
    except Exception as error:
        print(type(error).__name__)
"""


def test_plain_transformers_stops_with_an_error(
    packed: Callable[[str], Packed], tiny_model: Callable, tmp_path: Path
) -> None:
    experts = ["model.layers.0.mlp.experts.gate_up_proj"]
    pack_model(tiny_model("qwen3_moe"), names=experts).save_pretrained(tmp_path)
    loads = [("AutoModelForCausalLM", str(packed(f).folder)) for f in ("llama", "qwen3_moe", "gpt2", "cohere2")]
    loads += [("AutoModel", str(packed(f).folder)) for f in ("llama", "vit", "bert", "cohere2_vision")]
    loads += [("AutoModelForCausalLM", str(tmp_path)), ("AutoModel", str(tmp_path))]
    result = run_python(QUIET + TRY.format(loads=loads))
    assert result.stdout.split() == ["RuntimeError"] * len(loads), result.stderr


def test_lm_eval_stops_with_an_error_that_names_the_method(
    packed: Callable[[str], Packed], tiny_tokenizer: object, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(packed("llama").folder, tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    code = (
        f"from lm_eval.models.huggingface import HFLM\nHFLM(pretrained={str(folder)!r}, device='cpu')\nprint('LOADED')"
    )
    result = run_python(QUIET + code)
    assert result.returncode != 0
    assert "LOADED" not in result.stdout
    assert "Unknown quantization type, got qep" in result.stderr
