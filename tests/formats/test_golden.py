"""The on-disk meaning, in numbers that must never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_qep.bitorder import pack_signs, unpack_signs
from hf_qep.errors import ConfigError, NonFiniteError
from hf_qep.formats import factored, integer, sign


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


def test_the_rows_of_a_flat_left_matrix_follow_one_another():
    tensors = {
        "weight": torch.tensor([[1]] * 8, dtype=torch.int32),
        "left": torch.tensor([0b00000111_11111111], dtype=torch.int32),
        "weight_scale": torch.tensor([1.0, 2.0], dtype=torch.float16),
        "middle_scale": torch.ones(8, dtype=torch.float16),
        "column_scale": torch.ones(1, dtype=torch.float16),
    }
    spec = factored.Spec(8, flat=True)
    assert factored.dequantize(tensors, spec, 2, 1, torch.float32).tolist() == [[8], [-4]]
    assert factored.stored_bits(spec, 32, 32) == factored.stored_bits(factored.Spec(8), 32, 32) - 24 * 32


@pytest.mark.parametrize(("rank", "flat"), [(12, True), (8, 1)])
def test_a_flat_left_matrix_needs_whole_bytes(rank, flat):
    with pytest.raises(ConfigError, match="multiple of 8"):
        factored.Spec(rank, flat=flat)


def test_a_row_of_integer_codes_decodes_to_known_values():
    # float16: 1.0 is 0x3C00, -2.0 is 0xC000, 0.5 is 0x3800. A code is stored as itself plus 8, or plus 128.
    four = torch.tensor([[0xC000_3C00 - 2**32, 0x0000_3800, 0x0000_F780]], dtype=torch.int64).to(torch.int32)
    spec = integer.Spec(4, 2)
    dense = integer.dequantize({"weight": four[:, [0, 2]]}, spec, 1, 4, torch.float32)
    assert dense.tolist() == [[-8, 0, 2, -14]]
    dense = integer.dequantize({"weight": four[:, [0, 1, 2]]}, spec, 1, 6, torch.float32)
    assert dense.tolist() == [[-8, 0, 2, -14, -4, -4]]
    eight = torch.tensor([[0x3800, 0xFF80_7F00 - 2**32, 0x81]], dtype=torch.int64).to(torch.int32)
    dense = integer.dequantize({"weight": eight}, integer.Spec(8), 1, 5, torch.float32)
    assert dense.tolist() == [[-64, -0.5, 0, 63.5, 0.5]]


def test_an_integer_row_packs_to_known_words():
    parts = {"codes": torch.tensor([[-8, 0, -1, 7]], dtype=torch.int8), "row_scale": torch.tensor([[1.0, -2.0]])}
    assert integer.pack(parts, integer.Spec(4, 2))["weight"].tolist() == [[0xC000_3C00 - 2**32, 0xF780]]


@pytest.mark.parametrize("bits", [1, 3, 16, "4", None, True])
def test_bits_that_do_not_fill_a_byte_are_refused(bits):
    with pytest.raises(ConfigError, match="one of 4, 8"):
        integer.Spec(bits)


def test_a_group_that_does_not_divide_the_width_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"group size 128 .* width 172"):
        sign.layout(sign.Spec(group_size=128), 64, 172)


def test_a_scale_beyond_float16_is_refused():
    parts = {"signs": torch.ones(1, 4, dtype=torch.bool), "row_scale": torch.tensor([[1e6]])}
    with pytest.raises(NonFiniteError, match="65504"):
        sign.pack(parts, sign.Spec())
