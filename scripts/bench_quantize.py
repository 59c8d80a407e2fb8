"""Time of each phase of quantising a layer: moments, correction, every solver, and the products that GPTQ cannot avoid.

    python scripts/bench_quantize.py --shapes minilm --repeats 5 --threads 1
    python scripts/bench_quantize.py --shapes llama --json times.json

Phases are interleaved and the table gives medians of processor seconds, so that a busy machine hurts all alike; on an
accelerator it gives wall seconds after a synchronisation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_qep.algorithms.gptq import BLOCK
from hf_qep.algorithms.moments import Moments, damped
from hf_qep.algorithms.qep import correct_target
from hf_qep.methods.problem import LayerProblem
from hf_qep.registry import METHODS

SHAPES = {
    "minilm": [(384, 384), (1536, 384), (384, 1536)],
    "llama": [(2048, 2048), (5632, 2048), (2048, 5632)],
}
"""(out, in) of the linears of a block."""

COUNTS = {
    "minilm": {(384, 384): 4, (1536, 384): 1, (384, 1536): 1},
    "llama": {(2048, 2048): 4, (5632, 2048): 2, (2048, 5632): 1},
}
"""How many of each a block has."""

DAMPING = 0.03
ONE_BIT = ("rtn", "gptq", "onebit", "sign")


def problem_of(out_features: int, in_features: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Activations with a falling spectrum and a common offset, as real ones have, and a random weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_features, generator=generator) * torch.logspace(0, -1, in_features)
    x += x.mean(1, keepdim=True) + 0.3 * torch.randn(in_features, generator=generator)
    noisy = x + 0.1 * torch.randn(x.shape, generator=generator)
    weight = 0.03 * torch.randn(out_features, in_features, generator=generator)
    return {name: t.to(device) for name, t in {"x": x, "noisy": noisy, "weight": weight}.items()}


def needed_products(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    """What GPTQ as published is made of: factor, inverse, factor of the inverse, and the lazy rank-k updates."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    remaining = weight.clone()
    for start in range(0, weight.shape[1] - BLOCK, BLOCK):
        stop = start + BLOCK
        remaining[:, stop:].addmm_(weight[:, start:stop], factor[start:stop, stop:], alpha=-1)


def phases_of(shape: tuple[int, int], tokens: int, device: str, methods: list[str]) -> dict[str, Callable[[], object]]:
    """Name -> what to time."""
    data = problem_of(*shape, tokens, device)
    moments = Moments(shape[1], cross=True, device=device)
    moments.update(data["noisy"], data["x"])
    H, C, W = moments.hessian(), moments.cross(), data["weight"]
    definite = damped(H, DAMPING)
    phases: dict[str, Callable[[], object]] = {
        "moments": lambda: Moments(shape[1], cross=True, device=device).update(data["noisy"], data["x"]),
        "correction": lambda: correct_target(W, H, C, strength=1.0, damping=DAMPING),
        "needed": lambda: needed_products(W, definite),
    }
    for name in methods:
        method = METHODS.get(name)
        problem = LayerProblem(W, H, method.spec(1.0, None, *shape), DAMPING, torch.Generator().manual_seed(0))
        phases[name] = lambda method=method, problem=problem: method.solve(problem)
    return phases


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Processor seconds on the CPU, wall seconds elsewhere."""
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(shape: tuple[int, int], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every phase, taken in turn after one unmeasured round."""
    phases = phases_of(shape, args.tokens, args.device, args.method)
    taken: dict[str, list[float]] = {name: [] for name in phases}
    for repeat in range(args.repeats + 1):
        for name, call in phases.items():
            seconds = seconds_of(call, args.device)
            if repeat:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def with_ratios(row: dict[str, float]) -> dict[str, float]:
    """The row and the two ratios that the project promises to keep: gptq/needed and sign/gptq."""
    pairs = {"gptq/needed": ("gptq", "needed"), "sign/gptq": ("sign", "gptq")}
    return row | {name: row[a] / row[b] for name, (a, b) in pairs.items() if a in row and b in row}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One line per shape; milliseconds, ratios as they are."""
    names = list(next(iter(rows.values())))
    print(f"{'ms':<16}" + "".join(f"{name:>13}" for name in names))
    for label, row in rows.items():
        cells = (f"{row[n]:13.2f}" if "/" in n else f"{1e3 * row[n]:13.1f}" for n in names)
        print(f"{label:<16}" + "".join(cells))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), action="append", help="default: all")
    parser.add_argument("--method", choices=METHODS.names(), action="append", help=f"default: {', '.join(ONE_BIT)}")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the moments")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    args = parser.parse_args()
    args.method = args.method or list(ONE_BIT)
    torch.set_num_threads(args.threads)
    rows: dict[str, dict[str, float]] = {}
    for family in args.shapes or list(SHAPES):
        measured = {shape: measure(shape, args) for shape in SHAPES[family]}
        for shape, row in measured.items():
            rows[f"{shape[0]}x{shape[1]}"] = with_ratios(row)
        names = next(iter(measured.values()))
        total = {n: sum(COUNTS[family][s] * measured[s][n] for s in measured) for n in names}
        rows[f"{family} block"] = with_ratios(total)
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps({"options": vars(args) | {"json": None}, "seconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
