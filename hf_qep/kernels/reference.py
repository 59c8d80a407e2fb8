"""The meaning of every product with packed signs, in torch.  Any other backend must equal this one.

    scaled_signs      W[i, j] = row_scale[i, j // group] * sign[i, j] * column_scale[j]     rounded once, to `dtype`
    sign_linear       y = x W^T + bias
    factored_linear   y = a o (S_L (m o (S_R (b o x)))) + bias
    scaled_codes      W[i, j] = scale[i, j // group] * code[i, j]     rounded once, to `dtype`
    integer_linear    y = x W^T + bias
    rounded_activations   what int8 kernels see of x

Scales are float16 (or float32 while they are trained) and widened to float32 before they are multiplied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.bitorder import sign_table, split_row, unpack_codes, unpack_signs

PANEL_WEIGHTS = 1 << 24
"""Weights unpacked at a time: 64 MB of float32, so that a large layer never needs its dense form."""
BLOCK = 128
"""Inputs of a token that share a scale when they are rounded to int8."""
FEW_TOKENS = 4
"""Up to so many tokens the byte table beats unpacking: each token reads 1/8 of the entries a dense row has."""


def scaled_signs(
    words: Tensor, columns: int, row_scale: Tensor, column_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dense matrix (rows, columns) of `dtype`.  words int32 (rows, ceil(columns/32)); row_scale (rows, groups)."""
    signs, groups = unpack_signs(words, columns, torch.float32), row_scale.shape[-1]
    dense = _product(signs.unflatten(-1, (groups, -1)), row_scale.float().unsqueeze(-1)).flatten(-2)
    if column_scale is not None:
        dense = _product(dense, column_scale.float())
    return dense.to(dtype)


def _product(own: Tensor, scale: Tensor) -> Tensor:
    """own · scale, in place where no gradient needs `own`: a wide linear takes gigabytes."""
    return own * scale if torch.is_grad_enabled() and scale.requires_grad else own.mul_(scale)


def sign_linear(
    x: Tensor, words: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x (..., in) float -> (..., out) of the same dtype."""
    rows, columns = words.shape[0], x.shape[-1]
    tokens = x.numel() // max(columns, 1)
    if _byte_table_pays(x, tokens, words, row_scale):
        y = _byte_table_product(x.reshape(tokens, columns), words, row_scale, column_scale)
        y = y.to(x.dtype).view(*x.shape[:-1], rows)
        return y if bias is None else y + bias.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    panel = max(1, PANEL_WEIGHTS // max(columns, 1))
    if rows <= panel:
        return F.linear(x, scaled_signs(words, columns, row_scale, column_scale, x.dtype), bias)
    parts = [
        F.linear(x, scaled_signs(words[i : i + panel], columns, row_scale[i : i + panel], column_scale, x.dtype))
        for i in range(0, rows, panel)
    ]
    y = torch.cat(parts, -1)
    return y if bias is None else y + bias


def factored_linear(
    x: Tensor, left: Tensor, right: Tensor, row: Tensor, middle: Tensor, column: Tensor, bias: Tensor | None
) -> Tensor:
    """x (..., in) -> (..., out).  left int32 (out, ceil(rank/32)) or uint8 (out, rank/8), right int32
    (rank, ceil(in/32)).

    The three scales ride on the two sign products: b and m as column scales, a as the row scale.
    """
    ones = middle.new_ones(middle.shape[0], 1)
    inner = sign_linear(x, right, ones, column, None)
    return sign_linear(inner, left, row.unsqueeze(-1), middle, bias)


def scaled_codes(words: Tensor, columns: int, bits: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Dense rows (..., columns) of `dtype`.  words int32 (..., scales and codes), see formats/integer.py."""
    scale, packed = split_row(words, groups)
    codes = unpack_codes(packed, columns, bits).float()  # int8 times float is twice as slow
    return codes.unflatten(-1, (groups, -1)).mul_(scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def integer_linear(x: Tensor, words: Tensor, bits: int, groups: int, bias: Tensor | None) -> Tensor:
    """x (..., in) float -> (..., out) of the same dtype; as many rows are unpacked at a time as PANEL_WEIGHTS says."""
    columns = x.shape[-1]
    panels = words.split(max(1, PANEL_WEIGHTS // max(columns, 1)))
    parts = [F.linear(x, scaled_codes(panel, columns, bits, groups, x.dtype)) for panel in panels]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if bias is None else y + bias.to(x.dtype)


def rounded_activations(x: Tensor, column_scale: Tensor | None = None, group: int | None = None) -> Tensor:
    """x (..., in), rounded to whole numbers from -127 to 127 times one scale per token and block of inputs.

    column_scale: (in,) that multiplies x before it is rounded; the result is divided by it again. group: inputs that
    share a scale of the weights; blocks end where groups end.
    """
    scaled = x.float() if column_scale is None else x.float() * column_scale.float()
    parts = [_rounded(part) for part in scaled.split(group or scaled.shape[-1], -1)]
    rounded = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if column_scale is not None:
        rounded = torch.where(column_scale == 0, 0.0, rounded / column_scale.float())
    return rounded.to(x.dtype)


def _rounded(x: Tensor) -> Tensor:
    blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, blocks / step, 0.0).round()
    return (codes * step).flatten(-2)[..., : x.shape[-1]]


def _byte_table_pays(x: Tensor, tokens: int, words: Tensor, row_scale: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not 0 < tokens <= FEW_TOKENS:
        return False
    whole_bytes = x.shape[-1] == 8 * words.shape[-1] * words.itemsize and (x.shape[-1] // row_scale.shape[-1]) % 8 == 0
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or row_scale.requires_grad)
    return whole_bytes and not needs_grad and words.shape[0] * x.shape[-1] >= 1 << 20


def _byte_table_product(x: Tensor, words: Tensor, row_scale: Tensor, column_scale: Tensor | None) -> Tensor:
    """float32 (tokens, rows): the 256 sums of every eight inputs once, then one gather and a row sum per token."""
    x = x.float() if column_scale is None else x.float() * column_scale.float()
    octets = words.view(torch.uint8)
    index = (octets.int() + 256 * torch.arange(octets.shape[1], dtype=torch.int32)).flatten()
    signs = sign_table(x.device, torch.float32).t()
    out = x.new_empty(x.shape[0], words.shape[0])
    for token, row in enumerate(x):
        sums = (row.view(-1, 8) @ signs).flatten().index_select(0, index).view(*row_scale.shape, -1).sum(-1)
        out[token] = (sums * row_scale.float()).sum(-1)
    return out
