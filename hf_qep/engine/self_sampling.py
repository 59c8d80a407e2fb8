"""Calibration text that the model writes itself, for when no data set is given.

Sampled at temperature 1 without any truncation, so that the rows follow the distribution of the model; data-free
calibration by sampling is LLM-QAT, arXiv 2305.17888, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_qep.errors import CalibrationError

ROWS_AT_ONCE = 32


def sample_rows(model: PreTrainedModel, tokenizer: Any, *, num_rows: int, seq_len: int, seed: int) -> Tensor:
    """Token ids, int64 (num_rows, seq_len), on the CPU; the same for the same model, device and seed.

    Rows start at BOS, or at a random token each where there is no BOS. End-of-text does not stop a row: what follows
    it is the next text, as in packed training data.

    Raises CalibrationError for a model that cannot write text: encoders, vision models, encoder-decoders.
    """
    _check_can_write(model)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), _plain_sampling(model):
        torch.manual_seed(seed)
        starts = _starts(model, tokenizer, num_rows)
        if seq_len == 1:
            return starts.cpu()
        rows = [
            model.generate(part, attention_mask=torch.ones_like(part), max_new_tokens=seq_len - 1)
            for part in starts.split(ROWS_AT_ONCE)
        ]
    return torch.cat(rows).cpu()


def _check_can_write(model: PreTrainedModel | None) -> None:
    if model is None:
        raise CalibrationError("calibration without a data set needs the model to write one; pass dataset=")
    kind = type(model).__name__
    if model.main_input_name != "input_ids":
        raise CalibrationError(
            f"{kind} reads {model.main_input_name!r} and cannot write its own calibration data; pass dataset= with a "
            "tensor of such inputs"
        )
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise CalibrationError(f"{kind} cannot write its own calibration text; pass dataset= (a text file or Hub id)")


@contextmanager
def _plain_sampling(model: PreTrainedModel) -> Iterator[None]:
    """Leave aside what the checkpoint asks for (top-k, penalties, stop tokens): it would bend the distribution."""
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _starts(model: PreTrainedModel, tokenizer: Any, num_rows: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    if bos is None or not 0 <= bos < vocabulary:
        return torch.randint(vocabulary, (num_rows, 1)).to(model.device)
    return torch.full((num_rows, 1), bos, device=model.device)
