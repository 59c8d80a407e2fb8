"""The order in which the native kernels read signs: tiles of some rows, one linear stream per tile.

    words  (rows, w)       ->  (ceil(rows/height), w, height)
    scales (rows, groups)  ->  (ceil(rows/height), groups, height)

On a processor a tile has 64 rows: one step is 64 rows x 32 columns = 256 bytes, and a lane of a register is a row, so
nothing is summed across lanes. On a GPU one tile holds the whole matrix, so that neighbouring threads read neighbouring
rows. Files keep the order of `hf_qep.bitorder`; rows beyond the last are zero and exist in memory only.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64


def tile(rows: Tensor, height: int = TILE) -> Tensor:
    """(rows, k) -> (ceil(rows/height), k, height), new and, on a processor, aligned to 64 bytes."""
    count, width = rows.shape
    tiles = rows.new_zeros(-(-count // height), width, height)
    whole = count // height
    tiles[:whole].copy_(rows[: whole * height].view(whole, height, width).transpose(1, 2))
    if count > whole * height:
        tiles[whole, :, : count - whole * height].copy_(rows[whole * height :].t())
    return tiles


def untile(tiles: Tensor, rows: int) -> Tensor:
    """Inverse of `tile` of any height: (tiles, k, height) -> (rows, k), contiguous."""
    stored = tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:rows]
    return tiles.new_empty(stored.shape).copy_(stored)  # contiguous() keeps odd strides where a size is 1


def k_major(packed: Tensor) -> Tensor:
    """Packed rows (rows, k) as GPU kernels read them: int32 (words, rows), contiguous."""
    words = as_words(packed)
    return tile(words, max(words.shape[0], 1))[0]


def as_words(packed: Tensor) -> Tensor:
    """Packed rows as int32 words: uint8 (rows, bytes) is filled up with zero bits to whole words."""
    if packed.dtype == torch.int32:
        return packed
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    return octets.clone(memory_format=torch.contiguous_format).view(torch.int32)
