"""Solvers of signs at equal processor time: descent, restarts, Metropolis annealing, quasi-quantum annealing.

    python scripts/bench_signs.py hf_qep/demo_model --layers layers.1 --seq-len 256 --json signs.json

Every solver starts from the result of method `sign`, with its scales, on the real Hessians and QEP targets of a model,
and its result is polished in the same way. Solvers that anneal know their time beforehand: the cost of a step is
measured first. Errors are relative to those of `sign`: of the calibration rows that were solved for, and of as many
other rows, with the Hessian and the target of their own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.algorithms.annealing import POLISH, Schedule, quasi_quantum_annealing
from hf_qep.algorithms.moments import Moments, damped, ridge
from hf_qep.algorithms.qep import correct_target
from hf_qep.algorithms.scales import row_scales, weighted_error
from hf_qep.algorithms.signs import SignWeight, absorb_signs, descend
from hf_qep.config import QepConfig
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.engine.source import load_float_model, resolve_model
from hf_qep.methods import sign
from hf_qep.methods.problem import LayerProblem
from hf_qep.modules import packed_modules

Solver = Callable[[torch.Generator], SignWeight]
"""Runs once; the seed is that of the generator."""
BATCH = 8
BLOCK, SUB_BLOCK = 128, 16
"""Columns per lazy update of the Metropolis solver, as in GPTQ."""


@dataclass(frozen=True)
class Layer:
    """What a linear of the quantised model was, or should be, solved for; weights (out, in), hessians (in, in)."""

    weight: Tensor
    hessian: Tensor
    """damped"""
    held_weight: Tensor
    held_hessian: Tensor
    start: SignWeight
    """of method `sign`"""

    def errors(self, found: SignWeight) -> tuple[float, float]:
        """Error on calibration and on held-out rows, in units of that of `start`."""
        pairs = [(self.weight, self.hessian), (self.held_weight, self.held_hessian)]
        return tuple(
            (weighted_error(found.dense(), w, h) / weighted_error(self.start.dense(), w, h)).item() for w, h in pairs
        )


def capture(args: argparse.Namespace) -> dict[str, Layer]:
    """Layers of the model behind the errors that method `sign` makes upstream of them."""
    model, tokenizer = load_float_model(resolve_model(args.model))
    model = model.float()
    size = {"seq_len": args.seq_len, "seed": 0, "model": model}
    rows = load_calibration(args.dataset, tokenizer, num_samples=2 * args.num_samples, **size)
    half = len(rows) // 2
    solved_for = {name: tensor[:half] for name, tensor in rows.inputs.items()}
    quantized = copy.deepcopy(model)
    calibration = load_calibration(solved_for, tokenizer, num_samples=half, **size)
    quantize_model(quantized, QepConfig(damping=args.damping, residual=False), calibration)
    names = [name for name in packed_modules(quantized) if args.layers in name]
    moments = {name: [Moments(model.get_submodule(name).in_features, cross=True) for _ in range(2)] for name in names}
    for number, batch in enumerate(rows.batches(BATCH)):
        floats, others = inputs_of(model, names, batch), inputs_of(quantized, names, batch)
        for name in names:
            moments[name][number * BATCH >= half].update(others[name], floats[name])
    return {name: layer_of(model.get_submodule(name), *moments[name], args) for name in names}


@torch.no_grad()
def inputs_of(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name of a linear -> what it reads."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
        for name in names
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def layer_of(linear: nn.Linear, own: Moments, held: Moments, args: argparse.Namespace) -> Layer:
    """The problem that the engine would pose, and the unregularised one of the held-out rows."""
    weight, centered = linear.weight.detach(), linear.bias is not None
    damping = ridge(args.damping, weight.shape[1], own.count)
    H, C = own.hessian(centered=centered), own.cross(centered=centered)
    target = correct_target(weight, H, C, damping=damping)
    held_H = held.hessian(centered=centered)
    held_target = correct_target(weight, held_H, held.cross(centered=centered), damping=1e-6)
    spec = sign.spec(1.0, None, *weight.shape)
    parts = sign.solve(LayerProblem(target, H, spec, damping, torch.Generator()))
    return Layer(target, damped(H, damping), held_target, held_H, SignWeight(**parts))


def polished(found: SignWeight, layer: Layer) -> SignWeight:
    """What every solver ends with: sweeps of flips and refits, as in `quasi_quantum_annealing`."""
    found = descend(found, layer.weight, layer.hessian, sweeps=POLISH)
    scales = row_scales(layer.weight, found.direction(), layer.hessian)
    return absorb_signs(found.signs, scales, found.column_scale)


def row_errors(dense: Tensor, layer: Layer) -> Tensor:
    """(out,)"""
    difference = dense - layer.weight
    return ((difference @ layer.hessian) * difference).sum(1)


def timed(call: Callable[[], SignWeight]) -> tuple[SignWeight, float]:
    """Result and processor seconds."""
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def descent(layer: Layer, budget: float) -> Solver:
    """Sweeps until the time is over or nothing changes any more."""

    def run(generator: torch.Generator) -> SignWeight:
        began, found = time.process_time(), layer.start
        while time.process_time() - began < budget:
            before, found = found, polished(found, layer)
            if torch.equal(before.signs, found.signs):
                break
        return found

    return run


def restarts(layer: Layer, budget: float, *, turned: float) -> Solver:
    """Iterated local search: turn a share of the best signs of every row, descend, keep the better row."""

    def run(generator: torch.Generator) -> SignWeight:
        began, best = time.process_time(), descent(layer, budget)(generator)
        lowest = row_errors(best.dense(), layer)
        while time.process_time() - began < budget:
            flips = torch.rand(best.signs.shape, generator=generator) < turned
            tried = SignWeight(best.signs ^ flips, best.row_scale, best.column_scale)
            tried = descend(tried, layer.weight, layer.hessian, sweeps=4, refit_columns=False)
            errors = row_errors(tried.dense(), layer)
            best.signs = torch.where((errors < lowest).unsqueeze(1), tried.signs, best.signs)
            lowest = torch.minimum(errors, lowest)
        return polished(best, layer)

    return run


def metropolis(layer: Layer, budget: float, *, hot: float, cold: float, replicas: int = 1) -> Solver:
    """Simulated annealing over single flips, column by column for all rows, temperature falling geometrically.

    hot, cold: temperatures in units of the mean of a²b²H_jj of a row. The best state of every row is kept.
    """

    def run(sweeps: int, generator: torch.Generator) -> SignWeight:
        found = simulated_annealing(layer, sweeps=sweeps, hot=hot, cold=cold, replicas=replicas, generator=generator)
        return polished(found, layer)

    return partial(run, steps_within(budget, run, trial=4))


def annealed(layer: Layer, budget: float, **options: object) -> Solver:
    """Quasi-quantum annealing."""

    def run(steps: int, generator: torch.Generator) -> SignWeight:
        schedule = Schedule(steps=steps, **options)
        return quasi_quantum_annealing(layer.start, layer.weight, layer.hessian, generator=generator, schedule=schedule)

    return partial(run, steps_within(budget, run, trial=20))


def steps_within(budget: float, run: Callable[[int, torch.Generator], SignWeight], *, trial: int) -> int:
    """Steps for which there is time, from the time of `trial` and of three times as many steps."""
    few, many = (
        min(timed(partial(run, steps, torch.Generator()))[1] for _ in range(3)) for steps in (trial, 3 * trial)
    )
    return max(1, trial + int((budget - few) / max(many - few, 1e-6) * 2 * trial))


def simulated_annealing(
    layer: Layer, *, sweeps: int, hot: float, cold: float, replicas: int, generator: torch.Generator
) -> SignWeight:
    """All rows and replicas at once; matrices are transposed, (in, replicas · out), as in `gptq` and `signs`."""
    start, H = layer.start, layer.hessian
    width, out = len(H), len(layer.weight)
    unit = (start.dense().square() * H.diagonal()).mean(1).clamp_min(1e-30).repeat(replicas)
    T = start.dense().repeat(replicas, 1).T.contiguous()
    D = layer.weight.repeat(replicas, 1).T - T
    best, lowest = start.dense().T.contiguous(), row_errors(start.dense(), layer)
    for sweep in range(sweeps):
        temperature = hot * (cold / hot) ** (sweep / max(1, sweeps - 1))
        for first in range(0, width, BLOCK):
            now = slice(first, min(first + BLOCK, width))
            t = T[now].clone()
            # -temperature · log(uniform) is the dearest flip that this proposal accepts; one draw serves all rows.
            draw = torch.rand(len(t), replicas, 1, generator=generator).clamp_min_(1e-30).log_().mul_(-temperature / 4)
            limit = draw.expand(-1, replicas, out).reshape(len(t), -1) * unit
            metropolis_block(t, H[now] @ D, H[now, now], limit)
            D[now] += T[now] - t
            T[now] = t
        error, which = ((H @ D) * D).sum(0).view(replicas, out).min(0)
        state = T.view(width, replicas, out).gather(1, which.expand(width, 1, out)).squeeze(1)
        best = torch.where(error < lowest, state, best)
        lowest = torch.minimum(error, lowest)
    return SignWeight((~torch.signbit(best)).T.contiguous(), start.row_scale, start.column_scale)


def metropolis_block(t: Tensor, gradient: Tensor, H: Tensor, limit: Tensor) -> None:
    """One proposal per entry of t (block, rows), in place: flip where it costs less than 4 · limit."""
    diagonal = H.diagonal().unsqueeze(1)
    x = gradient.addcmul_(t, diagonal)
    coupling = 2 * (H - torch.diag(H.diagonal()))
    flips = torch.zeros_like(t)
    for first in range(0, len(t), SUB_BLOCK):
        sub = slice(first, min(first + SUB_BLOCK, len(t)))
        own, reach = x[sub], coupling[sub, sub].unsqueeze(2)
        for j, column in enumerate(range(sub.start, sub.stop)):
            flips[column] = torch.where(t[column] * own[j] < limit[column], t[column], 0.0)
            own.addcmul_(reach[:, j], flips[column])
        t[sub] -= 2 * flips[sub]
        if sub.stop < len(t):
            x[sub.stop :].addmm_(coupling[sub.stop :, sub], flips[sub])


SOLVERS: dict[str, Callable[[Layer, float], Solver]] = {
    "descent until nothing changes": descent,
    "descent, restarts with 2 % turned": partial(restarts, turned=0.02),
    "descent, restarts with 10 % turned": partial(restarts, turned=0.1),
    "Metropolis, 1 to 0.01": partial(metropolis, hot=1.0, cold=0.01),
    "Metropolis, 0.3 to 0.05": partial(metropolis, hot=0.3, cold=0.05),
    "Metropolis, 0.3 to 0.05, 4 replicas": partial(metropolis, hot=0.3, cold=0.05, replicas=4),
    "quasi-quantum": annealed,
    "quasi-quantum, γ stays 0": partial(annealed, gamma=(0.0, 0.0)),
    "quasi-quantum, γ 0 to 1": partial(annealed, gamma=(0.0, 1.0)),
    "quasi-quantum, γ -2 to 0.1": partial(annealed, gamma=(-2.0, 0.1)),
    "quasi-quantum, c = 4": partial(annealed, power=4),
    "quasi-quantum, cold": partial(annealed, warmth=0.0),
    "quasi-quantum, noise 0.001": partial(annealed, temperature=1e-3),
    "quasi-quantum, 4 replicas": partial(annealed, warmth=0.9, replicas=4),
    "quasi-quantum, 4 replicas, diversity 0.003": partial(annealed, warmth=0.9, replicas=4, diversity=0.003),
    "quasi-quantum, 4 replicas, diversity 0.03": partial(annealed, warmth=0.9, replicas=4, diversity=0.03),
}


def measure(layers: dict[str, Layer], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per solver and budget: for every seed the geometric means over the layers."""
    rows = []
    for factor in args.budget:
        budgets = [factor * default_seconds(layer) for layer in layers.values()]
        for name in args.solver or SOLVERS:
            solvers = [SOLVERS[name](*pair) for pair in zip(layers.values(), budgets, strict=True)]
            seeds, seconds = [], 0.0
            for seed in range(args.seeds):
                logs = []
                for layer, solver in zip(layers.values(), solvers, strict=True):
                    found, taken = timed(partial(solver, torch.Generator().manual_seed(seed)))
                    logs.append([math.log(error) for error in layer.errors(found)])
                    seconds += taken / args.seeds
                seeds.append([math.exp(statistics.mean(column)) for column in zip(*logs, strict=True)])
            own, held = zip(*seeds, strict=True)
            row = {"solver": name, "budget": factor, "seconds": seconds, "calibration": own, "held_out": held}
            print(line_of(row), flush=True)
            rows.append(row)
    return rows


