"""Format `sign`: one sign per weight, scales per row or row group and, optionally, per column.

    W[i, j] = weight_scale[i, j // group] * column_scale[j] * (+1 or -1)

    tensor         dtype    shape                     stored bits
    weight         int32    (out, ceil(in/32))        32 ceil(in/32) out     bit order: hf_qep.bitorder
    weight_scale   float16  (out, in/group or 1)      16 out (in/group or 1)
    column_scale   float16  (in,)                     16 in                  only with `column_scale`

The packed tensor is called `weight` so that a loader which does not know the format fails on its shape.
With group 128 and no column scale this is llama.cpp's Q1_0 in another arrangement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_qep.bitorder import WORD, pack_signs, unpack_signs, words_for
from hf_qep.errors import ConfigError, NonFiniteError
from hf_qep.kernels import dispatch, tiling

NAME = "sign"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """Options of the format; stored per layer group in config.json."""

    group_size: int | None = None
    """Columns that share a row's scale; None: the whole row."""
    column_scale: bool = False
    """One more scale per column."""
    format: str = NAME

    def __post_init__(self) -> None:
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"group_size must be None or a whole number of at least 1, not {size!r}")
        if not isinstance(self.column_scale, bool):
            raise ConfigError(f"column_scale must be true or false, not {self.column_scale!r}")


def layout(spec: Spec, out_features: int, in_features: int) -> dict[str, tuple[Shape, torch.dtype]]:
    """Tensors of one linear. Raises ConfigError if the group size does not divide the width."""
    tensors = {
        "weight": ((out_features, words_for(in_features)), torch.int32),
        "weight_scale": ((out_features, groups(spec, in_features)), torch.float16),
    }
    if spec.column_scale:
        tensors["column_scale"] = ((in_features,), torch.float16)
    return tensors


def groups(spec: Spec, in_features: int) -> int:
    """Scales per row."""
    if spec.group_size is None:
        return 1
    if in_features % spec.group_size:
        raise ConfigError(
            f"group size {spec.group_size} does not divide the layer width {in_features}; "
            "choose a divisor of every width or leave it out for one scale per row"
        )
    return in_features // spec.group_size


def pack(parts: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """parts: signs bool (out, in), True = +1; row_scale (out, groups); column_scale (in,) if the spec has one."""
    tensors = {"weight": pack_signs(parts["signs"]), "weight_scale": to_half(parts["row_scale"], "row scale")}
    if spec.column_scale:
        tensors["column_scale"] = to_half(parts["column_scale"], "column scale")
    return tensors


def unpack(tensors: dict[str, Tensor], spec: Spec, out_features: int, in_features: int) -> dict[str, Tensor]:
    """Inverse of `pack`, scales as float32."""
    parts = {
        "signs": unpack_signs(tensors["weight"], in_features, torch.int8) > 0,
        "row_scale": tensors["weight_scale"].float(),
    }
    if spec.column_scale:
        parts["column_scale"] = tensors["column_scale"].float()
    return parts


def assemble(parts: dict[str, Tensor]) -> Tensor:
    """Dense float32 weight (out, in) of parts as `unpack` gives them, but signs as float +1 and -1; differentiable."""
    rows = parts["row_scale"]
    dense = (parts["signs"].unflatten(-1, (rows.shape[-1], -1)) * rows.unsqueeze(-1)).flatten(-2)
    return dense * parts["column_scale"] if "column_scale" in parts else dense


def dequantize(
    tensors: dict[str, Tensor], spec: Spec, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Dense weight (out, in) of `dtype`."""
    return dispatch.scaled_signs(
        tensors["weight"], in_features, tensors["weight_scale"], tensors.get("column_scale"), dtype
    )


def linear(
    x: Tensor, tensors: dict[str, Tensor], spec: Spec, bias: Tensor | None, activation: str = dispatch.EXACT
) -> Tensor:
    """x (..., in) -> (..., out).  activation: "exact" or "int8", see kernels/dispatch.py."""
    x = dispatch.rounded_if(x, activation, tensors.get("column_scale"), spec.group_size)
    return dispatch.sign_linear(x, tensors["weight"], tensors["weight_scale"], tensors.get("column_scale"), bias)


def tile(tensors: dict[str, Tensor], spec: Spec) -> dict[str, Tensor] | None:
    """The tensors in the order of the native kernels, or None where those do not serve: groups of odd sizes."""
    if spec.group_size is not None and spec.group_size % WORD:
        return None
    words, scale = tensors["weight"], tensors["weight_scale"]
    height = dispatch.tile_height(words)
    scale = tiling.tile(scale, height) if scale.shape[1] > 1 else scale
    return tensors | {"weight": tiling.tile(words, height), "weight_scale": scale}


def untile(tensors: dict[str, Tensor], spec: Spec, out_features: int) -> dict[str, Tensor]:
    """Inverse of `tile`."""
    scale = tensors["weight_scale"]
    rows = tiling.untile(scale, out_features) if scale.dim() == 3 else scale
    return tensors | {"weight": tiling.untile(tensors["weight"], out_features), "weight_scale": rows}


def tiled_linear(
    x: Tensor, tensors: dict[str, Tensor], spec: Spec, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    """`linear` of what `tile` gave."""
    column = tensors.get("column_scale")
    return dispatch.tiled_sign_linear(
        x, tensors["weight"], tensors["weight_scale"], column, bias, out_features, activation
    )


def stored_bits(spec: Spec, out_features: int, in_features: int) -> int:
    """Bits of all tensors of one linear, padding and scales included."""
    return bits_of(layout(spec, out_features, in_features))


def bits_of(tensors: dict[str, tuple[Shape, torch.dtype]]) -> int:
    """Bits of a layout."""
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in tensors.values())


def to_half(scale: Tensor, what: str) -> Tensor:
    """float16 copy. Raises NonFiniteError if a value is not finite there (above 65504, or NaN)."""
    half = scale.to(torch.float16)
    if not torch.isfinite(half).all():
        raise NonFiniteError(
            f"a {what} of {scale.abs().max().item():.3g} cannot be stored as float16 (limit 65504); "
            "the layer's weights are too large or not finite"
        )
    return half.contiguous()
