"""Method `auto`: a total budget of bits is spent over the linears by what each bit buys.

For every linear `sign` and a few ranks of `factored` are solved on a part of the calibration rows in the float model,
and their errors are measured on other rows: a solver that knows all correlations of its tokens fits them better than
others.  An error counts by the Fisher information of the token and the output it is made in, so that it means nats of
the whole model in every layer.  `algorithms.allocation` then chooses the format and the rank of each linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_qep.algorithms.allocation import interpolate, spend
from hf_qep.algorithms.moments import Moments, ridge
from hf_qep.architectures.access import get_weight
from hf_qep.architectures.observe import LinearObserver
from hf_qep.architectures.parts import Block, LinearRef, Structure
from hf_qep.architectures.skeleton import BlockInputs, run_block
from hf_qep.config import QepConfig
from hf_qep.engine.budget import choices
from hf_qep.engine.recipes import Recipe
from hf_qep.engine.seeds import layer_seed
from hf_qep.engine.sensitivity import Sensitivity, output_sensitivity
from hf_qep.errors import NonFiniteError
from hf_qep.methods import factored, sign
from hf_qep.methods.problem import LayerProblem
from hf_qep.registry import FORMATS

PROBE_TOKENS, MEASURED_SHARE = 20480, 5
"""Calibration tokens that are used, about; one batch in so many, the last ones, measures and is not solved for."""
SHARES = (0.5, 1.0, 2.0)
"""Ranks of `factored` that are solved: those nearest to these shares of the budget. The others are interpolated."""
PROBE_ITERATIONS = 50
"""ADMM steps of a probe. All of them leave 3 to 17 per cent less error, most at high ranks."""


def allocate(
    model: Any,
    structure: Structure,
    batches: Sequence[dict[str, Tensor]],
    inputs: BlockInputs,
    config: QepConfig,
    budget: int,
) -> dict[LinearRef, Recipe]:
    """Method and spec of every linear, with stored bits of at most `budget` in all; experts of a stack get the same.

    model: float; not changed. batches: inputs of the model. inputs: what the blocks get for them.
    budget: as `budget.bit_budget` gives it. Raises NonFiniteError if gradients overflow.
    """
    refs = structure.linears()
    few = batches[: _enough(inputs.first_hidden)]
    sensitivity = output_sensitivity(model, refs, few, config.seed)
    bits = budget / sum(ref.out_features * ref.in_features for ref in refs)
    hidden = list(inputs.first_hidden[: len(few)])
    errors: dict[LinearRef, list[float]] = {}
    for index, block in enumerate(structure.blocks):
        solved, measured = _observe(model, inputs, index, block, hidden, sensitivity)
        for ref, moments in solved.items():
            problem = _Problem(model, ref, moments, measured[ref], sensitivity[ref].outputs, config)
            errors[ref] = problem.errors(bits)
    stacks: dict[str, list[LinearRef]] = {}
    for ref in refs:
        stacks.setdefault(ref.name, []).append(ref)
    options = [_options(members, errors) for members in stacks.values()]
    chosen = zip(stacks.values(), spend(options, budget), strict=True)
    return {ref: choices(*ref.shape)[option] for members, option in chosen for ref in members}


def _enough(hidden: Sequence[Tensor]) -> int:
    """Batches that hold about PROBE_TOKENS tokens, at least one."""
    tokens = 0
    for count, one in enumerate(hidden, 1):
        tokens += one.shape[:-1].numel()
        if tokens >= PROBE_TOKENS:
            return count
    return len(hidden)


def _options(members: Sequence[LinearRef], errors: dict[LinearRef, list[float]]) -> list[tuple[int, float]]:
    """Bits and error of every choice for a linear, or for all experts of a stack together."""
    shape = members[0].shape
    sums = [sum(errors[ref][k] for ref in members) for k in range(len(choices(*shape)))]
    return [(r.stored_bits(*shape) * len(members), error) for r, error in zip(choices(*shape), sums, strict=True)]


def _observe(
    model: Any,
    inputs: BlockInputs,
    index: int,
    block: Block,
    hidden: list[Tensor],
    sensitivity: dict[LinearRef, Sensitivity],
) -> tuple[dict[LinearRef, Moments], dict[LinearRef, Moments]]:
    """Second moments of what every linear of a block reads in the float model, to solve with and to measure with.

    Those to measure with weigh each token by what an error there costs. `hidden` is moved behind the block.
    """
    leaders = {ref: group.linears[0] if ref.expert is None else ref for group in block.groups for ref in group.linears}
    device = next(model.get_submodule(block.name).parameters()).device
    solved = {leader: Moments(leader.in_features, device=device) for leader in set(leaders.values())}
    measured = {ref: Moments(ref.in_features, device=device) for ref in leaders}
    first_measured = len(hidden) - max(1, len(hidden) // MEASURED_SHARE)
    batch = 0

    def see(ref: LinearRef, x: Tensor) -> None:
        if ref in solved and (batch < first_measured or len(hidden) == 1):
            solved[ref].update(x)
        if batch >= first_measured:
            weight = sensitivity[ref].tokens[batch]
            if len(weight) != x.shape[:-1].numel():  # a router on the edge between two experts
                weight = weight.mean().nan_to_num().expand(x.shape[:-1].numel())
            if weight.any():
                measured[ref].update(x, token_weight=weight)

    with LinearObserver({ref: get_weight(model, ref) for ref in leaders}, see):
        for batch, before in enumerate(hidden):
            hidden[batch] = run_block(model, block, before.to(device), inputs.call(index, batch, device))
    return {ref: solved[leader] for ref, leader in leaders.items()}, measured


class _Problem:
    """One linear of the float model, to be solved in several ways."""

    def __init__(
        self, model: Any, ref: LinearRef, solved: Moments, measured: Moments, outputs: Tensor, config: QepConfig
    ) -> None:
        self.ref, self.weight = ref, get_weight(model, ref).float()
        self.hessian, self.metric, self.outputs = solved.hessian(), measured.hessian(), outputs.to(self.weight)
        self.damping = ridge(config.damping, ref.in_features, solved.count)
        self.seed = layer_seed(config.seed, ref)

    def errors(self, bits: float) -> list[float]:
        """Error of every choice, in nats per place of prediction; 0 for an expert that no measured token reaches.

        bits: per weight, the average that the budget allows.
        """
        plain, *ranks = choices(*self.ref.shape)
        if not self.metric.any():
            return [0.0] * (1 + len(ranks))
        whole = bits * self.weight.numel()
        nearest = [min(ranks, key=lambda r: abs(r.stored_bits(*self.ref.shape) - share * whole)) for share in SHARES]
        points = {recipe.spec.rank: self._error(recipe) for recipe in dict.fromkeys(nearest)}
        of_signs = self._error(plain)
        if not all(map(math.isfinite, (of_signs, *points.values()))):
            raise NonFiniteError(f"the gradients at `{self.ref.label}` overflow; compute in float32 or bfloat16")
        return [of_signs, *(interpolate(points, recipe.spec.rank) for recipe in ranks)]

    def _error(self, recipe: Recipe) -> float:
        generator = torch.Generator().manual_seed(self.seed)
        problem = LayerProblem(self.weight, self.hessian, recipe.spec, self.damping, generator)
        solve = sign.solve if recipe.method == "sign" else partial(factored.solve, iterations=PROBE_ITERATIONS)
        form = FORMATS.get(recipe.spec.format)
        tensors = {name: t.to(self.weight.device) for name, t in form.pack(solve(problem), recipe.spec).items()}
        gap = self.weight - form.dequantize(tensors, recipe.spec, *self.ref.shape, torch.float32)
        return 0.5 * (self.outputs * (gap @ self.metric * gap).sum(1)).sum().item()
