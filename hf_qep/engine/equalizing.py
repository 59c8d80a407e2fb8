"""Columns of equal weight, for formats that have no scale for a column.

A sign has one magnitude per row or group, so a linear whose columns differ in magnitude loses more.  Where its input is
the output of a norm, or has the output of another linear as a factor, the difference can be moved there and the block
computes what it did: W n(x) = (W / c)(c n)(x).  Scales of columns folded beforehand, so that nothing is left to fold.
The idea is that of SmoothQuant (arXiv 2211.10438, eq. 3) for weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_qep.architectures.feeds import FACTOR, FEEDS
from hf_qep.architectures.parts import Block, LinearRef

SMALLEST = 1e-3
"""Least magnitude of a column in units of the mean; a column of zeros stays where it is."""


@torch.no_grad()
def equalize(model: nn.Module, block: Block, family: str) -> dict[LinearRef, Tensor]:
    """Give the columns of the linears of a float block equal mean magnitudes, in place.

    family: a key of FEEDS. Only linears that will be quantised change, and the norms and linears before them.
    Returns linear -> float32 (in,): what its input is multiplied by from now on. Weights keep their dtype; the factor
    is that of the norm as it was rounded, so the block computes what it did up to the rounding of its weights.
    """
    at, own = f"{block.name}.", {ref.name: ref for group in block.groups for ref in group.linears}
    factors: dict[LinearRef, Tensor] = {}
    up, down = (own.get(at + name) for name in FACTOR)
    if up is not None and down is not None:  # first, because the norm shall see the rows of up as they will be
        factors[down] = _magnitudes([_weight(model, down.name)])
        _multiply_rows(model, up.name, factors[down])
    for norm, readers in FEEDS[family].items():
        refs = [own.get(at + name) for name in readers]
        if None not in refs:
            before = _weight(model, at + norm)
            _set(model, at + norm, before * _magnitudes([_weight(model, ref.name) for ref in refs]))
            factor = torch.where(before == 0, 1.0, _weight(model, at + norm) / before)
            factors |= dict.fromkeys(refs, factor)
    for ref, factor in factors.items():
        _set(model, ref.name, _weight(model, ref.name) / factor)
    return factors


def _magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """(in,): mean magnitude of each column over all rows of all weights; the geometric mean of all is 1."""
    sums = sum(weight.abs().sum(0) for weight in weights)
    found = sums / sums.mean().clamp_min(torch.finfo(torch.float32).tiny)
    found = torch.where(found < SMALLEST, 1.0, found)
    return found / found.log().mean().exp()


def _multiply_rows(model: nn.Module, name: str, factor: Tensor) -> None:
    _set(model, name, _weight(model, name) * factor[:, None])
    bias = getattr(model.get_submodule(name), "bias", None)
    if bias is not None:
        bias.data = (bias.float() * factor).to(bias.dtype)


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.data.float()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parameter = model.get_submodule(name).weight
    parameter.data = value.to(parameter.dtype)
