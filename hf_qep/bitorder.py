"""Signs and small whole numbers as bits: the one place that knows the order.

Bit j of word w is the sign of column 32 w + j: 1 = +1, 0 = -1.  Words are int32, little endian, so byte k of a row
holds columns 8k .. 8k+7 with the lowest column in the lowest bit (`numpy.packbits(..., bitorder="little")` viewed as
int32).  Columns beyond the last are 0 bits.

A code of b bits (b divides 8) is stored as code + 2^(b-1), which is not negative, in the same order: the lowest column
in the lowest b bits of a byte.  A row of codes has its float16 scales in front, two to a word, the first in the lower
half.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WORD = 32


def words_for(columns: int, bits: int = 1) -> int:
    """Words that hold `columns` signs, or codes of so many bits."""
    return -(-columns * bits // WORD)


def pack_signs(positive: Tensor) -> Tensor:
    """bool (..., columns), True = +1 -> int32 (..., ceil(columns/32))."""
    columns = positive.shape[-1]
    padding = words_for(columns) * WORD - columns
    bits = torch.nn.functional.pad(positive.to(torch.uint8), (0, padding)).unflatten(-1, (-1, 8))
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack_signs(words: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """int32 (..., ceil(columns/32)) -> +-1 of `dtype`, (..., columns)."""
    octets = words.view(torch.uint8)
    if torch.compiler.is_compiling():  # inductor fuses this form into the consumer; in eager mode it is 8x the memory
        shifts = torch.arange(8, device=words.device, dtype=torch.uint8)
        signs = (((octets.unsqueeze(-1) >> shifts) & 1).to(dtype) * 2 - 1).flatten(-2)
    else:
        table = sign_table(words.device, dtype)
        signs = table.index_select(0, octets.flatten().int()).view(*words.shape[:-1], -1)
    return signs[..., :columns]


@lru_cache(maxsize=16)
def sign_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256, 8): the eight signs of every byte."""
    with torch.inference_mode(False):
        octets = torch.arange(256, device=device).unsqueeze(-1)
        return (((octets >> torch.arange(8, device=device)) & 1) * 2 - 1).to(dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 (..., columns), -2^(bits-1) <= code < 2^(bits-1) -> int32 (..., ceil(columns bits/32))."""
    columns, each = codes.shape[-1], 8 // bits
    padding = words_for(columns, bits) * (WORD // bits) - columns
    shifted = torch.nn.functional.pad((codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), (0, padding))
    places = 1 << bits * torch.arange(each, device=codes.device, dtype=torch.int16)
    return (shifted.unflatten(-1, (-1, each)) * places).sum(-1).to(torch.uint8).view(torch.int32)


def unpack_codes(words: Tensor, columns: int, bits: int) -> Tensor:
    """int32 (..., ceil(columns bits/32)) -> int8 (..., columns)."""
    octets = words.view(torch.uint8)
    if bits < 8:
        parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        octets = torch.stack(parts, -1).flatten(-2)
    # In a byte, subtracting wraps around: 0 - 128 is 128, which is -128 as int8.
    return (octets - (1 << (bits - 1)))[..., :columns].view(torch.int8)


def scale_words(groups: int) -> int:
    """Words that hold the float16 scales of one row of integer codes."""
    return -(-groups // 2)


def split_row(words: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """int32 (..., words) -> scales float16 (..., groups), words of codes int32 (..., rest). Views."""
    first = scale_words(groups)
    return words[..., :first].view(torch.float16)[..., :groups], words[..., first:]
