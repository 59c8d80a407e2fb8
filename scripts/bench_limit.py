"""A checkpoint several times larger than the memory a process may take: is it quantised, evaluated and loaded?

    python scripts/bench_limit.py                              # 3 GB under 600 MB; 15 minutes on one busy core
    python scripts/bench_limit.py --layers 4 --work FOLDER     # smaller, and what is written stays for the next run

Makes a random Llama in bfloat16, tensor by tensor, and takes each step in a process of its own whose address space is
limited (RLIMIT_AS) to what the interpreter and the imported libraries take, and --allow more. Prints a line of JSON per
step: whether it ended well, seconds, the limit, and the highest address space and resident memory beyond those of the
interpreter, in bytes. The limit counts files that are mapped to memory, which the system could let go of: a
limit of resident memory of the same size is milder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_qep.heaps import limit_heaps

SHARD, PACKED_SHARD = "500MB", "100MB"
"""Largest files. Opening one takes twice its size in addresses for a moment."""
HEAD_SIZE = 64
TEXT = Path(__file__).resolve().parent.parent / "hf_qep" / "demo_text" / "held_out.txt"
STEPS = ("float", "quantise", "evaluate", "load", "generate")


# ---- the checkpoint ----


def make_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """Write config, tokenizer and shards of random weights; one tensor at a time is in memory."""
    from speed_models import random_floats
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_qep.engine.assembly import split_into_files, tensors_in_files
    from hf_qep.engine.headers import INDEX_FILE
    from hf_qep.engine.tensor_files import Described, write_tensors

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD_SIZE,
        num_key_value_heads=args.hidden // HEAD_SIZE,
        vocab_size=args.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        state = tensors_in_files(LlamaForCausalLM(config).bfloat16())
    like = {name: Described.of(tensor) for name, tensor in state.items()}

    def values(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(like[name].shape, dtype=torch.bfloat16)
        return random_floats(name, state[name])

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    split = split_into_files(like, SHARD)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: like[name] for name in names}, values)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# ---- a step, in the process that is limited ----


def within(allowance: int, step: str, words: list[str]) -> None:
    """Take a step with so many more bytes of address space than there are now, and print what it took."""
    work = prepare(step, words)
    held = sizes()
    limit_address_space(held["VmSize"] + allowance)
    limit_heaps()
    began, worked, error = time.perf_counter(), time.process_time(), None
    try:
        work()
    except (Exception, SystemExit) as stopped:
        if not isinstance(stopped, SystemExit) or stopped.code:
            error = f"{type(stopped).__name__}: {(str(stopped).strip().splitlines() or [''])[0]}"
    seconds, worked, now = time.perf_counter() - began, time.process_time() - worked, sizes()
    print(
        json.dumps(
            {
                "step": step,
                "ok": error is None,
                "error": error,
                "seconds": round(seconds, 1),
                "processor_seconds": round(worked, 1),
                "limit": allowance,
                "address_space": now["VmPeak"] - held["VmSize"],
                "resident": now["VmHWM"] - held["VmRSS"],
                "interpreter": held["VmRSS"],
            }
        )
    )
    sys.stdout.flush()
    os._exit(error is not None)


def prepare(step: str, words: list[str]) -> Callable[[], object]:
    """Import all that a step needs, so that the limit leaves it out, and return what takes it."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import hf_qep.cli.eval
    import hf_qep.cli.job
    import hf_qep.evaluation.pair
    import hf_qep.evaluation.samples  # noqa: F401
    from hf_qep.cli import main
    from hf_qep.engine.source import load_float_model, load_quantized
    from hf_qep.kernels import native

    native.kernels()
    torch.set_num_threads(1)
    if step == "float":
        return lambda: load_float_model(Path(words[0]))
    if step == "load":
        return lambda: load_quantized(Path(words[0]))
    if step == "generate":
        return lambda: generate(load_quantized(Path(words[0])))
    sys.argv = ["hf-qep", *words]
    return main


@torch.no_grad()
def generate(model: Any, prompt: int = 64, new: int = 16) -> None:
    """A few tokens behind a prompt."""
    ids = torch.arange(prompt)[None] % 256
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new)


def sizes() -> dict[str, int]:
    """Bytes of address space and of resident memory, now and at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {name: int(size) << 10 for name, size in re.findall(r"(Vm(?:Size|Peak|RSS|HWM)):\s+(\d+) kB", status)}


def limit_address_space(limit: int) -> None:
    """For this process, from now on."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ---- all steps ----


def measure(args: argparse.Namespace, work: Path) -> None:
    """Make the checkpoint if it is not there, take the steps one after the other and print what each of them took."""
    source, out = work / f"float-{args.hidden}-{args.ffn}-{args.layers}-{args.vocab}", work / "packed"
    if not source.exists():
        began = time.perf_counter()
        make_checkpoint(source, args)
        print(json.dumps({"step": "make", "seconds": round(time.perf_counter() - began, 1)}))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(json.dumps({"checkpoint": size, "times the limit": round(size / args.allow, 1)}))
    rows = ["--num-samples", str(args.rows), "--seq-len", str(args.tokens), "--batch-size", "4"]
    scored = ["--max-tokens", str(args.scored), "--window", str(args.tokens), "--stride", str(args.tokens)]
    commands = {
        "float": [str(source)],
        "quantise": ["quantize", str(source), "--out", str(out), "--effort", "fast", "--method", args.method]
        + ["--dataset", str(TEXT), *rows, "--shard-size", PACKED_SHARD, "--overwrite", "--quiet"],
        "evaluate": ["eval", str(out), "--baseline", str(source), *scored, "--batch-size", "2", "--samples", "0"]
        + ["--quiet"],
        "load": [str(out)],
        "generate": [str(out)],
    }
    for step in args.steps:
        print(json.dumps(take(step, commands[step], args)))
        sys.stdout.flush()


def take(step: str, words: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What a step took in a process of its own."""
    command = [sys.executable, __file__, "--within", str(args.allow), step, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if args.verbose:
        print(done.stdout, done.stderr, file=sys.stderr)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"step"')]
    said = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    row = {"step": step, "ok": False, "error": f"exit code {done.returncode}", "limit": args.allow}
    row |= json.loads(found[-1]) if found else {}
    return row if row["ok"] else row | {"error": said[-1] if said else row["error"]}


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--within"]:
        within(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where files are written; default: a temporary folder")
    parser.add_argument("--allow", type=float, default=600, help="megabytes beyond the interpreter and its libraries")
    for name, value in (("hidden", 2048), ("ffn", 4096), ("layers", 36), ("vocab", 16384)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--rows", type=int, default=4, help="of calibration and of a pass")
    parser.add_argument("--tokens", type=int, default=128, help="of each row, and of each window of the evaluation")
    parser.add_argument("--scored", type=int, default=512, help="tokens of the evaluation")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--verbose", action="store_true", help="what the steps print, too")
    args = parser.parse_args()
    args.allow = int(args.allow * 1e6)
    torch.set_num_threads(1)
    if args.work is not None:
        measure(args, args.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
