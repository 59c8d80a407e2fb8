"""What quantising costs as models grow: the table behind `hf-qep plan`, and whole runs beside what it foretells.

    python scripts/bench_scale.py costs                       # two minutes; into the user's cache, where the plan looks
    python scripts/bench_scale.py costs --out costs.json
    python scripts/bench_scale.py runs                        # random models of growing width, depth and tokens
    python scripts/bench_scale.py block --divisor 4 --profile   # one block of Command A, its widths divided by four
    python scripts/bench_scale.py block --divisor 1 --threads 2 --json block.json   # the real one: 20 GB, about an hour
    python scripts/bench_scale.py memory --model FOLDER --text FILE   # peak of a real run beside the planned ones

`costs` times each phase of the engine on random linears, in processor seconds if it has one thread, and counts the
memory that correcting and solving a linear takes. `runs` quantises random models and fits exponents of width, depth and
tokens. `memory` runs `hf-qep quantize --effort fast` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from bench_quantize import DAMPING, problem_of, seconds_of
from scale_block import measure_block, print_block
from torch import nn

from hf_qep.algorithms.moments import Moments
from hf_qep.algorithms.qep import correct_target
from hf_qep.architectures.parts import Group, LinearRef
from hf_qep.config import QepConfig
from hf_qep.engine.block import Job, solve_group
from hf_qep.engine.planning import costs
from hf_qep.engine.recipes import Recipe
from hf_qep.engine.report import QuantizationReport
from hf_qep.files import write_text_aside
from hf_qep.methods.problem import LayerProblem
from hf_qep.modules import packed_like
from hf_qep.registry import METHODS

WIDTHS = (256, 512, 1024, 2048, 4096)
TOKENS = 512
WIDEST = {"qqa": 512, "factored": 512}
"""Solvers that make so many products that wider ones take too long."""
RATIOS = (1 / 12, 1 / 3, 1.0, 3.0)
"""out / in of the linears whose workspace is counted: those of a large decoder."""
HEAD_SIZE = 64
DISK_BYTES = 1 << 27
RUNS = [(256, 1, 1024), (256, 2, 1024), (256, 1, 2048), (512, 1, 1024), (512, 2, 2048)]
"""(width, blocks, calibration tokens)."""


def timed(call: Callable[[], object]) -> float:
    """Seconds of the faster of two calls after one that is not counted."""
    clock = seconds_of if torch.get_num_threads() == 1 else _wall_seconds
    call()
    return min(clock(call, "cpu") for _ in range(2))


def _wall_seconds(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def phase_seconds(width: int) -> Iterable[tuple[str, float]]:
    """(phase, seconds per operation) of square linears of a width."""
    data = problem_of(width, width, TOKENS, "cpu")
    x, weight, product = data["x"], data["weight"], 2.0 * TOKENS * width**2
    for name in ("float32", "bfloat16"):
        a, b = (t.to(getattr(torch, name)) for t in (x, weight))
        yield f"float.{name}", timed(lambda a=a, b=b: nn.functional.linear(a, b)) / product
    for name, method in (("sign", "sign"), ("factored", "factored")):
        module = _packed(method, width)
        yield f"packed.{name}", timed(lambda module=module: module(x)) / product
    moments = Moments(width, cross=True)
    yield "moments", timed(lambda: moments.update(data["noisy"], x)) / (2 * product)
    q = x.view(1, TOKENS, -1, HEAD_SIZE).transpose(1, 2)
    attention = nn.functional.scaled_dot_product_attention
    yield "attention", timed(lambda: attention(q, q, q, is_causal=True)) / (2.0 * TOKENS**2 * width)
    H, C = moments.hessian(), moments.cross()
    correcting = costs.correcting_operations(width, width)
    yield "correct", timed(lambda: correct_target(weight, H, C, damping=DAMPING)) / correcting
    for name in METHODS.names():
        if width <= WIDEST.get(name, width):
            method = METHODS.get(name)
            spec, generator = method.spec(1.0, None, width, width), torch.Generator().manual_seed(0)
            problem = LayerProblem(weight, H, spec, DAMPING, generator)
            taken = seconds_of(lambda method=method, problem=problem: method.solve(problem), "cpu")
            yield f"solve.{name}", taken / costs.solver_operations(name, width, width)


def _packed(method: str, width: int) -> nn.Module:
    model = nn.Sequential(OrderedDict(linear=nn.Linear(width, width, bias=False)))
    module = packed_like(model, "linear", METHODS.get(method).spec(1.0, None, width, width))
    module.tile()
    return module


def workspace_units(method: str) -> list[list[float]]:
    """Rows (out / in, squares, rows of the input's width) of a method, from the peaks at two widths."""
    found = []
    for ratio in RATIOS:
        widest = WIDEST.get(method, 2048)  # rows are taken by the thousand, which shows at no lower width
        narrow, wide = (
            workspace_bytes(method, max(16, round(ratio * w)), w) / (4 * w**2) for w in (widest // 2, widest)
        )
        blocks = max(0.0, (narrow - wide) * widest)
        found.append([ratio, wide - blocks / widest, blocks])
    return found


def workspace_bytes(method: str, out_features: int, in_features: int) -> int:
    """Bytes that the engine allocates at its peak while it corrects and solves a linear, moments apart."""
    model = nn.Sequential(OrderedDict(linear=nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)))
    ref = LinearRef("linear", None, "linear", out_features, in_features)
    data = problem_of(16, in_features, in_features, "cpu")
    moments = Moments(in_features, cross=True)
    moments.update(data["noisy"], data["x"])
    bits = 2.0 if method == "factored" else 1.0  # low linears have no rank of one bit
    recipe = Recipe(method, METHODS.get(method).spec(bits, None, out_features, in_features))
    job = Job(model, QepConfig(method=method), *[None] * 4, QuantizationReport(), [], {ref: recipe})
    return peak_allocated(lambda: solve_group(job, Group((ref,)), {ref: moments}))


@torch.no_grad()
def peak_allocated(run: Callable[[], object]) -> int:
    """Most bytes that torch has allocated on the processor for what `run` does, inside operators too."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    return most


def disk_rate() -> float:
    """Bytes per second of writing a file and having it flushed, in the folder for temporary files."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile() as file:
        began = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - began)


