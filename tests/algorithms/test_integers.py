"""Rounding to whole numbers: exact where it can be, never worse than rounding without a search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.integers import round_to_integers


def dense(codes, scales):
    return (codes.float().unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


def plain_error(weight, bits, group):
    """Squared error of the textbook grid: the largest magnitude is the highest code, nothing is clipped."""
    grouped = weight.unflatten(1, (-1, group))
    high = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / high
    return (grouped - (grouped / scale.clamp_min(1e-30)).round() * scale).square().sum().item()


@given(st.sampled_from([4, 8]), st.sampled_from([None, 4, 16]), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_codes_are_in_range_and_the_error_is_below_that_of_plain_rounding(bits, group, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32, generator=generator) * 10 ** (torch.rand((), generator=generator) * 4 - 3)
    codes, scales = round_to_integers(weight, bits, group)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert codes.min().item() >= -(2 ** (bits - 1)) and codes.max().item() < 2 ** (bits - 1)
    assert scales.shape == (rows, 32 // (group or 32)) and torch.equal(scales, scales.half().float())
    # The slack is float16's: scales are rounded to 11 bits, those of very small weights to fewer. The outermost code of
    # 8 bits is 127 steps away, where half of the last of 11 bits is 0.06 of a step.
    error = (weight - dense(codes, scales)).square().sum().item()
    assert error <= 1.05 * plain_error(weight, bits, group or 32) + 1e-9


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_come_back_exactly(bits):
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (5, 24), generator=torch.Generator().manual_seed(0))
    codes[:, ::8] = low
    scales = torch.tensor([0.5, -0.25, 2.0, 1.0, -4.0]).view(5, 1).expand(5, 3)
    weight = dense(codes, scales)
    assert torch.equal(dense(*round_to_integers(weight, bits, 8)), weight)


def test_rows_are_rounded_alone_and_zeros_stay_zeros():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    codes, scales = round_to_integers(weight, 4, 16)
    alone = [round_to_integers(row[None], 4, 16) for row in weight]
    assert torch.equal(codes, torch.cat([c for c, _ in alone])) and torch.equal(
        scales, torch.cat([s for _, s in alone])
    )
    assert dense(codes, scales)[2].abs().max() == 0


def test_a_single_outlier_is_clipped_where_that_serves_the_others():
    weight = torch.linspace(-1, 1, 256).view(1, 256)
    weight[0, 0] = -1.6
    codes, scales = round_to_integers(weight, 4, None)
    assert codes[0, 0] == -8 and abs(-8 * scales[0, 0].item()) < 1.5
