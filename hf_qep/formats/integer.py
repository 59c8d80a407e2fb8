"""Format `integer`: a whole number of 4 or 8 bits per weight and a scale per row or row group; rows stand alone.

    W[i, j] = scale[i, j // group] * code[i, j],   -2^(bits-1) <= code < 2^(bits-1)

    tensor   dtype   shape                                              stored bits
    weight   int32   (out, ceil(groups/2) + ceil(in bits/32))           32 of each word

A row is its scales, float16, two to a word with the first in the lower half, and behind them its codes; bit order:
hf_qep.bitorder.  A scale may be negative.  The format is made for tables of tokens: one read gathers a row with its
scales, and since there is only one tensor, a head that is tied to an embedding shares it under the names by which
transformers ties them.  There is no floating tensor that could be taken for the dtype of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_qep.bitorder import pack_codes, scale_words, split_row, unpack_codes, words_for
from hf_qep.errors import ConfigError
from hf_qep.formats.sign import Shape, bits_of, groups, to_half
from hf_qep.kernels import dispatch

NAME = "integer"
BITS = (4, 8)


@dataclass(frozen=True)
class Spec:
    """Options of the format; stored per layer group in config.json."""

    bits: int
    """Bits of a code."""
    group_size: int | None = None
    """Columns that share a row's scale; None: the whole row."""
    format: str = NAME

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise ConfigError(f"bits of format `{NAME}` must be one of {', '.join(map(str, BITS))}, not {self.bits!r}")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"group_size must be None or a whole number of at least 1, not {size!r}")


def layout(spec: Spec, out_features: int, in_features: int) -> dict[str, tuple[Shape, torch.dtype]]:
    """Tensors of one matrix. Raises ConfigError if the group size does not divide the width."""
    words = scale_words(groups(spec, in_features)) + words_for(in_features, spec.bits)
    return {"weight": ((out_features, words), torch.int32)}


def pack(parts: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """parts: codes int8 (out, in); row_scale (out, groups)."""
    half = to_half(parts["row_scale"], "row scale")
    scales = torch.nn.functional.pad(half, (0, half.shape[-1] % 2)).view(torch.int32)
    return {"weight": torch.cat([scales, pack_codes(parts["codes"], spec.bits)], -1)}


def unpack(tensors: dict[str, Tensor], spec: Spec, out_features: int, in_features: int) -> dict[str, Tensor]:
    """Inverse of `pack`, scales as float32."""
    words, count = tensors["weight"], groups(spec, in_features)
    scale, codes = split_row(words, count)
    return {"codes": unpack_codes(codes, in_features, spec.bits), "row_scale": scale.float()}


def assemble(parts: dict[str, Tensor]) -> Tensor:
    """Dense float32 weight (out, in) of parts as `unpack` gives them, but codes as float; differentiable."""
    rows = parts["row_scale"]
    return (parts["codes"].unflatten(-1, (rows.shape[-1], -1)) * rows.unsqueeze(-1)).flatten(-2)


def dequantize(
    tensors: dict[str, Tensor], spec: Spec, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Dense weight (out, in) of `dtype`."""
    return dispatch.scaled_codes(tensors["weight"], in_features, spec.bits, groups(spec, in_features), dtype)


def rows(ids: Tensor, tensors: dict[str, Tensor], spec: Spec, in_features: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (...) int64 of the dense weight, (..., in) of `dtype`; no other row is unpacked.

    An id that is out of range raises IndexError.
    """
    words = tensors["weight"].index_select(0, ids.flatten()).view(*ids.shape, -1)
    return dispatch.scaled_codes(words, in_features, spec.bits, groups(spec, in_features), dtype)


def linear(
    x: Tensor, tensors: dict[str, Tensor], spec: Spec, bias: Tensor | None, activation: str = dispatch.EXACT
) -> Tensor:
    """x (..., in) -> (..., out).  activation: "exact" or "int8", see kernels/dispatch.py."""
    return dispatch.integer_linear(x, tensors["weight"], spec.bits, groups(spec, x.shape[-1]), bias, activation)


def stored_bits(spec: Spec, out_features: int, in_features: int) -> int:
    """Bits of the tensor of one matrix, padding and scales included."""
    return bits_of(layout(spec, out_features, in_features))
