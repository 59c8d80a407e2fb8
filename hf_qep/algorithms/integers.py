"""Rounding to whole numbers of a few bits with the scale of least squared error.

The lowest code lies one step further out than the highest, so a scale of the right sign lets it meet the largest weight
of the group. Both signs are tried, larger scales too, and smaller ones, which clip the largest weights where that
serves all others (as llama.cpp searches for its low-bit formats).
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = tuple(step / 40 for step in range(24, 47))
"""Scales that are tried, in units of the one by which the lowest code meets the largest weight: 0.6 to 1.15. A finer
search lowers the error by another 0.5 %."""


def round_to_integers(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """weight float (out, in) -> codes int8 (out, in) and scales (out, groups), each a float16 value in float32.

    weight is about codes * scale per group of columns. A group of zeros has scale 0. A scale may be negative, because
    the largest weight may be positive.
    """
    grouped = weight.float().unflatten(-1, (-1, group_size or weight.shape[-1]))
    low = -(1 << (bits - 1))
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)) / low
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    for part in (*PARTS, low / (low + 1)):  # the last one meets it by the highest code
        for sign in (1, -1):
            scale = (sign * part * largest).half().float()
            error = (grouped - _codes(grouped, scale, low) * scale).square().sum(-1, keepdim=True)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    return _codes(grouped, scales, low).flatten(-2).to(torch.int8), scales.squeeze(-1)


def _codes(grouped: Tensor, scale: Tensor, low: int) -> Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (grouped * inverse).round_().clamp_(low, -low - 1)
