"""Format `factored`: two sign matrices through a rank r, with three vectors of scales.

    W = diag(weight_scale) S_left diag(middle_scale) S_right diag(column_scale)

    tensor         dtype    shape                     stored bits
    weight         int32    (rank, ceil(in/32))       S_right
    left           int32    (out, ceil(rank/32))      S_left; with `flat` (ceil(out rank/32),): row after row
    weight_scale   float16  (out,)                    16 out
    middle_scale   float16  (rank,)                   16 rank
    column_scale   float16  (in,)                     16 in

Bits per weight are about rank (out + in) / (out in), so any budget from 0.3 to 2.5 is a rank.
Double binary factorisation, arXiv 2505.11076.  The packed tensor that every format has is called `weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_qep.bitorder import WORD, pack_signs, unpack_signs, words_for
from hf_qep.errors import ConfigError
from hf_qep.formats.sign import Shape, bits_of, to_half
from hf_qep.kernels import dispatch, tiling

NAME = "factored"
OCTET = 8


@dataclass(frozen=True)
class Spec:
    """Options of the format; stored per layer group in config.json."""

    rank: int
    """Inner width of the two sign matrices."""
    flat: bool = False
    """Whether the rows of S_left follow one another without padding; needs a rank of whole bytes."""
    format: str = NAME

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if not isinstance(self.flat, bool) or (self.flat and self.rank % OCTET):
            raise ConfigError(f"flat must be true, with a rank that is a multiple of {OCTET} ({self.rank}), or false")


def without_padding(rank: int) -> Spec:
    """The spec that takes the least bits for a rank, a multiple of 8."""
    return Spec(rank, flat=rank % WORD != 0)


def layout(spec: Spec, out_features: int, in_features: int) -> dict[str, tuple[Shape, torch.dtype]]:
    """Tensors of one linear."""
    left = (words_for(out_features * spec.rank),) if spec.flat else (out_features, words_for(spec.rank))
    return {
        "weight": ((spec.rank, words_for(in_features)), torch.int32),
        "left": (left, torch.int32),
        "weight_scale": ((out_features,), torch.float16),
        "middle_scale": ((spec.rank,), torch.float16),
        "column_scale": ((in_features,), torch.float16),
    }


def pack(parts: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """parts: left bool (out, rank), right bool (rank, in), row_scale, middle_scale and column_scale vectors."""
    return {
        "weight": pack_signs(parts["right"]),
        "left": pack_signs(parts["left"].flatten() if spec.flat else parts["left"]),
        "weight_scale": to_half(parts["row_scale"], "row scale"),
        "middle_scale": to_half(parts["middle_scale"], "middle scale"),
        "column_scale": to_half(parts["column_scale"], "column scale"),
    }


def unpack(tensors: dict[str, Tensor], spec: Spec, out_features: int, in_features: int) -> dict[str, Tensor]:
    """Inverse of `pack`, scales as float32."""
    return {
        "left": unpack_signs(_left_rows(tensors, spec), spec.rank, torch.int8) > 0,
        "right": unpack_signs(tensors["weight"], in_features, torch.int8) > 0,
        "row_scale": tensors["weight_scale"].float(),
        "middle_scale": tensors["middle_scale"].float(),
        "column_scale": tensors["column_scale"].float(),
    }


def assemble(parts: dict[str, Tensor]) -> Tensor:
    """Dense float32 weight (out, in) of parts as `unpack` gives them, but signs as float +1 and -1; differentiable."""
    left = parts["row_scale"].unsqueeze(-1) * parts["left"] * parts["middle_scale"]
    return left @ (parts["right"] * parts["column_scale"])


def dequantize(
    tensors: dict[str, Tensor], spec: Spec, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Dense weight (out, in) of `dtype`, multiplied in float32."""
    row, middle = tensors["weight_scale"].unsqueeze(-1), tensors["middle_scale"].unsqueeze(-1)
    left = dispatch.scaled_signs(_left_rows(tensors, spec), spec.rank, row, None, torch.float32)
    right = dispatch.scaled_signs(tensors["weight"], in_features, middle, tensors["column_scale"], torch.float32)
    return (left @ right).to(dtype)


def linear(
    x: Tensor, tensors: dict[str, Tensor], spec: Spec, bias: Tensor | None, activation: str = dispatch.EXACT
) -> Tensor:
    """x (..., in) -> (..., out).  activation: "exact" or "int8", see kernels/dispatch.py."""
    row, middle, column = tensors["weight_scale"], tensors["middle_scale"], tensors["column_scale"]
    left = _left_rows(tensors, spec)
    return dispatch.factored_linear(x, left, tensors["weight"], row, middle, column, bias, activation)


def tile(tensors: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """The tensors in the order of the native kernels."""
    left, right = tiling.as_words(_left_rows(tensors, spec)), tensors["weight"]
    return tensors | {
        "weight": tiling.tile(right, dispatch.tile_height(right)),
        "left": tiling.tile(left, dispatch.tile_height(left)),
    }


def untile(tensors: dict[str, Tensor], spec: Spec, out_features: int) -> dict[str, Tensor]:
    """Inverse of `tile`."""
    left = tiling.untile(tensors["left"], out_features)
    if spec.flat:
        octets = left.view(torch.uint8)[:, : spec.rank // OCTET].flatten()
        left = tiling.as_words(octets)
    return tensors | {"weight": tiling.untile(tensors["weight"], spec.rank), "left": left}


def tiled_linear(
    x: Tensor, tensors: dict[str, Tensor], spec: Spec, bias: Tensor | None, out_features: int, activation: str
) -> Tensor:
    """`linear` of what `tile` gave."""
    scales = tensors["weight_scale"], tensors["middle_scale"], tensors["column_scale"]
    return dispatch.tiled_factored_linear(x, tensors["left"], tensors["weight"], *scales, bias, activation)


def _left_rows(tensors: dict[str, Tensor], spec: Spec) -> Tensor:
    """S_left with one row per output, (..., out, words or, if flat, bytes); a view of what is stored."""
    left, rows = tensors["left"], tensors["weight_scale"].shape[-1]
    if not spec.flat:
        return left
    width = spec.rank // OCTET
    return left.view(torch.uint8)[..., : rows * width].unflatten(-1, (rows, width))


def stored_bits(spec: Spec, out_features: int, in_features: int) -> int:
    """Bits of all tensors of one linear, padding and scales included."""
    return bits_of(layout(spec, out_features, in_features))
