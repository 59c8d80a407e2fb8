"""OneBit (arXiv 2402.11295): sign(W) with the best rank-1 approximation of |W| as row and column scale."""

from __future__ import annotations

from torch import Tensor

from hf_qep.algorithms.svid import decompose
from hf_qep.errors import ConfigError
from hf_qep.formats import sign
from hf_qep.methods.problem import LayerProblem, require_one_bit

FORMAT = sign.NAME


def spec(bits: float, group_size: int | None, out_features: int, in_features: int) -> sign.Spec:
    """Row and column scale. Raises BitsError unless bits is 1, ConfigError for a group size."""
    require_one_bit("onebit", bits)
    if group_size is not None:
        raise ConfigError(f"method `onebit` has one scale per row and no groups; leave group_size={group_size} out")
    return sign.Spec(column_scale=True)


def solve(problem: LayerProblem) -> dict[str, Tensor]:
    """Parts of format `sign`. The Hessian is not used."""
    signs, row, column = decompose(problem.weight)
    return {"signs": signs, "row_scale": row.unsqueeze(1), "column_scale": column}
