"""Round to nearest: sign(W) with the mean magnitude of each row or row group.  The smallest method; copy it.

A method names its format, says which spec of it serves a budget, and solves one linear.
"""

from __future__ import annotations

from torch import Tensor

from hf_qep.algorithms.rtn import round_to_nearest
from hf_qep.formats import sign
from hf_qep.methods.problem import LayerProblem, require_one_bit

FORMAT = sign.NAME


def spec(bits: float, group_size: int | None, out_features: int, in_features: int) -> sign.Spec:
    """One scale per row, or per `group_size` columns of a row. Raises BitsError unless bits is 1."""
    require_one_bit("rtn", bits)
    chosen = sign.Spec(group_size=group_size)
    sign.groups(chosen, in_features)
    return chosen


def solve(problem: LayerProblem) -> dict[str, Tensor]:
    """Parts of format `sign`. The Hessian is not used."""
    signs, scales = round_to_nearest(problem.weight, problem.spec.group_size)
    return {"signs": signs, "row_scale": scales}