def measure_costs() -> dict[str, Any]:
    """The table as `hf_qep.engine.planning.costs` reads it."""
    phases: dict[str, list[list[float]]] = {}
    for width in WIDTHS:
        for name, seconds in phase_seconds(width):
            phases.setdefault(name, []).append([width, seconds])
    about = costs.machine() | {"torch": torch.__version__, "tokens": TOKENS}
    return {
        "version": costs.VERSION,
        "phases": phases,
        "workspace": {name: workspace_units(name) for name in METHODS.names()},
        "rate": _rate(),
        "disk": disk_rate(),
        "about": about,
    }


def _rate(width: int = costs.RATE_WIDTH) -> float:
    a = torch.randn(width, width)
    return 2.0 * width**3 / timed(lambda: a @ a)


def measure_runs() -> None:
    """Quantise random models and print seconds beside those of the plan, and exponents of width, depth and tokens."""
    rows = []
    for width, depth, tokens in RUNS:
        measured, planned = _run(width, depth, tokens)
        rows.append((width, depth, tokens, measured, planned))
        print(f"width {width:4} depth {depth} tokens {tokens:5}: {measured:7.2f} s measured, {planned:7.2f} s planned")
    logs = torch.tensor(rows, dtype=torch.float64).log()
    design = torch.cat([logs[:, :3], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    for name, column in (("measured", 3), ("planned", 4)):
        found = torch.linalg.lstsq(design, logs[:, column : column + 1]).solution.flatten().tolist()
        print(f"{name}: width^{found[0]:.2f} depth^{found[1]:.2f} tokens^{found[2]:.2f}")


def _run(width: int, depth: int, tokens: int) -> tuple[float, float]:
    """Processor seconds of the phases that are planned, and what was planned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_qep.engine.calibration import load_calibration
    from hf_qep.engine.job import quantize_model
    from hf_qep.engine.planning.job import Planner, Request

    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth, num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE, vocab_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model, length = LlamaForCausalLM(config).eval(), 128
    recipe = {"num_samples": tokens // length, "seq_len": length}
    ids = torch.randint(256, (tokens // length, length))
    rows = load_calibration(ids, None, num_samples=len(ids), seq_len=length, seed=0, model=model)
    phases = Planner(config, torch.float32, costs.load_costs()).plan(Request(recipe)).seconds.phases
    planned = sum(seconds for name, seconds in phases.items() if name not in ("read", "write"))
    return seconds_of(lambda: quantize_model(model, QepConfig(**recipe), rows), "cpu"), planned


def compare_peak_memory(folder: str, text: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Bytes at the peak of a run in a process of its own, what is planned for one that reads block by block and for
    one that has all weights in memory, and the parts of the former. recipe: options of QepConfig."""
    from hf_qep.engine.on_demand import free_memory
    from hf_qep.engine.planning.job import Planner, Request
    from hf_qep.engine.planning.origin import find_origin
    from hf_qep.evaluation.memory import working_bytes

    origin = find_origin(folder)
    planner = Planner(origin.config, origin.dtype, costs.load_costs(), process=working_bytes(), free=free_memory())
    recipe = {"effort": "fast"} | recipe
    plan = planner.plan(Request(recipe))
    words = [word for name, value in recipe.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "-c",
            "from hf_qep.cli import main; main()",
            "quantize",
            folder,
            "--out",
            f"{out}/model",
            "--dataset",
            text,
            *words,
            "--quiet",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    measured = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    ram = plan.on_cpu.ram
    planned = {"block by block": ram.bytes, "all weights": plan.whole.ram.bytes}
    return {"measured": measured, **planned, "moment": ram.moment, "parts": ram.parts}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["costs", "runs", "block", "memory"])
    parser.add_argument("--model", help="of memory: folder of a float model")
    parser.add_argument("--text", help="of memory: calibration text")
    parser.add_argument("--divisor", type=int, default=4, help="of block: what its widths are divided by")
    parser.add_argument("--tokens", type=int, default=2048, help="of block: of calibration")
    parser.add_argument("--seq-len", type=int, default=512, help="of block and memory: tokens of a row")
    parser.add_argument("--method", default="sign", help="of block and memory: solver")
    parser.add_argument("--num-samples", type=int, default=64, help="of memory: calibration rows")
    parser.add_argument("--device", default="cpu", help="of block: where it is computed")
    parser.add_argument("--profile", action="store_true", help="of block: which part is products and factorisations")
    parser.add_argument("--json", type=Path, help="of block: file for the result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=costs.cost_file(), help="of costs; default: the user's cache")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.section == "runs":
        measure_runs()
        return
    if args.section == "block":
        _block(args)
        return
    if args.section == "memory":
        recipe = {"method": args.method, "num_samples": args.num_samples, "seq_len": args.seq_len}
        print(json.dumps(compare_peak_memory(args.model, args.text, recipe)))
        return
    table = measure_costs()
    write_text_aside(args.out, json.dumps(_rounded(table), indent=1) + "\n")
    print(f"{args.out.name}: {len(table['phases'])} phases, {math.floor(table['rate'] / 1e9)} GF/s")


def _block(args: argparse.Namespace) -> None:
    where = {"method": args.method, "device": args.device, "profile": args.profile}
    found = measure_block(args.divisor, args.tokens, args.seq_len, **where)
    print_block(found)
    if args.json:
        write_text_aside(args.json, json.dumps(found, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
