"""Tokens per second of two models, measured in turn so that a change of the machine's load hits both alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from hf_qep.errors import ConfigError
from hf_qep.evaluation.estimates import Estimate, median


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed."""

    prompt_tokens: int = 64
    """tokens of the prompt that is processed at once (prefill)"""
    new_tokens: int = 32
    """tokens decoded greedily afterwards, one at a time"""
    repetitions: int = 3
    """timed repetitions per model, after one that is not timed"""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Speed:
    """Medians over repetitions at batch size 1; stderr is an indication, timings are not normal."""

    prefill: Annotated[Estimate, "prompt tokens per second"]
    decode: Annotated[Estimate | None, "new tokens per second, KV cache on, prefill excluded; null without generation"]
    prompt_tokens: Annotated[int, "length of the prompt"]
    new_tokens: Annotated[int, "tokens decoded per repetition"]


def compare_speed(models: Sequence[nn.Module], prompt: Tensor, options: SpeedOptions | None = None) -> list[Speed]:
    """Time `models` in turn on `prompt` (1, tokens) int64, repeated or cut to `options.prompt_tokens`.

    Models that cannot generate get a prefill only.
    """
    options = options or SpeedOptions()
    repeats = -(-options.prompt_tokens // prompt.shape[1])
    prompt = prompt.repeat(1, repeats)[:, : options.prompt_tokens]
    timings: list[list[tuple[float, float | None]]] = [[] for _ in models]
    for repetition in range(options.repetitions + 1):
        for model, kept in zip(models, timings, strict=True):
            seconds = time_once(model, prompt, options.new_tokens)
            if repetition > 0:  # the first pass compiles kernels and fills caches
                kept.append(seconds)
    return [_summary(kept, options) for kept in timings]


def time_once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float | None]:
    """(prefill seconds, seconds for `new_tokens` greedy tokens or None if the model does not generate)."""
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    generates = generates_text(model)
    with torch.inference_mode():
        start = _now(device)
        out = model(input_ids=prompt, use_cache=True) if generates else model(input_ids=prompt)
        prefilled = _now(device)
        if not generates:
            return prefilled - start, None
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        begin = _now(device)
        for _ in range(new_tokens):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return prefilled - start, _now(device) - begin


def generates_text(model: nn.Module) -> bool:
    """Whether `model` is a decoder-only language model."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not model.config.is_encoder_decoder


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _summary(timings: list[tuple[float, float | None]], options: SpeedOptions) -> Speed:
    decode = [options.new_tokens / seconds for _, seconds in timings if seconds is not None]
    return Speed(
        prefill=median([options.prompt_tokens / seconds for seconds, _ in timings]),
        decode=median(decode) if decode else None,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens if decode else 0,
    )
