"""A checkpoint several times larger than the memory that a process may take."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_qep.config import QepConfig
from hf_qep.engine.source import load_quantized
from tests.clean_process import exit_code, limit_address_space
from tests.engine.test_streaming import in_memory, streamed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, /proc and fork")
M_MMAP_THRESHOLD = -3
"""Of mallopt: larger pieces go back to the system when they are freed."""
ALLOWANCE, TIMES = 64 << 20, 3
"""Bytes of address space beyond what the interpreter and its libraries take, and how much larger the weights are."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 32 blocks of 7 MB each."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=32, vocab_size=128, max_position_embeddings=64))
    folder = tmp_path_factory.mktemp("large") / "m"
    model.save_pretrained(folder)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > TIMES * ALLOWANCE
    return folder


def limit_memory():
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the heap of every thread reserves as much as is allowed here
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # or freed tensors would stay in a heap full of holes
    limit_address_space(ALLOWANCE)


def tokens():
    return torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))


def quantize(way, folder, out):
    limit_memory()
    way(folder, out, QepConfig(method="rtn", dataset={"input_ids": tokens()}, num_samples=4, batch_size=2))


@torch.no_grad()
def use(folder):
    limit_memory()
    load_quantized(folder)(input_ids=tokens())


def test_only_the_streaming_job_stays_within_the_limit(large, tmp_path):
    assert exit_code(quantize, in_memory, large, tmp_path / "whole") == 1
    assert not (tmp_path / "whole").exists()
    assert exit_code(quantize, streamed, large, tmp_path / "streamed") == 0
    assert exit_code(use, tmp_path / "streamed") == 0
