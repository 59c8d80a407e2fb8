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

from hf_qep.architectures.access import get_bias, get_weight
from hf_qep.architectures.feeds import FACTOR, FEEDS
from hf_qep.architectures.parts import Block, LinearRef

PANEL_WEIGHTS = 1 << 22
"""Weights whose magnitudes are added at a time; nothing else takes memory."""
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
        factors[down] = _magnitudes([get_weight(model, down)])
        get_weight(model, up).mul_(factors[down][:, None])
        if (bias := get_bias(model, up)) is not None:
            bias.mul_(factors[down])
    for norm, readers in FEEDS[family].items():
        refs = [own.get(at + name) for name in readers]
        if None not in refs:
            weight = model.get_submodule(at + norm).weight.data
            before = weight.float().clone()
            weight.mul_(_magnitudes([get_weight(model, ref) for ref in refs]))
            factors |= dict.fromkeys(refs, torch.where(before == 0, 1.0, weight.float() / before))
    for ref, factor in factors.items():
        get_weight(model, ref).div_(factor)
    return factors


def _magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """float32 (in,): mean magnitude of each column over all rows of all weights; the geometric mean of all is 1."""
    sums = sum(
        panel.abs().sum(0, dtype=torch.float32)
        for weight in weights
        for panel in weight.split(max(1, PANEL_WEIGHTS // weight.shape[1]))
    )
    found = sums / sums.mean().clamp_min(torch.finfo(torch.float32).tiny)
    found = torch.where(found < SMALLEST, 1.0, found)
    return found / found.log().mean().exp()
