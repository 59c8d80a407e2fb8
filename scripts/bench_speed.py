"""Speed of packed layers and models beside torch's own and llama.cpp's, in one run on the same cores.

    python scripts/bench_speed.py kernels --threads 1,2 --ggml ./ggml_matmul --json kernels.json
    python scripts/bench_speed.py overhead
    python scripts/bench_speed.py generate --model llama-1b --llamacpp llamacpp/bin/python --json generate.json
    python scripts/bench_speed.py generate --model llama-0.1b --profile --no-load

All contenders take turns inside every round, after one that is not counted, so that a busy minute hurts all alike; the
tables give medians over rounds, and in ± half the distance between the quartiles in per cent of them. Weights come from
memory: each contender goes through copies of its own, 160 MB if packed and 200 MB if dense. A large read, timed in the
same rounds, tells what memory gives. A peer that is not there is left out with a line; `peer_llamacpp.py` says how to
get it. Run with a high priority and nothing else on the machine; `--quick` only tries everything out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_llamacpp import HOW_TO_GET, Ggml, LlamaCpp
from speed_kernels import contenders_of, ggml_contenders, in_a_row, in_turns, overhead_calls, per_call, reading, spread
from speed_models import (
    ACTIVATIONS,
    FORMATS,
    SHAPES,
    Shape,
    build,
    cost_of,
    generate,
    operators,
    prompt_of,
    quiet,
    set_activation,
    stored_bytes,
)

from hf_qep.kernels.processor import processor_name

FULL: dict[str, Any] = {
    "shapes": "4096x4096,4096x11008,12288x12288,576x1536", "batches": "1,4,16,128", "pool": 160.0, "slice": 0.03,
    "read": 512.0, "rounds": 7, "model": ["llama-0.1b", "cohere2-0.1b", "llama-1b", "command-a-block"],
    "prompt": 128, "new": 32,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "shapes": "128x256,192x512", "batches": "1,4", "pool": 0.5, "slice": 0.002, "read": 4.0, "rounds": 1,
    "model": ["llama-tiny", "cohere2-tiny"], "prompt": 8, "new": 4,
}  # fmt: skip
LLAMACPP_TYPES = "Q1_0,TQ1_0,Q4_0"
GGML_TYPES = "Q1_0,TQ1_0,TQ2_0,Q4_0"
BASELINE, PEER = "torch bf16", "llama.cpp Q1_0"
Rows = list[dict[str, Any]]


# ---- tables ----


def markdown(rows: Rows) -> Iterator[str]:
    """A table; columns are the keys of the first row."""
    columns = list(rows[0])
    yield f"| {' | '.join(columns)} |"
    yield "|" + "|".join("---" if isinstance(rows[0][c], str) else "--:" for c in columns) + "|"
    yield from (f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows)


def cell(value: Any) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def ratio(of: float | None, to: float | None) -> float | None:
    """of / to, if both are there."""
    return of / to if of and to else None


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured on what; no name of the machine and no path."""
    found = {"cpu": processor_name() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "rounds": args.rounds}
    try:
        from hf_qep.kernels.native import kernels
    except ImportError:
        return found | {"kernels": "torch", "isa": "none"}
    chosen = kernels()
    if not chosen.native:
        args.absent.append("native kernels: not there, ours is the torch reference; native.kernels().why says why")
    return found | {"kernels": chosen.backend, "isa": chosen.isa or "none"}


def progress(text: str) -> None:
    """A line that is not part of the result."""
    print(text, file=sys.stderr, flush=True)


# ---- kernels ----


def kernels_command(args: argparse.Namespace) -> dict[str, Rows]:
    """Products by shape, batch and threads."""
    rows: Rows = []
    with ExitStack() as stack:
        ggml = peer(args, stack, "ggml", Ggml)
        for shape in args.shapes.split(","):
            out, into = map(int, shape.split("x"))
            ours = contenders_of(out, into, 1e6 * args.pool)
            for batch in map(int, args.batches.split(",")):
                theirs = {}
                if ggml is not None:
                    types = args.ggml_types.split(",")
                    theirs = ggml_contenders(ggml, types, (out, into, batch), 1e6 * args.pool, args.absent)
                for threads in args.threads:
                    progress(f"{shape}, batch {batch}, {threads} threads")
                    rows += products(args, (out, into, batch, threads), ours | theirs)
                for lane in theirs.values():
                    lane.close()
    return {"Products with packed weights": rows}


