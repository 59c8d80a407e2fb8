"""The signs of method `sign`, refined by quasi-quantum annealing: same format and bits, less error, more time."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qep.algorithms.annealing import quasi_quantum_annealing
from hf_qep.algorithms.moments import damped_in_place
from hf_qep.algorithms.signs import SignWeight, balance
from hf_qep.formats import sign as packed
from hf_qep.methods import sign
from hf_qep.methods.problem import LayerProblem, require_one_bit

FORMAT = packed.NAME


def spec(bits: float, group_size: int | None, out_features: int, in_features: int) -> packed.Spec:
    """One scale per row or row group, one per column. Raises BitsError unless bits is 1."""
    require_one_bit("qqa", bits)
    return sign.spec(bits, group_size, out_features, in_features)


def solve(problem: LayerProblem) -> dict[str, Tensor]:
    """Parts of format `sign`. Raises IllConditionedError if the damped Hessian has no Cholesky factor."""
    parts, columns = sign.solve(problem), problem.spec.column_scale
    column_scale = parts["column_scale"] if columns else torch.ones_like(problem.weight[0])
    start = SignWeight(parts["signs"], parts["row_scale"], column_scale)
    with damped_in_place(problem.hessian, problem.damping) as H:
        found = quasi_quantum_annealing(start, problem.weight, H, generator=problem.generator, refit_columns=columns)
    if not columns:
        return {"signs": found.signs, "row_scale": found.row_scale}
    found = balance(found)
    return {"signs": found.signs, "row_scale": found.row_scale, "column_scale": found.column_scale}
