"""Stored bits, always with all scales and metadata, counted three ways.

bits_linear   bits of the quantised linears' tensors / their weights (biases apart: they are neither)
bits_tables   the same for embeddings and heads in whole numbers, a tied pair counted once
bits_model    bits of every stored tensor / all weights of the float model
file_bytes    bytes of the weight files as they lie on disk
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.modules import PackedTensors, packed_modules, packed_tables


def bits_report(
    model: nn.Module, folder: Path | None = None, *, stored_as: torch.dtype | None = None
) -> dict[str, Any]:
    """Keys bits_linear, bits_tables, bits_model, linear_weights, table_weights, model_weights, weight_bytes and, with a
    folder, file_bytes. What there is none of has None bits and 0 weights.

    weight_bytes is what the model takes in memory. The dtype that it computes in is not always that of its files, so
    bits_model counts what the files in `folder` hold, or else float weights as `stored_as`, or else as they are.
    """
    packed = packed_modules(model).values()
    tables = packed_tables(model).values()
    linear_bits, linear_weights = _packed_size([m for m in packed if m not in tables])
    table_bits, table_weights = _packed_size(list({id(m.weight): m for m in tables}.values()))
    packed_ids = {id(t) for m in packed for t in m.held().values()}
    others = {id(t): t for t in _stored(model) if id(t) not in packed_ids}
    other_bits = sum(8 * t.numel() * t.element_size() for t in others.values())
    other_weights = sum(t.numel() for t in others.values())
    packed_bits, packed_weights = linear_bits + table_bits, linear_weights + table_weights
    stored_bits = packed_bits + _stored_bits(list(others.values()), stored_as)
    if folder is not None and (found := sorted(folder.glob("*.safetensors"))):
        stored_bits = 8 * sum(map(_payload, found))
    report = {
        "bits_linear": linear_bits / linear_weights if linear_weights else None,
        "bits_tables": table_bits / table_weights if table_weights else None,
        "bits_model": stored_bits / max(1, packed_weights + other_weights),
        "linear_weights": linear_weights,
        "table_weights": table_weights,
        "model_weights": packed_weights + other_weights,
        "weight_bytes": (packed_bits + other_bits) // 8,
    }
    if folder is not None:
        report["file_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return report


def stored_bytes(model: nn.Module, stored_as: torch.dtype | None = None) -> int:
    """Bytes of all tensors that a model's weight files hold, tied ones once; float ones as `stored_as`, if given."""
    return _stored_bits(list({id(t): t for t in _stored(model)}.values()), stored_as) // 8


def _packed_size(modules: list[PackedTensors]) -> tuple[int, int]:
    """Bits of the tensors as they are stored, and weights that they stand for."""
    bits = sum(8 * t.numel() * t.element_size() for m in modules for t in m.packed_state().values())
    return bits, sum(_weights(m) for m in modules)


def _stored_bits(tensors: list[Tensor], dtype: torch.dtype | None) -> int:
    sizes = [dtype.itemsize if dtype and t.is_floating_point() else t.element_size() for t in tensors]
    return sum(8 * t.numel() * size for t, size in zip(tensors, sizes, strict=True))


def _payload(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but its header, whose length the first eight bytes give."""
    with file.open("rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - header


def _stored(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        temporary = module._non_persistent_buffers_set
        yield from (b for name, b in module.named_buffers(recurse=False) if name not in temporary)


def _weights(module: PackedTensors) -> int:
    return getattr(module, "experts", 1) * module.out_features * module.in_features