@torch.inference_mode()
def products(args: argparse.Namespace, setting: tuple[int, int, int, int], lanes: dict[str, Any]) -> Rows:
    """Rows of one shape, batch and number of threads."""
    out, into, batch, threads = setting
    torch.set_num_threads(threads)
    read, size = reading(args.read)
    runs = {"memory read": read} | {name: lane.runner(batch, threads) for name, lane in lanes.items()}
    times = per_call(runs, args.slice, args.rounds)
    rows = []
    for name, (seconds, half) in times.items():
        row = {"shape": f"{out}x{into}", "batch": batch, "threads": threads, "contender": name}
        if name == "memory read":
            row |= {"bits": None, "us": None, "±%": 100 * half, "Gweights/s": None, "GB/s": size / seconds / 1e9}
        else:
            bits = lanes[name].bits
            row |= {"bits": bits, "us": 1e6 * seconds, "±%": 100 * half}
            row |= {"Gweights/s": out * into * batch / seconds / 1e9, "GB/s": out * into * bits / 8 / seconds / 1e9}
            row |= {f"x {other}": ratio(times.get(other, (None,))[0], seconds) for other in (BASELINE, PEER)}
        rows.append(row)
    rows.append(rows.pop(0))  # a table's columns are those of its first row
    return rows


def overhead_command(args: argparse.Namespace) -> dict[str, Rows]:
    """What a call costs besides the work, on a matrix of 64 x 64."""
    torch.set_num_threads(1)
    progress("overhead")
    with torch.inference_mode():
        runs = {name: in_a_row([call]) for name, call in overhead_calls().items()}
        times = per_call(runs, args.slice, args.rounds)
    base = times.get("ctypes, exact", (None,))[0]
    rows = [
        {"call": name, "us": 1e6 * seconds, "±%": 100 * half, "us above ctypes": base and 1e6 * (seconds - base)}
        for name, (seconds, half) in times.items()
    ]
    return {"One call with 64 x 64 signs": rows}


def peer(args: argparse.Namespace, stack: ExitStack, option: str, kind: type) -> Any:
    """The peer that was named, or None and a remark."""
    path = getattr(args, option)
    if path is None:
        args.absent.append(f"llama.cpp: left out, --{option} not given; {HOW_TO_GET}")
        return None
    try:
        return stack.enter_context(kind(path))
    except OSError as error:
        args.absent.append(f"llama.cpp: left out, {Path(path).name} does not start ({error.strerror}); {HOW_TO_GET}")
        return None


# ---- whole models ----


def generate_command(args: argparse.Namespace) -> dict[str, Rows]:
    """Tokens per second, time to load, memory; with --profile where the time goes."""
    tables: dict[str, Rows] = {"Generation": []}
    with ExitStack() as stack, torch.inference_mode():
        llamacpp = peer(args, stack, "llamacpp", LlamaCpp)
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for name in args.model:
            shape = replace(SHAPES[name], context=max(args.prompt + args.new + 8, 256), tied=not args.untied)
            shape = replace(shape, vocab=args.vocab or shape.vocab)
            progress(f"{name}: building")
            models = {BASELINE: build(shape)} if not args.no_float else {}
            models[f"1-bit {args.format}"] = build(shape, args.format, args.table_bits or None)
            costs = {} if args.no_load else loading(args, work, name, models)
            lanes = model_lanes(args, models, prompt_of(shape, args.prompt))
            files = {} if llamacpp is None else llamacpp_files(args, llamacpp, work, name, shape)
            for lane, file in files.items():
                lanes[lane] = llamacpp_lane(args, llamacpp, lane, file, shape)
                costs[lane] = {"MB": file.stat().st_size / 1e6}
                if not args.no_load:
                    script = Path(__file__).with_name("peer_llamacpp.py")
                    costs[lane] |= cost_of([args.llamacpp, str(script), "load", str(file)], args.threads[0])
            for threads in args.threads:
                tables["Generation"] += generation(args, name, threads, lanes, costs)
            for lane in files:
                llamacpp.call("drop", name=lane)
            if args.profile:
                for label, model, how in ways_of(models):
                    title = ", ".join(filter(None, [name, label, how]))
                    progress(f"profile of {title}")
                    tables |= profile(title, model, how, prompt_of(shape, args.prompt), args.new)
            del models, lanes
    return tables


