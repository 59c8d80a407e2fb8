"""Blocks of ggml hold the very numbers of a packed matrix, by the official reader and by arithmetic of this file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.errors import ExportError
from hf_qep.export.blocks import block_type, interleaved, signs_from_blocks, to_blocks
from hf_qep.reader import Matrix

quants = pytest.importorskip("gguf.quants", reason="needs the package gguf, which `make install` brings")


@st.composite
def matrices(draw, bits):
    size = 128 if bits == 1 else 32
    blocks, rows = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    groups = draw(st.sampled_from([n for n in range(1, blocks + 1) if blocks % n == 0]))
    seed = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    octets = seed.integers(0, 256, (rows, blocks * size * bits // 8 + draw(st.integers(0, 3))), np.uint8)
    scale = seed.standard_normal((rows, groups)).astype(np.float16)
    return Matrix(octets, blocks * size, scale, None, bits)


@settings(max_examples=40, deadline=None)
@given(matrices(1))
def test_signs_are_those_of_the_matrix(matrix):
    assert block_type(matrix, "m") == "Q1_0"
    data = to_blocks(matrix, "Q1_0")
    assert data.shape == (len(matrix.octets), matrix.columns // 128 * 18)
    assert np.array_equal(signs_from_blocks(data), matrix.dense())
    first = data[0, :18]  # the definition in ggml-common.h, by hand
    scale = first[:2].view("<f2").astype(np.float32)[0]
    by_hand = [scale if first[2 + i // 8] >> (i % 8) & 1 else -scale for i in range(128)]
    assert np.array_equal(by_hand, matrix.dense()[0, :128])


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whole_numbers_are_those_of_the_matrix(bits, kind, data):
    matrix = data.draw(matrices(bits))
    assert block_type(matrix, "m") == kind
    found = quants.dequantize(to_blocks(matrix, kind), getattr(quants.GGMLQuantizationType, kind))
    assert np.array_equal(found, matrix.dense())


@pytest.mark.parametrize(
    ("columns", "groups", "bits", "why"),
    [(96, 1, 1, "96 columns"), (256, 4, 1, "scale for every 64"), (64, 4, 8, "every 16"), (48, 1, 4, "48 columns")],
)
def test_what_does_not_fit_is_refused(columns, groups, bits, why):
    matrix = Matrix(np.zeros((2, columns), np.uint8), columns, np.ones((2, groups), np.float16), None, bits)
    with pytest.raises(ExportError, match=why):
        block_type(matrix, "layer")


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 8), (4, 32)])
def test_rotary_pairs_come_to_lie_side_by_side(heads, size):
    order = interleaved(heads * size, heads)
    assert sorted(order) == list(range(heads * size))
    for head in range(heads):
        pairs = order[head * size : (head + 1) * size].reshape(-1, 2)
        assert (pairs[:, 1] - pairs[:, 0] == size // 2).all()
        assert (pairs // size == head).all()
