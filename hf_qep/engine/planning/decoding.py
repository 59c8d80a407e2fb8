"""Memory that a packed model takes once it is loaded, and while it reads a prompt and writes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_qep.engine.planning.block_memory import FLOAT32, block_width
from hf_qep.engine.planning.output import OutputPlan
from hf_qep.engine.planning.sketch import Sketch
from hf_qep.kernels.reference import PANEL_WEIGHTS

CHUNK = 512
"""Tokens of a prompt that are read at a time (`prefill_chunk_size` of transformers)."""
UNPACKED_COPIES = 3
"""float32 copies of a panel while whole numbers are unpacked."""


@dataclass(frozen=True)
class Decoding:
    """Bytes while one row is decoded. context: tokens of prompt and answer; None for a model that writes no text."""

    context: int | None
    weights: int
    cache: int
    activations: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.activations

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return {
            "context": self.context,
            "weights": self.weights,
            "cache": self.cache,
            "activations": self.activations,
            "bytes": self.bytes,
        }


def plan_decoding(sketch: Sketch, output: OutputPlan, context: int | None, chunk: int = CHUNK) -> Decoding:
    """What a loaded model takes. chunk: tokens that are read at a time; at most the context."""
    tokens = chunk if context is None else min(chunk, context)
    return Decoding(
        context=context,
        weights=output.tensors,
        cache=cache_bytes(sketch, context or 0, tokens if tokens > 1 else 1),
        activations=activation_bytes(sketch, output, context or tokens, tokens),
    )


def cache_bytes(sketch: Sketch, context: int, step: int = 1) -> int:
    """Keys and values of one row, in the dtype of the model.

    Layers with a window keep the window and as many tokens more as were read last, less one: what they keep is a part
    of a tensor that also holds those. step: tokens that are read at a time.
    """
    size = sketch.dtype.itemsize
    return sum(size * layer.values * _kept(context, layer.window, step) for layer in sketch.cache)


def _kept(context: int, window: int | None, step: int) -> int:
    return context if window is None else min(context, window + step - 1)


def activation_bytes(sketch: Sketch, output: OutputPlan, context: int, tokens: int) -> int:
    """Most that is held besides weights and cache while `tokens` tokens are read behind a context.

    In a block: outputs of its linears, keys and values of one layer copied for every head that shares them and once as
    the cache grows, and the mask. At the end: the scores of one token, and a panel of the head if that is packed.
    """
    size = sketch.dtype.itemsize
    passing = max(block_width(sketch, block) for block in sketch.blocks) * tokens * size
    widest = max((layer.values for layer in sketch.cache), default=0)
    attention = context * size * (2 * sketch.query_width + widest) + tokens * context * size
    scores = (sketch.vocabulary or 0) * (size + FLOAT32)
    panel = min(PANEL_WEIGHTS, output.table_weights) * (UNPACKED_COPIES * FLOAT32 + size)
    return max(passing + attention, scores + panel)


def longest_context(sketch: Sketch, output: OutputPlan, limit: int, most: int, chunk: int = CHUNK) -> int:
    """Most tokens of context, up to `most`, with which decoding stays within `limit` bytes; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if plan_decoding(sketch, output, middle, chunk).bytes <= limit:
            low = middle
        else:
            high = middle - 1
    return low
