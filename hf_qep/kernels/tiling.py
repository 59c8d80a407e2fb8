"""The order in which the native kernels read signs: tiles of some rows, one linear stream per tile.

    words  (rows, w)       ->  (ceil(rows/height), w, height)
    scales (rows, groups)  ->  (ceil(rows/height), groups, height)

On a processor a tile has 64 rows: one step is 64 rows x 32 columns = 256 bytes, and a lane of a register is a row, so
nothing is summed across lanes. On a GPU one tile holds the whole matrix, so that neighbouring threads read neighbouring
rows. Files keep the order of `hf_qep.bitorder`; rows beyond the last are zero and exist in memory only.
"""

from __future__ import annotations

import ctypes
import mmap

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


def drop_pages(tensor: Tensor) -> None:
    """Let go of the memory behind a tensor that is no longer needed, where that is a file mapped to memory.

    Loaders hand out tensors that are parts of a mapped file, and a page once read counts as the process's own until the
    whole file is let go of. Pages that were not changed come back from the file if someone asks again. Without effect
    for other memory, and on systems without `/proc` or `madvise`.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if tensor.device.type != "cpu" or tensor.nbytes < 2 * mmap.PAGESIZE or not _is_mapped_file(start, end):
        return
    first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE  # not the pages shared with neighbours
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _is_mapped_file(start: int, end: int) -> bool:
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                area, _, _, _, node, *path = line.split(maxsplit=5)
                low, high = (int(word, 16) for word in area.split("-"))
                if low <= start < high:
                    return end <= high and node != "0" and bool(path)
    except OSError:
        pass
    return False
