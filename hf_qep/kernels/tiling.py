"""The order in which the native kernels read signs: tiles of 64 rows, one linear stream per tile.

    words  (rows, w)       ->  (ceil(rows/64), w, 64)         one step = 64 rows x 32 columns = 256 bytes
    scales (rows, groups)  ->  (ceil(rows/64), groups, 64)

A lane of a register is then a row, so nothing is summed across lanes. Files keep the order of `hf_qep.bitorder`; rows
beyond the last are zero and exist in memory only.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64


def tile(rows: Tensor) -> Tensor:
    """(rows, k) -> (ceil(rows/64), k, 64), new and aligned to 64 bytes."""
    count, width = rows.shape
    tiles = rows.new_zeros(tile_count(count), width, TILE)
    whole = count // TILE
    tiles[:whole].copy_(rows[: whole * TILE].view(whole, TILE, width).transpose(1, 2))
    if count > whole * TILE:
        tiles[whole, :, : count - whole * TILE].copy_(rows[whole * TILE :].t())
    return tiles


def untile(tiles: Tensor, rows: int) -> Tensor:
    """Inverse of `tile`: (tiles, k, 64) -> (rows, k), contiguous."""
    stored = tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:rows]
    return tiles.new_empty(stored.shape).copy_(stored)  # contiguous() keeps odd strides where a size is 1


def tile_count(rows: int) -> int:
    """Tiles that hold so many rows."""
    return -(-rows // TILE)


def as_words(packed: Tensor) -> Tensor:
    """Packed rows as int32 words: uint8 (rows, bytes) is filled up with zero bits to whole words."""
    if packed.dtype == torch.int32:
        return packed
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).view(torch.int32)
