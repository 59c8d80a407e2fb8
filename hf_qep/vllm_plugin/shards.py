"""Parts of packed matrices: the tensors of W[rows, columns], in W's format, from the tensors of W.

    format     rows of W                   columns of W
    sign       weight, weight_scale        weight, weight_scale (by groups), column_scale
    factored   left, weight_scale          weight, column_scale;  W = L R, so every part keeps the whole rank
    integer    weight                      weight (scales and codes)

A part dequantises to exactly those entries of W.  With columns divided, outputs of the parts add up to the output of
W; for `factored` each part has the whole L, which is linear, so no middle has to be exchanged.  Dividing the rank
instead would need R x of all columns first: a second exchange for a smaller L.

Columns need not begin at a word of 32 signs: signs are then packed anew.  Groups that a part cuts become smaller ones
with the scale of the whole, or one scale per row where the part lies in a single group.

Nothing here knows vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_qep.bitorder import WORD, pack_signs, unpack_signs, words_for
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.formats import factored, integer, sign
from hf_qep.registry import FORMATS

Shape = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Which part of a matrix (out, in): rows of some ranges, one behind the other, and one range of columns."""

    rows: tuple[range, ...]
    columns: range

    @property
    def shape(self) -> Shape:
        """(out, in) of the part."""
        return sum(map(len, self.rows)), len(self.columns)


def whole(shape: Shape) -> Window:
    """All of a matrix (out, in)."""
    return Window((range(shape[0]),), range(shape[1]))


def divided(size: int, parts: int, part: int, what: str = "columns") -> range:
    """The `part`-th of equal parts of `size` things. Raises ConfigError if the parts cannot be equal."""
    if size % parts:
        raise ConfigError(f"{size} {what} cannot be divided among {parts} processes; choose a divisor of {size}")
    each = size // parts
    return range(part * each, (part + 1) * each)


def shard_spec(spec: Any, shape: Shape, window: Window) -> Any:
    """Spec of the part: its groups may be smaller than those of the whole.

    shape: (out, in) of the whole. Raises ConfigError if groups would have to be cut to less than whole words.
    """
    if spec.format == factored.NAME or spec.group_size is None:
        return spec
    return replace(spec, group_size=_group(spec.group_size, shape[1], window.columns))


def _group(size: int, width: int, columns: range) -> int | None:
    if columns.start // size == (columns.stop - 1) // size:
        return None if len(columns) < width else size
    shared = math.gcd(size, columns.start, columns.stop)
    if shared < size and shared % WORD:
        raise ConfigError(
            f"a group of {size} columns does not divide the shard of {len(columns)} from column {columns.start}, and "
            f"what they share, {shared}, is no multiple of {WORD}; serve with fewer processes, or quantise with a "
            f"group size that divides {len(columns)}"
        )
    return shared


def shard_tensor(leaf: str, tensor: Tensor, spec: Any, shape: Shape, window: Window) -> Tensor:
    """One tensor of the part, from the tensor of that name of the whole; it may be a view of it.

    leaf: name in `layout` of the format. spec, shape: of the whole.
    Raises CheckpointError if the tensor is not what the format stores for this shape.
    """
    check_tensor(leaf, tensor, spec, shape)
    return _SHARDS[spec.format](leaf, tensor, spec, shape, window)


def shard(tensors: dict[str, Tensor], spec: Any, shape: Shape, window: Window) -> dict[str, Tensor]:
    """All tensors of the part, which has the spec `shard_spec`."""
    return {leaf: shard_tensor(leaf, tensor, spec, shape, window) for leaf, tensor in tensors.items()}


