"""Stored bits, always with all scales and metadata, counted three ways.

bits_linear   bits of the quantised linears' tensors / their weights (biases apart: they are neither)
bits_model    bits of every stored tensor / all weights of the float model
file_bytes    bytes of the weight files as they lie on disk
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_qep.modules import PackedTensors, packed_modules


def bits_report(model: nn.Module, folder: Path | None = None) -> dict[str, Any]:
    """Keys bits_linear, bits_model, linear_weights, model_weights, weight_bytes and, with a folder, file_bytes."""
    packed = packed_modules(model)
    linear_bits = sum(8 * t.numel() * t.element_size() for m in packed.values() for t in m.packed_state().values())
    linear_weights = sum(_weights(m) for m in packed.values())
    packed_ids = {id(t) for m in packed.values() for t in m.tensors().values()}
    others = {id(t): t for t in _stored(model) if id(t) not in packed_ids}
    other_bits = sum(8 * t.numel() * t.element_size() for t in others.values())
    other_weights = sum(t.numel() for t in others.values())
    report = {
        "bits_linear": linear_bits / linear_weights if linear_weights else None,
        "bits_model": (linear_bits + other_bits) / max(1, linear_weights + other_weights),
        "linear_weights": linear_weights,
        "model_weights": linear_weights + other_weights,
        "weight_bytes": (linear_bits + other_bits) // 8,
    }
    if folder is not None:
        report["file_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return report


def _stored(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        temporary = module._non_persistent_buffers_set
        yield from (b for name, b in module.named_buffers(recurse=False) if name not in temporary)


def _weights(module: PackedTensors) -> int:
    return getattr(module, "experts", 1) * module.out_features * module.in_features
