"""llama.cpp computes what transformers computes (skipped without llama-cpp-python, which is slow to build)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qep.export.gguf_file import export_gguf
from tests.export.conftest import LLAMA3, YARN

pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which pip builds in some minutes")
TEXT = "The old man opened the door, and the wind from the sea came in with the smell of salt and of old wood."
ROUNDING = 0.03
"""llama.cpp rounds what enters a packed linear to 8 bits, 32 numbers to a scale; in standard deviations of logits."""
CASES = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rope_parameters": YARN}),
    "cohere2": ("cohere2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_within_the_rounding_of_activations(checkpoint, tmp_path, case):
    family, options = CASES[case]
    _, folder = checkpoint(family, **options)
    export_gguf(folder, tmp_path / "m.gguf")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(TEXT).input_ids
    other = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    assert other.tokenize(TEXT.encode(), special=True) == ids
    other.eval(ids)
    found = np.array(other.scores[: len(ids)])
    other.close()
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0].numpy()
    error = np.sqrt(np.square(found - own).mean()) / own.std()
    assert error < ROUNDING, error
    assert np.sqrt(np.square(found[:, ::-1] - own).mean()) / own.std() > 0.5, "any logits would pass"
