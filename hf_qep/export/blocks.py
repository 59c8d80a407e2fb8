"""Packed matrices in the blocks of ggml, and back; numpy alone, no model, no file.

    type   columns   bytes   weight
    Q1_0   128       18      d * (+1 or -1):  float16 d, then bit j of byte i is the sign of column 8i + j, 1 is +1
    Q8_0   32        34      d * code:        float16 d, then 32 int8
    Q4_0   32        18      d * (code - 8):  float16 d, then byte i holds column i (low half) and i + 16 (high half)

Signs lie in the same order as in a checkpoint, so only scales move.  Blocks that share one scale in a checkpoint repeat
it.  Source: ggml-common.h and ggml-quants.c of llama.cpp; Q1_0 is read and written by the released `gguf` package as
bytes only, so its arithmetic is here.
"""

from __future__ import annotations

import numpy as np

from hf_qep.errors import ExportError
from hf_qep.reader import Matrix

Array = np.ndarray

BLOCK_COLUMNS = {"Q1_0": 128, "Q8_0": 32, "Q4_0": 32}
_TYPE_OF_BITS = {1: "Q1_0", 4: "Q4_0", 8: "Q8_0"}


def block_type(matrix: Matrix, what: str) -> str:
    """ggml type that holds a packed matrix without loss, column scales aside.

    what: its name in the message. Raises ExportError if the blocks of that type do not fit its width or its groups.
    """
    kind = _TYPE_OF_BITS[matrix.bits]
    size, group = BLOCK_COLUMNS[kind], matrix.columns // matrix.scale.shape[1]
    if matrix.columns % size:
        raise ExportError(
            f"`{what}` has {matrix.columns} columns, and {kind} of llama.cpp stores them in blocks of {size}; "
            "leave this layer float with skip_modules, or keep this model in its own format"
        )
    if group % size:
        raise ExportError(
            f"`{what}` has a scale for every {group} columns, and {kind} of llama.cpp has one for every {size}; "
            f'quantise with export="gguf", or with a group size that is a multiple of {size}'
        )
    return kind


def to_blocks(matrix: Matrix, kind: str) -> Array:
    """uint8 (rows, bytes of a row) in blocks of the type that `block_type` gave; column scales are not looked at."""
    size = BLOCK_COLUMNS[kind]
    rows, blocks = len(matrix.octets), matrix.columns // size
    scale = np.repeat(matrix.scale, blocks // matrix.scale.shape[1], axis=1)
    octets = matrix.octets[:, : matrix.columns * matrix.bits // 8].reshape(rows, blocks, -1)
    if kind == "Q8_0":
        octets = octets ^ 0x80  # code + 128 -> two's complement
    elif kind == "Q4_0":
        codes = np.stack([octets & 15, octets >> 4], -1).reshape(rows, blocks, size)
        octets = codes[..., : size // 2] | codes[..., size // 2 :] << 4
    heads = np.ascontiguousarray(scale, "<f2").view(np.uint8).reshape(rows, blocks, 2)
    return np.concatenate([heads, octets], -1).reshape(rows, -1)


def signs_from_blocks(data: Array) -> Array:
    """float32 (rows, columns) of Q1_0 blocks uint8 (rows, bytes of a row)."""
    blocks = data.reshape(len(data), -1, 18)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    signs = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32) * 2 - 1
    return (signs * scale).reshape(len(data), -1)


def interleaved(rows: int, heads: int) -> Array:
    """int (rows,): order of the rows of a projection to queries or keys whose rotary pairs lie side by side, from the
    order of transformers, where the two of a pair are half a head apart."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()
