"""The seam between layers and arithmetic: every product with packed weights goes through here.

Signs in the order of the files are multiplied by the torch reference. Signs in tiles (`kernels/tiling.py`) go to the
native operators on a processor and to Triton's on a GPU, where they serve, and equal the reference of the same signs.
Codes of whole numbers have one order and go to the native operators where they serve.

Activations are "exact", with sums in float32, or "int8": rounded to whole numbers with one scale per token and
BLOCK inputs, by the native kernels and, on a processor, by the reference too. GPUs take all activations as exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_qep.kernels import reference, triton_sign
from hf_qep.kernels.native import DTYPES, kernels
from hf_qep.kernels.reference import rounded_activations, scaled_codes, scaled_signs, sign_linear
from hf_qep.kernels.tiling import TILE, untile

__all__ = [
    "factored_linear",
    "integer_linear",
    "scaled_codes",
    "scaled_signs",
    "sign_linear",
    "tiled_factored_linear",
    "tiled_sign_linear",
]

EXACT, INT8 = "exact", "int8"
ACTIVATIONS = {EXACT: 0, INT8: 1}
PANEL_TILES = 64
"""Tiles that are made dense at a time in a backward pass: 4,096 rows."""


def has_kernels(device: torch.device) -> bool:
    """Whether products with tiled signs have kernels there; the first call for the processor loads them."""
    if device.type == "cpu" and not triton_sign.INTERPRETED:
        return kernels().native
    return triton_sign.available(device)


def tile_height(words: Tensor) -> int:
    """Rows of a tile of these words (rows, k) where they are."""
    return TILE if words.device.type == "cpu" and not triton_sign.INTERPRETED else max(words.shape[0], 1)


def tiled_sign_linear(
    x: Tensor,
    tiles: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str = EXACT,
) -> Tensor:
    """x (..., in) float -> (..., out) of the same dtype.

    tiles int32 (ceil(out/height), ceil(in/32), height); row_scale float16 (out, 1), or tiled as the signs are.
    """
    if _on_gpu(x) and triton_sign.serves(x, row_scale.shape[1] if row_scale.dim() == 3 else 1):
        scale = row_scale[0].t() if row_scale.dim() == 3 else row_scale
        return triton_sign.sign_linear(x, tiles[0], scale, column_scale, bias)
    operator = kernels().sign_linear
    if operator is None or not _serves(x):
        x, rows = rounded_if(x, activation, column_scale, _group(x, row_scale)), _rows(row_scale, out_features)
        return sign_linear(x, untile(tiles, out_features), rows, column_scale, bias)
    bias = _like(bias, x)
    if _needs_grad(x, bias):
        return _TiledSign.apply(x, tiles, row_scale, column_scale, bias, out_features, ACTIVATIONS[activation])
    return operator(x, tiles, row_scale, column_scale, bias, out_features, ACTIVATIONS[activation])


def tiled_factored_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    row: Tensor,
    middle: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str = EXACT,
) -> Tensor:
    """x (..., in) -> (..., out).  left tiled for (out, rank), right for (rank, in); scales float16 vectors."""
    if _on_gpu(x) and triton_sign.serves(x):
        return triton_sign.factored_linear(x, left[0], right[0], row, middle, column, bias)
    operator = kernels().factored_linear
    if operator is None or not _serves(x):
        words = untile(left, row.shape[0]), untile(right, middle.shape[0])
        return factored_linear(x, *words, row, middle, column, bias, activation)
    bias = _like(bias, x)
    if _needs_grad(x, bias):
        return _TiledFactored.apply(x, left, right, row, middle, column, bias, ACTIVATIONS[activation])
    return operator(x, left, right, row, middle, column, bias, ACTIVATIONS[activation])


def factored_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    row: Tensor,
    middle: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str = EXACT,
) -> Tensor:
    """x (..., in) -> (..., out), signs in the order of the files, see kernels/reference.py."""
    if activation == EXACT or x.is_cuda:
        return reference.factored_linear(x, left, right, row, middle, column, bias)
    inner = sign_linear(rounded_activations(x, column), right, _ones(middle), column, None)
    return sign_linear(rounded_activations(inner, middle), left, row.unsqueeze(-1), middle, bias)


def integer_linear(
    x: Tensor, words: Tensor, bits: int, groups: int, bias: Tensor | None, activation: str = EXACT
) -> Tensor:
    """x (..., in) float -> (..., out) of the same dtype.  words int32 (out, scales and codes).

    Groups that are no whole blocks of 128 inputs have exact activations in either mode.
    """
    if groups > 1 and x.shape[-1] // groups % reference.BLOCK:
        activation = EXACT
    operator = kernels().integer_linear
    if operator is None or not _serves(x) or not words.is_contiguous() or _needs_grad(x, bias):
        x = rounded_if(x, activation, None, x.shape[-1] // groups)
        return reference.integer_linear(x, words, bits, groups, bias)
    return operator(x, words, _like(bias, x), bits, groups, ACTIVATIONS[activation])


def rounded_if(x: Tensor, activation: str, scale: Tensor | None, group: int | None = None) -> Tensor:
    """x, or what the int8 kernels see of it once it was multiplied by the column scale."""
    return rounded_activations(x, scale, group) if activation == INT8 and not x.is_cuda else x


def _serves(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in DTYPES and not triton_sign.INTERPRETED


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda or triton_sign.INTERPRETED


def _needs_grad(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def _group(x: Tensor, row_scale: Tensor) -> int:
    return x.shape[-1] // (row_scale.shape[1] if row_scale.dim() == 3 else 1)


def _rows(row_scale: Tensor, out_features: int) -> Tensor:
    return untile(row_scale, out_features) if row_scale.dim() == 3 else row_scale


def _ones(scale: Tensor) -> Tensor:
    return scale.new_ones(scale.shape[0], 1)


# ---- gradients of the inputs ----


class _TiledSign(torch.autograd.Function):
    """No dense weight is kept for the backward pass; it is made again, a panel of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tiles: Tensor, row_scale: Tensor, column_scale: Any, bias: Any, out: int, how: int
    ):
        ctx.save_for_backward(tiles, row_scale, column_scale)
        ctx.columns, ctx.out = x.shape[-1], out
        return kernels().sign_linear(x, tiles, row_scale, column_scale, bias, out, how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tiles, row_scale, column_scale = ctx.saved_tensors
        into = _backward(gradient, tiles, _rows(row_scale, ctx.out), column_scale, ctx.columns)
        return into, None, None, None, _bias_gradient(ctx, 4, gradient), None, None


class _TiledFactored(torch.autograd.Function):
    """As _TiledSign, through both matrices."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        row: Tensor,
        middle: Tensor,
        column: Tensor,
        bias: Any,
        how: int,
    ):
        ctx.save_for_backward(left, right, row, middle, column)
        ctx.columns = x.shape[-1]
        return kernels().factored_linear(x, left, right, row, middle, column, bias, how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        left, right, row, middle, column = ctx.saved_tensors
        inner = _backward(gradient, left, row.unsqueeze(-1), middle, middle.shape[0])
        into = _backward(inner, right, _ones(middle), column, ctx.columns)
        return into, None, None, None, None, None, _bias_gradient(ctx, 6, gradient), None


def _backward(gradient: Tensor, tiles: Tensor, rows: Tensor, column_scale: Tensor | None, columns: int) -> Tensor:
    """gradient (..., out) times the dense weight -> (..., columns)."""
    total = gradient.new_zeros(*gradient.shape[:-1], columns)
    for first in range(0, tiles.shape[0], PANEL_TILES):
        scale = rows[first * TILE : (first + PANEL_TILES) * TILE]
        words = untile(tiles[first : first + PANEL_TILES], scale.shape[0])
        dense = scaled_signs(words, columns, scale, column_scale, gradient.dtype)
        total += gradient[..., first * TILE : first * TILE + scale.shape[0]] @ dense
    return total


def _bias_gradient(ctx: Any, position: int, gradient: Tensor) -> Tensor | None:
    return gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[position] else None
