"""What a model costs on a small machine: float and 1-bit in transformers, and the exported GGUF file in llama.cpp.

    python scripts/bench_edge.py make llama-1b --work WORK
    python scripts/bench_edge.py run --original WORK/float --checkpoint WORK/1bit --llamacpp llamacpp/bin/python
    hf-qep quantize hf_qep/demo_model --out demo-1bit --export gguf
    python scripts/bench_edge.py agree --checkpoint demo-1bit --llamacpp llamacpp/bin/python

`make` writes a model of random weight, for only size and speed count, with the tokenizer of the demo model. `run` has
every contender in a process of its own that stays; all take turns inside every round, on as many threads as asked,
after a run that is not counted. It gives medians over rounds of tokens per second and of processor seconds per token,
all threads together, which is what a battery feels. Resident memory is that of the process and its interpreter after a
run. `agree` sets llama.cpp beside transformers on text: tokens, logits, perplexity, and what both write greedily.
llama.cpp lives in an environment of its own; `peer_llamacpp.py` says how to get it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_speed import facts, markdown, progress
from peer_llamacpp import HOW_TO_GET, LlamaCpp, Peer
from speed_models import SHAPES, build, quiet, stored_bytes
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_qep.cli.demo import DEMO_MODEL, HELD_OUT
from hf_qep.errors import QepError
from hf_qep.export.gguf_file import export_gguf

PROMPTS = (
    "The old man opened the door, and", "Once upon a time", "She said", "It was a dark night in the",
    "The king of the country", "In the morning the boy went", "He took the letter and read:", "Far away on the sea",
)  # fmt: skip
NEW, WINDOW = 48, 256


class Lane(Peer):
    """A model of transformers in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__([sys.executable, str(Path(__file__).with_name("edge_lane.py")), str(folder), *options])

    def call(self, verb: str, **request: Any) -> dict[str, Any]:
        """Do it."""
        return json.loads(self.ask(json.dumps({"verb": verb, **request})))


def resident(process: int) -> dict[str, float]:
    """Megabytes of a process now and at most."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) * 1024 / 1e6 for name, key in (("MB", "VmRSS"), ("peak MB", "VmHWM"))}


def make_command(args: argparse.Namespace) -> None:
    """A float folder and a 1-bit folder of random weights, with a row of the embedding for every token."""
    tokens = AutoConfig.from_pretrained(DEMO_MODEL).vocab_size
    shape = replace(SHAPES[args.shape], vocab=max(tokens, SHAPES[args.shape].vocab))
    for name, form in (("float", None), ("1bit", "group128")):
        progress(f"{args.shape}: {name}")
        with quiet():
            build(shape, form).save_pretrained(args.work / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(DEMO_MODEL / file, args.work / name)


def exported(args: argparse.Namespace, stack: ExitStack) -> Path:
    """The GGUF file that was named, or one made now."""
    if args.gguf is not None:
        return args.gguf
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
    export_gguf(args.checkpoint, file)
    return file


def run_command(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of all contenders."""
    rows = []
    with ExitStack() as stack:
        file, lanes, sizes = exported(args, stack), {}, {}
        llama = stack.enter_context(LlamaCpp(args.llamacpp))
        vocab = AutoConfig.from_pretrained(args.checkpoint).vocab_size
        ids = [3 + i * 7 % (vocab - 3) for i in range(args.prompt)]
        for name, folder, options in [
            ("transformers bf16", args.original, ["--dtype", "bfloat16"]),
            ("transformers 1-bit, exact", args.checkpoint, ["--activation", "exact"]),
            ("transformers 1-bit, int8", args.checkpoint, ["--activation", "int8"]),
        ]:
            if folder is not None:
                lanes[name] = stack.enter_context(Lane(folder, *options))
                sizes[name] = stored_bytes(folder) / 1e6
        for name, lane in lanes.items():
            progress(f"load {name}")
            lane.call("load")
        llama.call("load", name="m", file=str(file), context=max(256, args.prompt + args.new + 8), threads=1)
        sizes["llama.cpp Q1_0"] = file.stat().st_size / 1e6
        for threads in args.threads:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in (*lanes, "llama.cpp Q1_0")}
            for turn in range(args.rounds + 1):
                progress(f"{threads} threads, round {turn}")
                for name, lane in lanes.items():
                    found[name].append(lane.call("run", threads=threads, ids=ids, new=args.new))
                times = llama.call("run", name="m", prompt=args.prompt, new=args.new, threads=threads)
                found["llama.cpp Q1_0"].append(times)
            memory = {name: resident(lane.process.pid) for name, lane in (lanes | {"llama.cpp Q1_0": llama}).items()}
            rows += [
                row_of(name, threads, values[1:], args.new, sizes[name], memory[name]) for name, values in found.items()
            ]
    return {"rows": rows}


