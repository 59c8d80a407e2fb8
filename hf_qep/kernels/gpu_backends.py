"""Optional packages that multiply by the same packed signs on a GPU: gemlite.  Not tried on a GPU.

gemlite (0.6) knows codes q with W = (q - zero) * scale, so that a sign is q in {0, 1}, zero = 1/2 and scale = 2 a.  It
packs 32 one-bit codes of one row into an int32, the first column in the lowest bit, and stores the words (in/32, out):
our words transposed.  It adds the parts of a row by atomics in the dtype of the output (up to 64 tokens), so two runs
may differ in the last bits; `kernels/triton_sign.py` does not.  What stands here was checked against gemlite's own
packing and against the formulas of its kernels, on a CPU.

humming-kernels is left out.  Its symmetric one-bit integers are {-1, 0} and not {-1, +1}; signs would need its
floating zero points (dtype uint1, zero 1/2, scale 2 a, words as in the files), and nothing of that runs without a GPU
and a CUDA compiler.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.bitorder import WORD
from hf_qep.errors import ConfigError
from hf_qep.extras import require
from hf_qep.kernels.tiling import k_major

GEMLITE = "gemlite"
BACKENDS = (GEMLITE,)
GEMLITE_GROUP = 64
"""Smallest group: gemlite's kernels for few tokens load the scales once per two blocks of one word or more."""
GEMLITE_SPARE = 1024
"""Columns of scales kept behind the last: gemlite's kernels load a block of them without looking at the end."""
DTYPES = (torch.float16, torch.bfloat16)


def available(device: torch.device) -> tuple[str, ...]:
    """Names of the backends that can be used on this device."""
    return tuple(name for name in BACKENDS if why_not(name, device) is None)


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot be used on this device, in a sentence; None if it can. Imports nothing."""
    if name not in BACKENDS:
        return f"there is no backend {name!r}; there are {', '.join(BACKENDS)}"
    missing = [package for package in (name, "triton") if importlib.util.find_spec(package) is None]
    if missing:
        return f"the package `{missing[0]}` is not installed; run: pip install 'hf-qep[{name}]'"
    if device.type != "cuda":
        return f"{name} runs on a GPU and the device is {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} needs a GPU of compute capability 8.0 for bfloat16"
    return None


@dataclass(frozen=True)
class GemliteTensors:
    """What gemlite multiplies with: words int32 (in/32, out) and scales (groups, out).

    One group: W = (q - zeros) * scales, zeros (1,).  Several: W = q * scales + zeros, zeros (groups, out).
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int


def gemlite_tensors(words: Tensor, row_scale: Tensor, in_features: int) -> GemliteTensors:
    """Words int32 (out, in/32) and row_scale float16 (out, groups) as gemlite's buffers hold them.

    With one scale per row, scales are float32 and applied to the float32 sum; with groups they are float16, in which
    2 a - a is exact.  Raises ConfigError for shapes and scales that gemlite cannot hold.
    """
    out_features, groups = row_scale.shape
    group_size = in_features // groups
    if in_features % WORD or in_features % groups or group_size % WORD or group_size < GEMLITE_GROUP:
        raise ConfigError(
            f"gemlite cannot multiply by {out_features} x {in_features} signs in {groups} groups: it takes groups of a "
            f"multiple of {WORD} columns, at least {GEMLITE_GROUP}"
        )
    dtype = torch.float32 if groups == 1 else torch.float16
    spare = 1 + GEMLITE_SPARE // group_size
    room = row_scale.new_zeros(2, groups + spare, out_features, dtype=dtype)
    one, scales = room[0, :groups].copy_(row_scale.t()), room[1, :groups]
    torch.mul(one, 2, out=scales)
    if not torch.isfinite(scales).all():
        raise ConfigError(f"gemlite holds twice the scale, and {one.abs().max():.3g} is too large for that in float16")
    zeros = scales.new_full((1,), 0.5) if groups == 1 else one.neg_()
    return GemliteTensors(k_major(words), scales, zeros, group_size)


@dataclass(frozen=True)
class GemliteLinear:
    """A prepared layer, for `gemlite_linear`."""

    module: Any
    column_scale: Tensor | None
    dtype: torch.dtype


def prepare_gemlite(
    words: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
) -> GemliteLinear:
    """A layer for inputs of float16 or bfloat16.  Arguments as `reference.sign_linear`, on the GPU.

    Not tried on a GPU.  Raises ExtraMissingError without gemlite, ConfigError for dtypes and shapes it does not take.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"gemlite takes inputs of float16 and bfloat16, not {dtype}")
    tensors = gemlite_tensors(words, row_scale, in_features)
    gemlite = require(GEMLITE, GEMLITE)
    kind = gemlite.DType.FP16 if dtype == torch.float16 else gemlite.DType.BF16
    module = gemlite.GemLiteLinear(
        W_nbits=1,
        group_size=tensors.group_size,
        in_features=in_features,
        out_features=row_scale.shape[0],
        input_dtype=kind,
        output_dtype=kind,
    )
    # `pack` takes eight codes to a byte ready-made and sets the modes.  The tensors are then put in as gemlite packs
    # them itself, 32 codes to a word, but with one zero for all and with room behind the scales.
    scales = tensors.scales.t()
    module.pack(
        words.contiguous().view(torch.uint8),
        scales,
        torch.full_like(scales, 0.5),
        bias=None if bias is None else bias.to(dtype),
        contiguous=True,
        packing_bitwidth=8,
        packed=True,
    )
    module.W_q = nn.Parameter(tensors.words, requires_grad=False)
    module.elements_per_sample = WORD
    module.scales = nn.Parameter(tensors.scales, requires_grad=False)
    module.zeros = nn.Parameter(tensors.zeros, requires_grad=False)
    return GemliteLinear(module, None if column_scale is None else column_scale.to(dtype), dtype)


def gemlite_linear(x: Tensor, layer: GemliteLinear) -> Tensor:
    """x (..., in) of the layer's dtype -> (..., out) of the same.  Not tried on a GPU.

    A column scale is one more elementwise product, rounded to the dtype of x.
    """
    if x.dtype != layer.dtype:
        raise ConfigError(f"the layer was prepared for {layer.dtype} and the input is {x.dtype}")
    return layer.module(x if layer.column_scale is None else x * layer.column_scale)