def check_tensor(leaf: str, tensor: Tensor, spec: Any, shape: Shape) -> None:
    """Raise CheckpointError if a matrix (out, in) of this spec has no such tensor, or one of other shape or dtype."""
    size, dtype = FORMATS.get(spec.format).layout(spec, *shape).get(leaf, (None, None))
    if size is None:
        raise CheckpointError(f"there is a tensor `{leaf}`, which format `{spec.format}` does not have")
    if tuple(tensor.shape) != size or tensor.dtype != dtype:
        raise CheckpointError(
            f"`{leaf}` is {tensor.dtype} {tuple(tensor.shape)}, and a matrix {shape} of format `{spec.format}` has "
            f"{dtype} {size}; the config does not belong to these files, or heads and ranks do not match"
        )


def _sign(leaf: str, tensor: Tensor, spec: Any, shape: Shape, window: Window) -> Tensor:
    if leaf == "column_scale":
        return _span(tensor, window.columns)
    rows = _pick(tensor, window.rows)
    return _scales(rows, spec, shape, window) if leaf == "weight_scale" else _signs(rows, shape[1], window.columns)


def _scales(scale: Tensor, spec: Any, shape: Shape, window: Window) -> Tensor:
    """weight_scale (rows, groups of the whole) -> (rows, groups of the part)."""
    if spec.group_size is None:
        return scale
    size = shard_spec(spec, shape, window).group_size or len(window.columns)
    first = torch.arange(window.columns.start, window.columns.stop, size, device=scale.device)
    return scale.index_select(1, first // spec.group_size)


def _signs(words: Tensor, width: int, columns: range) -> Tensor:
    """Words (rows, k) of `width` columns -> words of those columns; bits behind the last are 0."""
    if len(columns) == width:
        return words
    if columns.start % WORD:
        return pack_signs(unpack_signs(words.contiguous(), width, torch.int8)[:, columns.start : columns.stop] > 0)
    part = words[:, columns.start // WORD : words_for(columns.stop)]
    spare = -columns.stop % WORD
    if not spare or columns.stop == width:
        return part
    part = part.clone()
    part[:, -1] &= (1 << (WORD - spare)) - 1
    return part


def _factored(leaf: str, tensor: Tensor, spec: Any, shape: Shape, window: Window) -> Tensor:
    if leaf == "weight":
        return _signs(tensor, shape[1], window.columns)
    if leaf == "column_scale":
        return _span(tensor, window.columns)
    if leaf == "weight_scale" or (leaf == "left" and not spec.flat):
        return _pick(tensor, window.rows)
    return tensor if leaf == "middle_scale" else _flat_rows(tensor, spec, shape[0], window.rows)


def _flat_rows(left: Tensor, spec: Any, count: int, rows: Sequence[range]) -> Tensor:
    """S_left without padding between rows: rows begin at bytes, and the last word is filled up with zero bits."""
    width = spec.rank // factored.OCTET
    octets = _pick(left.view(torch.uint8)[: count * width].view(count, width), rows).flatten()
    return torch.nn.functional.pad(octets, (0, -len(octets) % 4)).clone().view(torch.int32)


def _integer(leaf: str, tensor: Tensor, spec: Any, shape: Shape, window: Window) -> Tensor:
    rows = _pick(tensor, window.rows)
    if len(window.columns) == shape[1]:
        return rows
    parts = integer.unpack({leaf: rows}, spec, len(rows), shape[1])
    codes, scale = _span(parts["codes"], window.columns, -1), _scales(parts["row_scale"], spec, shape, window)
    return integer.pack({"codes": codes, "row_scale": scale}, spec)[leaf]


_SHARDS = {sign.NAME: _sign, factored.NAME: _factored, integer.NAME: _integer}


def pick(tensor: Tensor, window: Window) -> Tensor:
    """The part of a float matrix (out, in)."""
    return _span(_pick(tensor, window.rows), window.columns, 1)


def _pick(tensor: Tensor, rows: Sequence[range]) -> Tensor:
    """Rows of the ranges; a view if there is one range."""
    parts = [_span(tensor, each) for each in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _span(tensor: Tensor, span: range, dim: int = 0) -> Tensor:
    return tensor.narrow(dim, span.start, len(span))
