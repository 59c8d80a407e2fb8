"""What method `auto` may spend on the linears, in bits, and what a linear can be had for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from hf_qep.accounting import stored_bytes
from hf_qep.architectures.access import get_weight
from hf_qep.architectures.parts import LinearRef
from hf_qep.architectures.tables import Table
from hf_qep.config import QepConfig
from hf_qep.engine.recipes import Recipe
from hf_qep.errors import BitsError
from hf_qep.files import parse_size
from hf_qep.formats import factored as factored_format
from hf_qep.formats import integer
from hf_qep.methods import factored, sign

MOST_BITS, MOST_RANKS = 4.0, 64
"""Of one linear: bits per weight, and ranks that are weighed."""
HEADER_BYTES, TENSORS_PER_LINEAR, LONGEST_PART = 96, 5, len(".middle_scale")
"""Most that the header of a weight file says of a tensor besides its name, most tensors of a linear, and the longest
name of one of them."""


@lru_cache(maxsize=256)
def choices(out_features: int, in_features: int) -> tuple[Recipe, ...]:
    """What a linear can become: `sign` first, then ranks of `factored` in order."""
    shape = out_features, in_features
    found = [Recipe("factored", factored_format.without_padding(rank)) for rank in factored.ranks(*shape)]
    within = [r for r in found if r.stored_bits(*shape) <= MOST_BITS * out_features * in_features] or found[:1]
    return (Recipe("sign", sign.spec(1.0, None, *shape)), *within[:: -(-len(within) // MOST_RANKS)])


def bit_budget(
    model: nn.Module,
    refs: Sequence[LinearRef],
    tables: Sequence[Table],
    config: QepConfig,
    stored_as: torch.dtype | None = None,
) -> int:
    """Bits for the tensors of all linears together, scales and padding included: by `bits`, or by `max_memory` less
    everything else in the weight files. More than the dearest choices take is not given out.

    model: float, may be on meta. tables: of the model, to be stored as whole numbers. stored_as: dtype in the files of
    what stays float, if it is another one than now. Raises BitsError if the cheapest choices take more.
    """
    weights = sum(ref.out_features * ref.in_features for ref in refs)
    sizes = [[r.stored_bits(*ref.shape) for r in choices(*ref.shape)] for ref in refs]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if config.max_memory is None:
        budget = int(config.bits * weights)
        if budget < least:
            raise BitsError(
                f"the linears of this model take at least {least / weights:.3f} bits per weight (scales and padding "
                f"included), not {config.bits:g}; raise bits or leave layers out with skip_modules"
            )
    else:
        rest = rest_bytes(model, refs, tables, stored_as)
        budget = 8 * (parse_size(config.max_memory) - rest)
        if budget < least:
            raise BitsError(
                f"the weight files take at least {_megabytes(rest + least / 8)}, not {config.max_memory}: "
                f"{_megabytes(least / 8)} for the linears and {_megabytes(rest)} for everything else; raise max_memory "
                "or lower embedding_bits and head_bits"
            )
    return min(budget, most)


def rest_bytes(
    model: nn.Module, refs: Sequence[LinearRef], tables: Sequence[Table], stored_as: torch.dtype | None = None
) -> int:
    """Bytes of weight files for everything but the linears: what stays float, tables in whole numbers, headers."""
    replaced = [(get_weight(model, ref).dtype, ref.out_features * ref.in_features) for ref in refs]
    replaced += [(model.get_submodule(t.names[0]).weight.dtype, t.rows * t.columns) for t in tables]
    floats = stored_bytes(model, stored_as) - sum(n * (stored_as or dtype).itemsize for dtype, n in replaced)
    whole = sum(integer.stored_bits(t.spec, t.rows, t.columns) for t in tables) // 8
    return floats + whole + _header_bytes(model, refs)


def _header_bytes(model: nn.Module, refs: Sequence[LinearRef]) -> int:
    """A little more than the headers of the weight files take."""
    linears = [name + " " * LONGEST_PART for name in {ref.name for ref in refs}] * TENSORS_PER_LINEAR
    names = [*dict(model.named_parameters()), *dict(model.named_buffers()), *linears]
    return sum(len(name) + HEADER_BYTES for name in names)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
