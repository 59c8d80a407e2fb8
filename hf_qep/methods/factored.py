"""Two sign matrices through a rank: any budget of bits, ahead of plain signs where the weighted matrix has structure.

ADMM finds the signs and exact refits the scales, both in the full metric of the Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qep.algorithms.admm import balance, factorise, refit
from hf_qep.algorithms.moments import cholesky_damped, damped
from hf_qep.algorithms.straight_through import start_latents
from hf_qep.errors import BitsError, ConfigError
from hf_qep.formats import factored
from hf_qep.methods.problem import LayerProblem

FORMAT = factored.NAME
ITERATIONS = 200
"""100 leave 5 per cent more error on real layers, 300 take 2 per cent off, at cost in proportion."""
REFITS = 3
MOST_BITS = 2.5
STEP = factored.OCTET
"""Between ranks: a row of signs is stored in whole bytes."""


def spec(bits: float, group_size: int | None, out_features: int, in_features: int) -> factored.Spec:
    """The largest rank whose stored bits, scales and padding included, stay within `bits` per weight.

    Raises BitsError when not even the smallest rank fits or `bits` is beyond 2.5, ConfigError for a group size.
    """
    if group_size is not None:
        raise ConfigError(f"method `factored` has one scale per row and no groups; leave group_size={group_size} out")
    if not 0 < bits <= MOST_BITS:
        raise BitsError(f"method `factored` serves more than 0 and up to {MOST_BITS} bits per weight, not {bits:g}")
    weights = out_features * in_features
    fitting = [r for r in ranks(out_features, in_features) if _stored(r, out_features, in_features) <= bits * weights]
    if not fitting:
        least = min(_stored(r, out_features, in_features) for r in ranks(out_features, in_features)) / weights
        raise BitsError(
            f"a {out_features}x{in_features} layer takes at least {least:.3f} bits per weight with method `factored` "
            f"(scales and padding included), not {bits:g}; raise bits or leave the layer out with skip_modules"
        )
    return factored.without_padding(fitting[-1])


def ranks(out_features: int, in_features: int) -> list[int]:
    """Ranks worth storing: three times the full rank takes more bits than any budget served here."""
    return list(range(STEP, max(3 * max(out_features, in_features), STEP) + 1, STEP))


def solve(problem: LayerProblem, *, iterations: int = ITERATIONS) -> dict[str, Tensor]:
    """Parts of format `factored`. iterations: ADMM steps.

    Raises IllConditionedError if the damped Hessian has no Cholesky factor.
    """
    H = damped(problem.hessian, cholesky_damped(problem.hessian, problem.damping)[1])
    rank, generator = problem.spec.rank, problem.generator
    L = None if problem.output_metric is None else problem.output_metric.to(H)
    found = factorise(problem.weight, H, rank, iterations=iterations, generator=generator, output_metric=L)
    found = balance(refit(found, problem.weight, H, rounds=REFITS, output_metric=L))
    return {
        "left": found.left,
        "right": found.right,
        "left_latent": start_latents(found.left, torch.where(found.left, found.left_size, -found.left_size)),
        "right_latent": start_latents(found.right, torch.where(found.right, found.right_size, -found.right_size)),
        "row_scale": found.row_scale,
        "middle_scale": found.middle_scale,
        "column_scale": found.column_scale,
    }


def _stored(rank: int, out_features: int, in_features: int) -> int:
    return factored.stored_bits(factored.without_padding(rank), out_features, in_features)
