"""Quantised checkpoints, loaded rank by rank into vLLM's layers: every linear computes what it does in transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vllm_plugin.checkpoints import FAMILIES, Saved
from tests.vllm_plugin.skeleton import MAPPING, Skeleton, load

VISION = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
"""How vLLM renames what a model with images stores."""


def served(vllm: Any, saved: Saved, ranks: int) -> list[Skeleton]:
    """The model of each rank, as vLLM builds and loads it."""
    hf, kind = saved.model.config.get_text_config(), saved.model.config.model_type
    stored = json.loads((saved.folder / "config.json").read_text())["quantization_config"]
    prefix, renamed = ("language_model.", VISION) if "vision" in kind else ("", {})
    models = []
    for rank in range(ranks):
        config = vllm.quantization.get_quantization_config("qep").from_config(stored)
        config.apply_vllm_mapper(vllm.utils.WeightsMapper(orig_to_new_prefix=renamed).get_rename_mapper())
        config.packed_modules_mapping.update(MAPPING)
        embedding = {"quant_config": config, "prefix": "model.embed_tokens"} if kind == "qwen3" else {}
        embedding |= {"quant_config": config} if kind == "llama" else {}
        with vllm.at(rank, ranks, config):
            model = Skeleton(vllm, hf, config, prefix, embedding)
            whole = nn.ModuleDict({"language_model": model}) if prefix else model
            load(vllm, whole, saved.folder, renamed)
        models.append(model)
    return models


def linears(saved: Saved) -> dict[str, nn.Module]:
    """Name in vLLM's skeleton -> linears of transformers that it stands for, of one block after another."""
    language = saved.model.get_decoder()
    found = {}
    for i, layer in enumerate(language.layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found[f"{attention}.qkv_proj"] = [getattr(layer.self_attn, f"{part}_proj") for part in "qkv"]
        found[f"{attention}.o_proj"] = [layer.self_attn.o_proj]
        found[f"{mlp}.gate_up_proj"] = [layer.mlp.gate_proj, layer.mlp.up_proj]
        found[f"{mlp}.down_proj"] = [layer.mlp.down_proj]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_linear_computes_what_it_does_in_transformers(vllm, saved, family, ranks):
    models = served(vllm, saved(family), ranks)
    heads = saved(family).model.config.get_text_config().num_key_value_heads
    g = torch.Generator().manual_seed(0)
    for name, modules in linears(saved(family)).items():
        layers = [model.get_submodule(name) for model in models]
        x = torch.randn(3, modules[0].in_features, generator=g)
        expected = [module(x) for module in modules]
        if len(modules) == 1:
            shares = x.split(layers[0].input_size_per_partition, -1)
            found = [sum(layer(share)[0] for layer, share in zip(layers, shares, strict=True))]
        else:
            outputs = [layer(x)[0].split(layer.output_partition_sizes, -1) for layer in layers]
            steps = [1, *[max(1, ranks // heads) if name.endswith("qkv_proj") else 1] * (len(modules) - 1)]
            found = [torch.cat([o[i] for o in outputs][::step], -1) for i, step in enumerate(steps)]
        for each, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embedding_and_head_are_those_of_transformers(vllm, saved, family, ranks):
    model, models = saved(family).model, served(vllm, saved(family), ranks)
    ids, x = torch.arange(0, 128, 9), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sum(m.model.embed_tokens(ids) for m in models), model.get_input_embeddings()(ids))
    logits: list[Tensor] = [m.lm_head.quant_method.apply(m.lm_head, x) for m in models]
    torch.testing.assert_close(torch.cat(logits, -1), model.get_output_embeddings()(x), rtol=1e-4, atol=1e-4)


def test_the_checkpoints_are_of_every_kind(saved):
    formats = {
        family: {entry["format"] for entry in saved(family).model.config.quantization_config.layers}
        for family in FAMILIES
    }
    assert formats["llama"] == formats["cohere2"] == {"sign", "integer"} and formats["qwen3"] == {"sign", "factored"}