def model_lanes(args: argparse.Namespace, models: dict[str, Any], prompt: torch.Tensor) -> dict[str, Callable]:
    """Lane -> one run on so many threads."""
    lanes: dict[str, Callable] = {}

    def run(model: Any, how: str | None, cache: str | None, threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        set_activation(model, how)
        return generate(model, prompt, args.new, cache)

    for label, model, how in ways_of(models):
        for cache in (None, "static", *(["compiled"] if args.compile else [])):
            lanes[", ".join(filter(None, [label, how, cache]))] = partial(run, model, how, cache)
    return lanes


def ways_of(models: dict[str, Any]) -> Iterator[tuple[str, Any, str | None]]:
    """(label, model, how its linears take their inputs)."""
    for label, model in models.items():
        for how in (None,) if label == BASELINE else ACTIVATIONS:
            yield label, model, how


def llamacpp_files(
    args: argparse.Namespace, llamacpp: LlamaCpp, work: Path, name: str, shape: Shape
) -> dict[str, Path]:
    """Lane -> GGUF file, written if it is not there."""
    found = {}
    table = {4: "Q4_0", 8: "Q8_0"}.get(args.table_bits, "BF16")
    for kind in args.llamacpp_types.split(","):
        file = work / f"{name}-{shape.vocab}-{shape.context}-{'tied' if shape.tied else 'untied'}-{kind}-{table}.gguf"
        progress(f"{name}: {file.name}")
        try:
            if not file.is_file():
                llamacpp.call("write", file=str(file), shape=asdict(shape), kind=kind, table=table)
            found[f"llama.cpp {kind}"] = file
        except RuntimeError as error:
            file.unlink(missing_ok=True)
            args.absent.append(f"llama.cpp {kind} for {name}: {error}")
    return found


def llamacpp_lane(
    args: argparse.Namespace, llamacpp: LlamaCpp, lane: str, file: Path, shape: Shape
) -> Callable[[int], dict[str, float]]:
    """One run on so many threads."""
    llamacpp.call("load", name=lane, file=str(file), context=shape.context, threads=args.threads[0])
    sizes = {"prompt": args.prompt, "new": args.new, "every": shape.layers == 1}
    return lambda threads: llamacpp.call("run", name=lane, threads=threads, **sizes)


def loading(args: argparse.Namespace, work: Path, name: str, models: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Label -> megabytes of the files, seconds and memory of loading them in a new process."""
    found = {}
    for label, model in models.items():
        if args.quick and label == BASELINE:  # a process takes seconds to start
            continue
        progress(f"{name}: loading {label}")
        folder = work / f"{name}-{label.replace(' ', '-')}"
        with quiet():
            model.save_pretrained(folder)
        script = Path(__file__).with_name("speed_models.py")
        costs = cost_of([sys.executable, str(script), "load", str(folder)], args.threads[0])
        found[label] = {"MB": stored_bytes(folder) / 1e6} | costs
    return found


def generation(
    args: argparse.Namespace, name: str, threads: int, lanes: dict[str, Callable], costs: dict[str, dict[str, float]]
) -> Rows:
    """Rows of one model and number of threads."""
    slices = {}
    for lane, run in lanes.items():
        progress(f"{name}, {threads} threads: {lane}")
        run(threads)
        slices[lane] = partial(run, threads)
    found = in_turns(slices, args.rounds)
    median = {lane: {part: statistics.median(v[part] for v in values) for part in values[0]}
              for lane, values in found.items()}  # fmt: skip
    rows = []
    for lane, values in found.items():
        speed = {part: count / median[lane][part] for part, count in (("prefill", args.prompt), ("decode", args.new))}
        row = {"model": name, "threads": threads, "lane": lane}
        row |= {"prefill tokens/s": speed["prefill"], "decode tokens/s": speed["decode"]}
        row["±%"] = 100 * spread([v["decode"] for v in values])
        for other in (BASELINE, PEER):
            row[f"decode x {other}"] = ratio(median.get(other, {}).get("decode"), median[lane]["decode"])
        cost = next((costs[label] for label in costs if lane == label or lane.startswith(f"{label},")), {})
        row |= {column: cost.get(column) for column in ("MB", "load s", "peak MB", "MB before")}
        rows.append(row)
    return rows


def profile(title: str, model: Any, how: str | None, prompt: torch.Tensor, new: int) -> dict[str, Rows]:
    """The operators that take most of a decoded token's time, on one thread."""
    torch.set_num_threads(1)
    set_activation(model, how)
    found, sums = operators(model, prompt, new)
    whole = sums["profiled"]
    rows = [
        {"operator": row["operator"], "calls": row["calls"], "us": row["us"], "%": 100 * row["us"] / whole}
        for row in found[:15]
    ]
    outside = whole - sums["operators"]
    rows.append({"operator": "outside of operators (Python)", "calls": None, "us": outside, "%": 100 * outside / whole})
    head = f"A decoded token of {title}: {sums['wall']:.0f} us, {whole:.0f} us under the profiler"
    return {head: rows}


# ---- command line ----


def read_arguments(words: list[str] | None) -> argparse.Namespace:
    """Options, with the preset where nothing was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", default="1", help="such as 1,2")
    common.add_argument("--rounds", type=int)
    common.add_argument("--slice", type=float, help="seconds of a contender in a round")
    common.add_argument("--json", type=Path, help="also write the rows to this file")
    common.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    kernels = commands.add_parser("kernels", parents=[common], help="products by shape and batch")
    kernels.add_argument("--shapes", help="outxin,...")
    kernels.add_argument("--batches")
    kernels.add_argument("--pool", type=float, help="megabytes of packed copies")
    kernels.add_argument("--read", type=float, help="megabytes of the large read")
    kernels.add_argument("--ggml", help="the harness that peer_llamacpp.py compiles")
    kernels.add_argument("--ggml-types", default=GGML_TYPES)
    commands.add_parser("overhead", parents=[common], help="cost of a call")
    models = commands.add_parser("generate", parents=[common], help="tokens per second")
    models.add_argument("--model", action="append", choices=list(SHAPES))
    models.add_argument("--format", choices=FORMATS, default="sign")
    models.add_argument("--table-bits", type=int, choices=(0, 4, 8), default=4, help="of embedding and head; 0: float")
    models.add_argument("--untied", action="store_true", help="a head of its own")
    models.add_argument("--vocab", type=int)
    models.add_argument("--prompt", type=int, help="tokens of the prompt")
    models.add_argument("--new", type=int, help="tokens that are timed")
    models.add_argument("--compile", action="store_true", help="also torch.compile the decode step")
    models.add_argument("--profile", action="store_true", help="where the time of a token goes")
    models.add_argument("--no-float", action="store_true", help="without the float model")
    models.add_argument("--no-load", action="store_true", help="without loading in new processes")
    models.add_argument("--work", type=Path, help="folder of the written models, kept; default: a temporary one")
    models.add_argument("--llamacpp", help="Python of llama.cpp's environment")
    models.add_argument("--llamacpp-types", default=LLAMACPP_TYPES)
    args = parser.parse_args(words)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.threads, args.absent = [int(n) for n in args.threads.split(",")], []
    return args


def main(words: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = read_arguments(words)
    known, before = facts(args), torch.get_num_threads()
    commands = {"kernels": kernels_command, "overhead": overhead_command, "generate": generate_command}
    try:
        tables = commands[args.command](args)
    finally:
        torch.set_num_threads(before)
    print("; ".join(f"{key} {value}" for key, value in known.items()))
    for title, rows in tables.items():
        print(f"\n{title}\n")
        print("\n".join(markdown(rows)))
    for line in args.absent:
        print(f"\n* {line}")
    if args.json:
        found = {"command": args.command, "facts": known, "tables": tables, "absent": args.absent}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
