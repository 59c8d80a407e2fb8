"""Products with packed signs on an NVIDIA GPU, in Triton.  Checked in Triton's interpreter and by compiling for sm_80
and sm_90; never run or timed on a GPU, so every block size and threshold below is a guess that autotuning corrects.

The words are those of the checkpoint, transposed once at load by `tiling.k_major`, so that neighbouring threads, which
own neighbouring rows of the weight, read neighbouring words.  Triton is imported at the first product, not with this
file; the two operators are registered with this file, so that torch.compile never has to trace that.

    up to FEW_TOKENS   `_gemv`  the sign bit of x is flipped by one xor and added in float32, scales come in once per
                                word; long rows are split over programs and their sums added in a fixed order
    more               `_gemm`  a tile of signs (times the column scale) in the dtype of x on the left of `tl.dot`
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_qep.bitorder import WORD, words_for
from hf_qep.errors import ConfigError
from hf_qep.extras import require

if TYPE_CHECKING:
    import triton.language as tl

FEW_TOKENS = 4
"""Up to so many tokens the arithmetic without tensor cores is used; their smallest tile has 16."""
SPLIT_WORDS, MAX_SPLIT = 32, 8
"""A row is split over programs only if each gets so many words, and at most so often."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels as numpy on CPU tensors, for tests; Triton reads the variable when it is imported."""


def available(device: torch.device) -> bool:
    """Whether these products can run there: triton installed and an NVIDIA GPU from sm_80 on (bfloat16 and tf32)."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return INTERPRETED and device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def serves(x: Tensor, groups: int = 1) -> bool:
    """Whether `sign_linear` takes x (..., in) with so many scales per row: a float dtype of DTYPES, no gradient wanted,
    and groups of whole words.  Ask `available` about the device once, at load.
    """
    whole = groups == 1 or (x.shape[-1] % groups == 0 and x.shape[-1] // groups % WORD == 0)
    return whole and x.dtype in DTYPES and not (torch.is_grad_enabled() and x.requires_grad)


def sign_linear(
    x: Tensor, kwords: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`reference.sign_linear` over `tiling.k_major` words: x (..., in) -> (..., out) of its dtype, summed in float32.

    kwords int32 (ceil(in/32), out); row_scale (out, groups), column_scale (in,), bias (out,), each of any float dtype.
    Inference only; works under torch.compile, and in CUDA graphs after one call outside (it compiles and tunes).
    Raises ConfigError for shapes or dtypes it does not serve.
    """
    return torch.ops.hf_qep.triton_sign_linear(x, kwords, row_scale, column_scale, bias)


def factored_linear(
    x: Tensor, left: Tensor, right: Tensor, row: Tensor, middle: Tensor, column: Tensor, bias: Tensor | None
) -> Tensor:
    """`reference.factored_linear` over `tiling.k_major` words, in two launches with the inner vector in float32.

    x (..., in) -> (..., out).  left = k_major of (out, rank) signs, right = k_major of (rank, in) signs; row (out,),
    middle (rank,), column (in,), bias (out,).  Otherwise as `sign_linear`.
    """
    return torch.ops.hf_qep.triton_factored_linear(x, left, right, row, middle, column, bias)


# Kernels. Plain functions until `_kernels` hands them to triton and puts `tl` into this module's globals.  Capitals are
# compile-time constants.


