"""GPTQ (arXiv 2210.17323) on the one-bit grid {-s, +s}: errors are fed back to the columns not yet rounded."""

from __future__ import annotations

from torch import Tensor

from hf_qep.algorithms.gptq import error_feedback_signs
from hf_qep.algorithms.rtn import group_means
from hf_qep.formats import sign
from hf_qep.methods.problem import LayerProblem, require_one_bit

FORMAT = sign.NAME


def spec(bits: float, group_size: int | None, out_features: int, in_features: int) -> sign.Spec:
    """One scale per row, or per `group_size` columns of a row. Raises BitsError unless bits is 1."""
    require_one_bit("gptq", bits)
    chosen = sign.Spec(group_size=group_size)
    sign.groups(chosen, in_features)
    return chosen


def solve(problem: LayerProblem) -> dict[str, Tensor]:
    """Parts of format `sign`. Raises IllConditionedError if the damped Hessian has no Cholesky factor."""
    W, scales = problem.weight, group_means(problem.weight, problem.spec.group_size)
    signs = error_feedback_signs(W, scales, problem.hessian, damping=problem.damping)
    return {"signs": signs, "row_scale": scales}