def default_seconds(layer: Layer) -> float:
    """Of annealing as method `qqa` does it."""
    run = partial(quasi_quantum_annealing, layer.start, layer.weight, layer.hessian, generator=torch.Generator())
    return min(timed(run)[1] for _ in range(3))


def line_of(row: dict[str, Any]) -> str:
    """A line of the table."""
    shown = [
        f"{statistics.median(row[k]):.3f} ({min(row[k]):.3f}-{max(row[k]):.3f})" for k in ("calibration", "held_out")
    ]
    return f"| {row['solver']} | {row['budget']:g} | {row['seconds']:.1f} | {' | '.join(shown)} |"


def main() -> None:
    """Capture, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", help="calibration text; left out: the model writes its own")
    parser.add_argument("--num-samples", type=int, default=128, help="rows to solve for; as many are held out")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--damping", type=float, default=0.03)
    parser.add_argument("--layers", default="", help="part of the names of the layers to take; default: all")
    parser.add_argument("--solver", action="append", choices=list(SOLVERS), help="default: all")
    parser.add_argument("--budget", type=float, nargs="+", default=[1.0], help="in units of the default annealing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers = capture(args)
    print(f"{len(layers)} layers; errors in units of those of `sign`: median (lowest-highest) of {args.seeds} seeds\n")
    print("| solver | time | seconds | calibration | held out |\n|---|--:|--:|--:|--:|")
    rows = measure(layers, args)
    if args.json:
        args.json.write_text(json.dumps({"options": vars(args) | {"json": None}, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
