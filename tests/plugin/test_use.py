"""Packed models in the hands of transformers: pipelines, caches, compilation, casts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from hf_qep.modules import packed_modules
from tests.plugin.conftest import Packed
from tests.plugin.packing import logits

CAUSAL = ["llama", "qwen3", "cohere2", "qwen3_moe", "gpt2"]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_static_cache_generates_what_a_dynamic_one_does(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    # Automatic compilation of the static cache is another test's subject.
    static = model.generate(**saved.batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**saved.batch, **options))


def test_a_text_pipeline_takes_the_folder(
    packed: Callable[[str], Packed], tiny_tokenizer: object, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed("llama").folder, tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    pipe = pipeline("text-generation", str(folder), device="cpu")
    text = pipe("abc", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("abc")
    assert packed_modules(pipe.model)


def test_a_classification_pipeline_takes_the_folder(
    packed: Callable[[str], Packed], tiny_tokenizer: object, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed("bert_classifier").folder, tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    result = pipeline("text-classification", str(folder), device="cpu", top_k=None)(["abc"])[0]
    assert sum(entry["score"] for entry in result) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_one_compiled_graph_gives_nearly_the_same_logits(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    model = type(saved.model).from_pretrained(saved.folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert saved.difference(compiled) < 1e-5


def test_the_default_compiler_gives_nearly_the_same_logits(packed: Callable[[str], Packed]) -> None:
    saved = packed("llama")
    layer = AutoModelForCausalLM.from_pretrained(saved.folder).model.layers[0].mlp
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (torch.compile(layer, fullgraph=True)(x) - layer(x)).abs().max() < 1e-5


def test_packed_experts_ignore_a_request_for_fused_experts(packed: Callable[[str], Packed]) -> None:
    saved = packed("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(saved.folder, experts_implementation="grouped_mm")
    assert saved.difference(model) == 0.0


def test_a_cast_moves_the_model_but_not_the_stored_scales(packed: Callable[[str], Packed]) -> None:
    saved = packed("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(saved.folder).to(torch.bfloat16)
    direct = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.bfloat16)
    for name, module in packed_modules(model).items():
        for leaf, tensor in module.tensors().items():
            assert torch.equal(tensor, direct.get_submodule(name).tensors()[leaf])
    assert logits(model, saved.batch).dtype == torch.bfloat16


def test_the_memory_footprint_counts_packed_bytes(packed: Callable[[str], Packed], tiny_model: Callable) -> None:
    saved = packed("llama")
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    packed_bytes = sum(t.nbytes for m in packed_modules(model).values() for t in m.held().values())
    weights = sum(m.out_features * m.in_features for m in packed_modules(model).values())
    saving = tiny_model("llama").get_memory_footprint() - model.get_memory_footprint()
    assert saving == 4 * weights - packed_bytes
    assert packed_bytes < 4 * weights * 0.1
