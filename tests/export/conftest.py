"""Packed checkpoints wide enough for the blocks of llama.cpp, of every family that it shares with us."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

import hf_qep
from hf_qep.formats import integer, sign
from hf_qep.modules import packed_like, replace_module
from tests.plugin.packing import pack_model

DEMO = Path(hf_qep.__file__).parent / "demo_model"
WIDTH, TOKENS = 128, 2048
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": TOKENS,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
COHERE2 = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "logit_scale": 0.25}
BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **o: tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON | {"tie_word_embeddings": False} | o)),
    "mistral": lambda **o: tf.MistralForCausalLM(tf.MistralConfig(**COMMON | {"sliding_window": None} | o)),
    "qwen2": lambda **o: tf.Qwen2ForCausalLM(tf.Qwen2Config(**COMMON | o)),
    "qwen3": lambda **o: tf.Qwen3ForCausalLM(tf.Qwen3Config(**COMMON | {"tie_word_embeddings": True} | o)),
    "cohere2": lambda **o: tf.Cohere2ForCausalLM(tf.Cohere2Config(**COMMON | COHERE2 | o)),
}


def wide_model(family: str, **options: Any) -> PreTrainedModel:
    """A float model whose norms and biases are not trivial."""
    torch.manual_seed(0)
    model = BUILDERS[family](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pack_table(model: PreTrainedModel, name: str, bits: int, group_size: int | None) -> None:
    """Store a table of a model in whole numbers, rounded anyhow."""
    weight, spec = model.get_submodule(name).weight.detach().float(), integer.Spec(bits, group_size)
    top = 2 ** (bits - 1) - 1
    grouped = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    scales = (grouped.abs().amax(-1) / top).half().float()
    codes = (grouped / scales[..., None]).round().clamp(-top - 1, top).flatten(1)
    new = packed_like(model, name, spec)
    new.load_packed(integer.pack({"codes": codes.to(torch.int8), "row_scale": scales}, spec))
    replace_module(model, name, new)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, spec, names=None, dtype="bfloat16", **options)`: model and folder with the demo's tokenizer;
    change neither."""
    made = {}

    def build(family, spec=sign.Spec(group_size=128), names=None, dtype="bfloat16", **options):  # noqa: B008, values
        key = repr((family, spec, names, dtype, options))
        if key not in made:
            model, folder = wide_model(family, **options).to(getattr(torch, dtype)), tmp_path_factory.mktemp(family)
            pack_model(model, spec, names).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                shutil.copy(DEMO / name, folder)
            made[key] = model, folder
        return made[key]

    return build
