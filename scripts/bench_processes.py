"""One process against several with one thread each: seconds of the same job on a random model, in turns.

    python scripts/bench_processes.py                          # width 512, two blocks, one and two processes
    python scripts/bench_processes.py --width 1024 --processes 4 --rounds 1

Every run is a job of its own processes, started by torchrun; counted is the time from when they have found each other
to when the output has been read back. Processor seconds say more where the machine has other work: a process that waits
takes none. The files of all runs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_qep.cli.job import stream_and_save
from hf_qep.config import QepConfig
from hf_qep.engine.on_demand import load_on_demand
from hf_qep.engine.together.launch import joined
from hf_qep.files import sha256

HEAD_SIZE, VOCABULARY, LENGTH = 64, 256, 256


def make_model(folder: Path, width: int, depth: int) -> None:
    """Write a Llama of random weights, three times as wide inside its mlp."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": width // HEAD_SIZE, "num_key_value_heads": width // HEAD_SIZE}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY)).save_pretrained(folder)


def run_part(folder: Path, out: Path, method: str, tokens: int) -> None:
    """The part of this process in the job; the first one prints seconds, by phase too."""
    torch.set_num_threads(1)
    ids = torch.randint(VOCABULARY, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    config = QepConfig(method=method, dataset=ids, num_samples=len(ids), seq_len=LENGTH)
    with joined(torch.device("cpu")) as processes:
        began, spent = time.perf_counter(), time.process_time()
        model, blocks, tokenizer = load_on_demand(folder)
        names = {"base_model": "random", "base_folder": folder}
        saved = stream_and_save(model, blocks, tokenizer, config, out, **names, processes=processes)
        seconds, spent = time.perf_counter() - began, processes.gather(time.process_time() - spent)
    if saved is not None:
        print(json.dumps({"seconds": seconds, "processor": spent, "phases": saved.report.to_dict()["seconds"]}))


def measure(folder: Path, out: Path, processes: int, method: str, tokens: int) -> dict[str, Any]:
    """What `run_part` prints, and the digest of the weights."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    words = ["--part", str(folder), str(out), "--method", method, "--tokens", str(tokens)]
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *words], env=os.environ | threads, check=True, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"sha256": sha256(out / "model.safetensors")}


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--method", default="sign")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(*args.part, args.method, args.tokens)
        return
    found: dict[int, list[dict[str, Any]]] = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place, "model"), args.width, args.depth)
        for turn in range(args.rounds):
            for count, runs in found.items():
                out = Path(place, f"{turn}-{count}")
                runs.append(measure(Path(place, "model"), out, count, args.method, args.tokens))
    for count, runs in found.items():
        middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in middle["phases"].items())
        seconds = ", ".join(f"{run['seconds']:.1f}" for run in runs)
        spent = ", ".join(f"{spent:.1f}" for spent in middle["processor"])
        print(f"{count} processes: {seconds} s; processor seconds of each: {spent}; first one: {phases}")
    one, several = (median(run["seconds"] for run in runs) for runs in found.values())
    same = len({run["sha256"] for runs in found.values() for run in runs}) == 1
    print(f"{one / several:.2f} times as fast; files {'equal' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