def row_of(
    name: str, threads: int, values: list[dict[str, float]], new: int, size: float, memory: dict[str, float]
) -> dict[str, Any]:
    """Medians of one contender."""
    decode, cpu = (statistics.median(v[part] for v in values) / new for part in ("decode", "decode_cpu"))
    prefill = statistics.median(v["prefill"] for v in values)
    row = {"contender": name, "threads": threads, "tokens/s": 1 / decode, "CPU ms per token": 1e3 * cpu}
    return row | {
        "first token ms": 1e3 * prefill,
        "files MB": size,
        "resident MB": memory["MB"],
        "peak MB": memory["peak MB"],
    }


def agree_command(args: argparse.Namespace) -> dict[str, Any]:
    """How nearly llama.cpp computes what transformers computes, over all whole windows of a text."""
    torch.set_num_threads(1)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tokenizer, text = AutoTokenizer.from_pretrained(args.checkpoint), args.text.read_text(encoding="utf-8")
    ids = tokenizer(text).input_ids
    with ExitStack() as stack, torch.inference_mode():
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        llama = stack.enter_context(LlamaCpp(args.llamacpp))
        llama.call("load", name="m", file=str(exported(args, stack)), context=2 * WINDOW, threads=1)
        same = llama.call("tokens", name="m", text=text)["tokens"] == ids
        sums: list[torch.Tensor] = []
        for first in range(0, len(ids) - WINDOW + 1, WINDOW):
            window = ids[first : first + WINDOW]
            llama.call("logits", name="m", tokens=window, out=str(work / "logits.npy"))
            there, own = torch.from_numpy(np.load(work / "logits.npy")), model(torch.tensor([window])).logits[0]
            sums.append(differences(there, own, torch.tensor(window)))
        written = [greedy(model, llama, tokenizer(prompt).input_ids) for prompt in PROMPTS]
    kl, other, mine, alike, wrong, spread = torch.cat(sums, 1).mean(1).tolist()
    return {
        "tokens_are_the_same": same,
        "tokens": len(sums) * WINDOW,
        "kl": kl,
        "perplexity_llama_cpp": float(np.exp(other)),
        "perplexity_transformers": float(np.exp(mine)),
        "same_first_choice": alike,
        "logits_error": (wrong / spread) ** 0.5,
        "greedy_texts": len(PROMPTS),
        "greedy_the_same": sum(found is None for found in written),
        "margin_where_they_part": [found for found in written if found is not None],
    }


def differences(there: torch.Tensor, own: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(6, tokens - 1): KL, both losses, the same choice, squared error of the logits and their variance."""
    there, own, target = there[:-1], own[:-1].float(), ids[1:, None]
    q, p = there.log_softmax(-1), own.log_softmax(-1)
    losses = [-log.gather(1, target)[:, 0] for log in (q, p)]
    kl, alike = (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()
    return torch.stack([kl, *losses, alike, (there - own).square().mean(-1), own.var(-1)])


def greedy(model: Any, llama: LlamaCpp, ids: list[int]) -> float | None:
    """None if both write the same NEW tokens, or the distance between the two best logits of transformers where they
    first part."""
    there = llama.call("greedy", name="m", tokens=ids, new=NEW)["tokens"]
    for count, token in enumerate(there):
        logits = model(torch.tensor([ids + there[:count]])).logits[0, -1]
        best = logits.topk(2).values
        if logits.argmax().item() != token:
            return float(best[0] - best[1])
    return None


def read_arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="a model of random weight")
    making.add_argument("shape", choices=SHAPES)
    making.add_argument("--work", type=Path, required=True)
    for name in ("run", "agree"):
        command = commands.add_parser(name)
        command.add_argument("--checkpoint", type=Path, required=True, help="1-bit folder that can be exported")
        command.add_argument("--gguf", type=Path, help="its GGUF file; left out: it is exported now")
        command.add_argument("--llamacpp", required=True, help="Python of an environment with llama-cpp-python")
        command.add_argument("--json", type=Path, help="also write the numbers to this file")
        if name == "agree":
            command.add_argument("--text", type=Path, default=HELD_OUT, help="left out: the bundled tales")
            continue
        command.add_argument("--original", type=Path, help="float folder")
        command.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
        command.add_argument("--prompt", type=int, default=32)
        command.add_argument("--new", type=int, default=32)
        command.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Do what was asked and print it."""
    args = read_arguments(words)
    if args.command == "make":
        make_command(args)
        return
    try:
        found = (run_command if args.command == "run" else agree_command)(args)
    except (OSError, QepError) as error:
        sys.exit(f"{error}; {HOW_TO_GET}" if isinstance(error, OSError) else str(error))
    if args.json is not None:
        args.absent, args.rounds = [], getattr(args, "rounds", 1)
        args.json.write_text(json.dumps({"machine": facts(args)} | found, indent=1) + "\n")
    if args.command == "run":
        print("\n".join(markdown(found["rows"])))
    else:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
