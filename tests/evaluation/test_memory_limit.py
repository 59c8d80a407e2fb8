"""A model ten times larger than the memory that is left is evaluated beside its quantised copy, and that is loaded."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_qep import conversion
from hf_qep.config import QepConfig
from hf_qep.engine.assembly import tensors_in_files
from hf_qep.engine.fitting import load_to_run
from hf_qep.engine.source import load_float_model, load_quantized
from hf_qep.engine.tensor_files import Described, header_of
from hf_qep.evaluation.divergence import compare_language_models
from hf_qep.evaluation.perplexity import TokenStream
from hf_qep.formats import sign
from hf_qep.heaps import limit_heaps
from tests.clean_process import exit_code, limit_address_space

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, /proc and fork")
ALLOWANCE, TIMES = 120 << 20, 10
"""Bytes of address space beyond what the interpreter and its libraries take, and how much larger the weights are."""
CONFIG = LlamaConfig(
    hidden_size=1024, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=44,
    vocab_size=128, max_position_embeddings=64, dtype="float32",
)  # fmt: skip
TOKENS = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(float, packed): weights that are zero, for the sake of the disk, and random signs in their place."""
    place = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    like = {name: Described.of(tensor) for name, tensor in tensors_in_files(model).items()}
    (place / "float").mkdir()
    CONFIG.save_pretrained(place / "float")
    size = sum(described.bytes for described in like.values())
    assert size > TIMES * ALLOWANCE
    with (place / "float" / "model.safetensors").open("wb") as file:
        file.write(header_of(like))
        file.truncate(file.tell() + size)
    return place / "float", pack(model, place / "packed")


def pack(model, folder):
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    config = QepConfig()
    config.set_layers(dict.fromkeys(names, sign.Spec()))
    conversion.swap_modules(model, config)
    packed = {"quantization_config": config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    state = {name: values(tensor) for name, tensor in model.state_dict().items()}
    whole = LlamaConfig(**CONFIG.to_dict() | packed)
    LlamaForCausalLM.from_pretrained(None, config=whole, state_dict=state).save_pretrained(folder, max_shard_size="8MB")
    return folder


def values(like):
    if like.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, like.shape, dtype=torch.int32)
    return 0.02 + torch.randn(like.shape, dtype=like.dtype) / 100


def limit_memory():
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the stack of every thread takes as much as a quarter of what is left
    limit_address_space(ALLOWANCE)
    limit_heaps()


def evaluate(original, packed):
    limit_memory()
    loaded = load_to_run(original)
    assert loaded.on_demand
    ids = torch.arange(TOKENS) % CONFIG.vocab_size
    stream = TokenStream(ids, torch.ones(TOKENS, dtype=torch.bool), None, None, "none", 1, None)
    score = compare_language_models(loaded.model, load_quantized(packed), stream, window=32, stride=32)
    assert score.kl.n == TOKENS - 1 and score.kl.value > 0


def load_whole(original):
    limit_memory()
    load_float_model(original)


@torch.no_grad()
def generate(packed):
    limit_memory()
    ids = torch.arange(8)[None]
    out = load_quantized(packed).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4)
    assert out.shape == (1, 12)


def test_both_models_are_compared_where_the_original_does_not_fit(folders):
    assert exit_code(load_whole, folders[0]) == 1
    assert exit_code(evaluate, *folders) == 0


def test_the_packed_model_writes_text_there(folders):
    assert exit_code(generate, folders[1]) == 0
