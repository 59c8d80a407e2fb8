"""The on-disk meaning, in numbers that must never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_qep.bitorder import pack_signs, unpack_signs
from hf_qep.errors import ConfigError, NonFiniteError
from hf_qep.formats import factored, sign


def test_bit_j_of_word_w_is_column_32w_plus_j():
    signs = torch.zeros(1, 70, dtype=torch.bool)
    signs[0, [0, 5, 31, 33, 69]] = True
    assert pack_signs(signs).tolist() == [[(1 | 1 << 5 | 1 << 31) - 2**32, 1 << 1, 1 << 5]]


def test_packing_equals_numpy_packbits():
    signs = torch.rand(6, 64) > 0.5
    expected = np.packbits(signs.numpy(), axis=1, bitorder="little").view(np.int32)
    assert np.array_equal(pack_signs(signs).numpy(), expected)


def test_unpacking_gives_plus_and_minus_one_in_every_dtype():
    words = torch.tensor([[5]], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        assert unpack_signs(words, 4, dtype).tolist() == [[1, -1, 1, -1]]


def test_a_sign_layer_decodes_to_known_values():
    tensors = {
        "weight": torch.tensor([[0b0110], [0b1001]], dtype=torch.int32),
        "weight_scale": torch.tensor([[1.0, 2.0], [0.5, 4.0]], dtype=torch.float16),
        "column_scale": torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float16),
    }
    dense = sign.dequantize(tensors, sign.Spec(group_size=2, column_scale=True), 2, 4, torch.float32)
    assert dense.tolist() == [[-1, 1, 6, -2], [0.5, -0.5, -12, 4]]


def test_a_factored_layer_decodes_to_known_values():
    tensors = {
        "weight": torch.tensor([[0b01], [0b11]], dtype=torch.int32),
        "left": torch.tensor([[0b10]], dtype=torch.int32),
        "weight_scale": torch.tensor([2.0], dtype=torch.float16),
        "middle_scale": torch.tensor([1.0, 3.0], dtype=torch.float16),
        "column_scale": torch.tensor([1.0, 0.5], dtype=torch.float16),
    }
    # left = [-1, +1]; right = [[+1, -1], [+1, +1]]; W = 2 * (-1 * [1, -1] + 3 * [1, 1]) * [1, .5]
    assert factored.dequantize(tensors, factored.Spec(2), 1, 2, torch.float32).tolist() == [[4, 4]]


def test_a_group_that_does_not_divide_the_width_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"group size 128 .* width 172"):
        sign.layout(sign.Spec(group_size=128), 64, 172)


def test_a_scale_beyond_float16_is_refused():
    parts = {"signs": torch.ones(1, 4, dtype=torch.bool), "row_scale": torch.tensor([[1e6]])}
    with pytest.raises(NonFiniteError, match="65504"):
        sign.pack(parts, sign.Spec())