def _gemv(
    y, x, words, scale, column_scale, bias, tokens, rows, columns, row_step, group_step,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, GROUP_WORDS: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (SPLIT, tokens, rows) of x (PARTS, tokens, columns), whose parts are added first.

    Bits are the first axis of the tile and rows of the weight the last: a thread then owns whole words and adds their
    32 terms without talking to others; the warps' shares meet once, after the loop.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    j = tl.arange(0, 32)
    total = tl.zeros((BM, BW, BN), tl.float32)
    nwords = tl.cdiv(columns, 32)
    for first in range(tl.program_id(1) * BW, nwords, SPLIT * BW):
        k = first + tl.arange(0, BW)
        inside = (k[:, None] < nwords) & (n[None, :] < rows)
        word = tl.load(words + k[:, None] * rows + n[None, :], mask=inside, other=0)
        at = k[None, :] * 32 + j[:, None]
        wanted = (m[None, :, None] < tokens) & (at[:, None, :] < columns)
        place = m[None, :, None] * columns + at[:, None, :]
        xv = tl.load(x + place, mask=wanted, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            xv += tl.load(x + part * tokens * columns + place, mask=wanted, other=0.0).to(tl.float32)
        if column_scale is not None:
            xv *= tl.load(column_scale + at, mask=at < columns, other=0.0).to(tl.float32)[:, None, :]
        minus = ((~word)[None, :, :] << (31 - j)[:, None, None]) & -2147483648
        terms = xv.to(tl.int32, bitcast=True)[:, :, :, None] ^ minus[:, None, :, :]
        sums = tl.sum(terms.to(tl.float32, bitcast=True), axis=0)
        if GROUP_WORDS:
            unit = scale + (k // GROUP_WORDS)[:, None] * group_step + n[None, :] * row_step
            sums *= tl.load(unit, mask=inside, other=0.0).to(tl.float32)[None, :, :]
        total += sums
    out = tl.sum(total, axis=1)
    if scale is not None and not GROUP_WORDS and SPLIT == 1:
        out *= tl.load(scale + n * row_step, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    if bias is not None and SPLIT == 1:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(1) * tokens + m[:, None]) * rows + n[None, :]
    tl.store(y + place, out, mask=(m[:, None] < tokens) & (n[None, :] < rows))


def _finish(y, parts, scale, bias, tokens, rows, row_step, SPLIT: tl.constexpr, BN: tl.constexpr):
    """y (tokens, rows): the parts (SPLIT, tokens, rows) added in order, then scale and bias."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1)
    out = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(SPLIT):
        out += tl.load(parts + (part * tokens + token) * rows + n, mask=n < rows, other=0.0)
    if scale is not None:
        out *= tl.load(scale + n * row_step, mask=n < rows, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + token * rows + n, out, mask=n < rows)


def _gemm(
    y, x, words, scale, column_scale, bias, tokens, rows, columns, row_step, group_step,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, GROUP_WORDS: tl.constexpr,
    UNROLL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (tokens, rows) of x (tokens, columns), whose dtype has WIDTH bits.

    The weight is the left operand: what is unpacked into registers can stay there on Hopper.  The column scale rides
    on the sign, where float16 holds it exactly, and not on x, which it could push beyond float16.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)  # tokens * columns may pass 2^31
    j = tl.arange(0, 32)
    acc = tl.zeros((BN, BM), tl.float32)
    nwords = tl.cdiv(columns, 32)
    for first in range(0, nwords, UNROLL):
        part = tl.zeros((BN, BM), tl.float32) if GROUP_WORDS else acc
        for word in tl.static_range(UNROLL):
            k = first + word
            there = tl.minimum(k, nwords - 1) * rows + n  # beyond the last word every x is 0
            minus = ~tl.load(words + there, mask=n < rows, other=0)[None, :] >> j[:, None]
            at = k * 32 + j
            if column_scale is not None:
                unit = tl.load(column_scale + at, mask=at < columns, other=0.0).to(x.dtype.element_ty)
            else:
                unit = tl.full((32,), 1.0, x.dtype.element_ty)
            if WIDTH == 16:  # of `minus` only the lowest bit is left
                weight = unit.to(tl.int16, bitcast=True)[:, None] ^ (minus.to(tl.int16) << 15)
            else:
                weight = unit.to(tl.int32, bitcast=True)[:, None] ^ (minus << 31)
            weight = tl.trans(weight.to(x.dtype.element_ty, bitcast=True))
            wanted = (m[None, :] < tokens) & (at[:, None] < columns)
            xv = tl.load(x + m[None, :] * columns + at[:, None], mask=wanted, other=0.0)
            if WIDEN:
                weight, xv = weight.to(tl.float32), xv.to(tl.float32)
            part = tl.dot(weight, xv, part, input_precision=PRECISION)
        if GROUP_WORDS:
            unit = scale + (first // GROUP_WORDS) * group_step + n * row_step
            acc += part * tl.load(unit, mask=n < rows, other=0.0).to(tl.float32)[:, None]
        else:
            acc = part
    if scale is not None and not GROUP_WORDS:
        acc *= tl.load(scale + n * row_step, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * rows + n[:, None], acc, mask=(m[None, :] < tokens) & (n[:, None] < rows))


GEMV_TILES = ((32, 8), (64, 4), (64, 8), (128, 8))
"""Rows of the weight per program, warps."""
GEMM_TILES = ((64, 4, 3), (128, 8, 3), (128, 8, 2))
"""Rows of the weight per program, warps, stages of the load pipeline.  128 rows to 4 warps spill registers."""


@lru_cache(maxsize=1)
def _kernels() -> SimpleNamespace:
    """Raises ExtraMissingError if triton is not installed."""
    triton = require("gpu", "triton")
    globals()["tl"] = require("gpu", "triton.language")

    def build(function: Callable, tiles: tuple[tuple[int, ...], ...]) -> Callable:
        kernel = triton.jit(function, do_not_specialize=["tokens"])
        if INTERPRETED:  # nothing to time; one size for all
            return lambda grid, *args, **sizes: kernel[grid({"BN": 64})](*args, BN=64, **sizes)
        names = ("num_warps", "num_stages")
        configs = [triton.Config({"BN": rows}, **dict(zip(names, more, strict=False))) for rows, *more in tiles]
        kernel = triton.autotune(configs, key=["rows", "columns", "BM", "GROUP_WORDS"])(kernel)
        return lambda grid, *args, **sizes: kernel[grid](*args, **sizes)

    finish = triton.jit(_finish)
    return SimpleNamespace(gemv=build(_gemv, GEMV_TILES), gemm=build(_gemm, GEMM_TILES), finish=finish)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _splits(rows: int, nwords: int, device: torch.device) -> int:
    """Programs that share one row: a power of two that fills the GPU about four times with 64 rows per program."""
    wanted = min(MAX_SPLIT, 4 * _processors(device) // -(-rows // 64), nwords // SPLIT_WORDS)
    return 1 << max(wanted, 1).bit_length() - 1


def _few(
    x: Tensor,
    kwords: Tensor,
    scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """x (parts, tokens, in) -> (tokens, out) of `dtype`; or, without a dtype, float32 parts (split, tokens, out)."""
    (parts, tokens, columns), (nwords, rows) = x.shape, kwords.shape
    split = _splits(rows, nwords, x.device) if dtype is None or parts == 1 else 1  # at most two launches if factored
    y = x.new_empty(split, tokens, rows, dtype=dtype if dtype is not None and split == 1 else torch.float32)
    row_step, group_step, group_words = _steps(scale, columns)
    kernels = _kernels()
    kernels.gemv(
        lambda meta: (-(-rows // meta["BN"]), split),
        y, x, kwords, scale, column_scale, bias, tokens, rows, columns, row_step, group_step,
        PARTS=parts, SPLIT=split, GROUP_WORDS=group_words, BM=1 << (tokens - 1).bit_length(), BW=8,
    )  # fmt: skip
    if dtype is None:
        return y
    if split == 1:
        return y[0]
    out = x.new_empty(tokens, rows, dtype=dtype)
    row_scale = None if group_words else scale
    kernels.finish[(-(-rows // 256), tokens)](out, y, row_scale, bias, tokens, rows, row_step, SPLIT=split, BN=256)
    return out


def _many(
    x: Tensor,
    kwords: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    precise: bool,
) -> Tensor:
    """x (tokens, in) -> (tokens, out) of `dtype`; float32 x keeps its 24 bits only if `precise`, else tf32's 11."""
    (tokens, columns), rows = x.shape, kwords.shape[1]
    y = x.new_empty(tokens, rows, dtype=dtype)
    row_step, group_step, group_words = _steps(scale, columns)
    block = min(max(16, 1 << (tokens - 1).bit_length()), 128 if x.itemsize == 2 else 64)
    _kernels().gemm(
        lambda meta: (-(-rows // meta["BN"]), -(-tokens // block)),
        y, x, kwords, scale, column_scale, bias, tokens, rows, columns, row_step, group_step,
        WIDTH=8 * x.itemsize, PRECISION="tf32x3" if precise else "tf32", GROUP_WORDS=group_words,
        WIDEN=INTERPRETED and x.dtype == torch.bfloat16,  # numpy has no bfloat16; its bits would be multiplied
        UNROLL=math.gcd(group_words, 4 if block <= 32 else 2), BM=block,
    )  # fmt: skip
    return y


def _steps(scale: Tensor | None, columns: int) -> tuple[int, int, int]:
    """Strides of the scale over rows and groups, and words per group; 0 words: one scale per row."""
    if scale is None:
        return 1, 1, 0
    if scale.dim() == 1 or scale.shape[1] == 1:
        return scale.stride(0), 1, 0
    return scale.stride(0), scale.stride(1), columns // scale.shape[1] // WORD


# Operators.


def _sign_linear(
    x: Tensor, kwords: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    _check(x, kwords, row_scale, column_scale, x.shape[-1])
    flat, column_scale, bias = x.reshape(-1, x.shape[-1]).contiguous(), _whole(column_scale), _whole(bias)
    with _on(x):
        if not len(flat):
            return _fake(x, kwords)
        if len(flat) <= FEW_TOKENS:
            y = _few(flat.unsqueeze(0), kwords, row_scale, column_scale, bias, x.dtype)
        else:
            y = _many(flat, kwords, row_scale, column_scale, bias, x.dtype, x.dtype == torch.float32)
    return y.view(*x.shape[:-1], kwords.shape[1])


def _factored_linear(
    x: Tensor, left: Tensor, right: Tensor, row: Tensor, middle: Tensor, column: Tensor, bias: Tensor | None
) -> Tensor:
    _check(x, right, middle, column, x.shape[-1])
    _check(x, left, row, middle, right.shape[1])
    flat, column, bias = x.reshape(-1, x.shape[-1]).contiguous(), _whole(column), _whole(bias)
    with _on(x):
        if not len(flat):
            return _fake(x, left)
        if len(flat) <= FEW_TOKENS:  # the second launch adds the parts of the first and takes the middle as its columns
            inner = _few(flat.unsqueeze(0), right, None, column, None, None)
            y = _few(inner, left, row, _whole(middle), bias, x.dtype)
        else:
            precise = x.dtype == torch.float32
            inner = _many(flat, right, middle, column, None, torch.float32, precise)
            y = _many(inner, left, row, None, bias, x.dtype, precise)
    return y.view(*x.shape[:-1], left.shape[1])


def _check(x: Tensor, kwords: Tensor, scale: Tensor, column_scale: Tensor | None, columns: int) -> None:
    """A wrong shape would be read beyond its end."""
    if kwords.dtype != torch.int32 or not kwords.is_contiguous() or kwords.shape[0] != words_for(columns):
        raise ConfigError(
            f"the packed signs are {kwords.dtype} {tuple(kwords.shape)} and an input of {columns} needs contiguous "
            f"int32 ({words_for(columns)}, out); prepare them with k_major"
        )
    if scale.shape[0] != kwords.shape[1] or (column_scale is not None and column_scale.shape != (columns,)):
        raise ConfigError(
            f"the scales are {tuple(scale.shape)} and {None if column_scale is None else tuple(column_scale.shape)} "
            f"for signs of {kwords.shape[1]} x {columns}"
        )
    if not serves(x.detach(), 1 if scale.dim() == 1 else scale.shape[1]):
        raise ConfigError(
            f"no Triton product of {x.dtype} {tuple(x.shape)} with scales {tuple(scale.shape)}: it needs float16, "
            f"bfloat16 or float32 and groups of a multiple of {WORD} columns"
        )


def _whole(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _fake(x: Tensor, kwords: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], kwords.shape[1])


_LIBRARY = torch.library.Library("hf_qep", "FRAGMENT")
for _name, _arguments, _function in (
    ("triton_sign_linear", "Tensor x, Tensor kwords, Tensor row_scale, Tensor? column_scale", _sign_linear),
    ("triton_factored_linear", "Tensor x, Tensor left, Tensor right, Tensor row, Tensor middle, Tensor column",
     _factored_linear),
):  # fmt: skip
    _LIBRARY.define(f"{_name}({_arguments}, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _function, "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"hf_qep::{_name}", _fake, lib=_LIBRARY)
