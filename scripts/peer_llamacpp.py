"""llama.cpp as a peer of `bench_speed.py`: random models in GGUF files, and a process that is timed line by line.

    python3 -m venv llamacpp
    CMAKE_ARGS="-DGGML_NATIVE=ON" llamacpp/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf
    llamacpp/bin/python scripts/peer_llamacpp.py harness ggml_matmul       (compiles ggml_matmul.cpp)

Then give `--llamacpp llamacpp/bin/python` to `bench_speed.py generate` and `--ggml ./ggml_matmul` to
`bench_speed.py kernels`. If the installation has no headers of ggml, `harness --headers FOLDER` takes those of the
sources (vendor/llama.cpp/ggml/include in the package's archive). Written for llama-cpp-python 0.3.36.

`serve` and `load` are what the benchmark runs, in llama.cpp's environment. Nothing of this project is imported here.
In its last block llama.cpp drops the tokens whose output nobody asked for, transformers does not; for a model of one
block, where that is nearly all the work, the benchmark asks for every token's output.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOW_TO_GET = "scripts/peer_llamacpp.py says how to build llama.cpp"
BLOCKS: dict[str, tuple[int, list[tuple[str, Any]]]] = {
    "Q1_0": (128, [("scale", "<f2"), ("codes", "u1", 16)]),
    "TQ1_0": (256, [("codes", "u1", 52), ("scale", "<f2")]),
    "TQ2_0": (256, [("codes", "u1", 64), ("scale", "<f2")]),
    "Q4_0": (32, [("scale", "<f2"), ("codes", "u1", 16)]),
    "Q8_0": (32, [("scale", "<f2"), ("codes", "u1", 32)]),
}
"""Type -> weights of a block and its fields."""
SCALE = {"Q1_0": 0.02, "TQ1_0": 0.025, "TQ2_0": 0.02, "Q4_0": 0.004, "Q8_0": 0.0003}
"""Of every block, so that a weight is about 0.02."""
RANDOM_ROWS = 61
"""Rows that differ; they repeat, for only the time counts."""


# ---- the side of the benchmark ----


class Peer:
    """A process that answers one line with one line; a context manager that ends it."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, line: str) -> str:
        """The answer to a line. Raises RuntimeError if the process has ended."""
        try:
            self.process.stdin.write(line + "\n")
            said = self.process.stdout.readline()
        except OSError:
            said = ""
        if not said:
            raise RuntimeError(f"the peer ended with exit status {self.process.wait()} on: {line}")
        return said.strip()


class Ggml(Peer):
    """The harness of ggml's matrix product."""

    def __init__(self, executable: str) -> None:
        super().__init__([executable])

    def words(self, line: str) -> list[str]:
        """What follows `ok`. Raises RuntimeError with the reason after `no`."""
        verdict, _, rest = self.ask(line).partition(" ")
        if verdict != "ok":
            raise RuntimeError(rest)
        return rest.split()

    def make(self, name: str, kind: str, out: int, into: int, batch: int, pool: float) -> tuple[float, bool]:
        """Weights of a product; returns bits per weight and whether ggml repacked them."""
        bits, _, form = self.words(f"make {name} {kind} {out} {into} {batch} {pool:.0f}")
        return float(bits), form == "repacked"

    def run(self, name: str, calls: int, threads: int) -> float:
        """Seconds of so many calls."""
        return float(self.words(f"run {name} {calls} {threads}")[0])

    def drop(self, name: str) -> None:
        """Free the weights."""
        self.words(f"drop {name}")


class LlamaCpp(Peer):
    """Whole models; every answer is a dictionary."""

    def __init__(self, python: str) -> None:
        super().__init__([python, __file__, "serve"])

    def call(self, verb: str, **options: Any) -> dict[str, Any]:
        """Do it. Raises RuntimeError with what went wrong there."""
        found = json.loads(self.ask(json.dumps({"verb": verb, **options})))
        if "error" in found:
            raise RuntimeError(found["error"])
        return found


# ---- the side of llama.cpp ----


def write(file: str, shape: dict[str, Any], kind: str, table: str) -> dict[str, Any]:
    """A model of random weights. shape: fields of speed_models.Shape; kind, table: types of linears and embeddings."""
    import gguf
    import numpy as np

    into = gguf.GGUFWriter(file, shape["family"])
    metadata(into, shape)
    random = np.random.default_rng(0)
    made: dict[Any, Any] = {}
    for name, (rows, columns), is_table in matrices(shape):
        type_name = table if is_table else kind
        key = (rows, columns, type_name)
        if key not in made:
            made[key] = random_matrix(random, *key)
        into.add_tensor(name, made[key], raw_dtype=gguf.GGMLQuantizationType[type_name])
    for name in norms(shape):
        into.add_tensor(name, np.ones(shape["hidden"], np.float32))
    into.write_header_to_file()
    into.write_kv_data_to_file()
    into.write_tensors_to_file()
    into.close()
    return {"bytes": Path(file).stat().st_size}


def metadata(into: Any, shape: dict[str, Any]) -> None:
    """Everything but tensors; there is no vocabulary, only its size."""
    into.add_block_count(shape["layers"])
    into.add_context_length(shape["context"])
    into.add_embedding_length(shape["hidden"])
    into.add_feed_forward_length(shape["ffn"])
    into.add_head_count(shape["heads"])
    into.add_head_count_kv(shape["kv_heads"])
    into.add_key_length(shape["head_dim"])
    into.add_value_length(shape["head_dim"])
    into.add_rope_dimension_count(shape["head_dim"])
    into.add_rope_freq_base(shape["rope_theta"])
    into.add_vocab_size(shape["vocab"])
    into.add_tokenizer_model("no_vocab")
    if shape["family"] == "cohere2":
        into.add_layer_norm_eps(1e-5)
        into.add_logit_scale(shape["logit_scale"])
        into.add_sliding_window(shape["sliding_window"])
    else:
        into.add_layer_norm_rms_eps(1e-5)


def matrices(shape: dict[str, Any]) -> list[tuple[str, tuple[int, int], bool]]:
    """(name, (out, in), whether it is an embedding or a head)."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    found = [("token_embd.weight", (shape["vocab"], hidden), True)]
    if not shape["tied"]:
        found.append(("output.weight", (shape["vocab"], hidden), True))
    block = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    for i in range(shape["layers"]):
        found += [(f"blk.{i}.{name}.weight", size, False) for name, size in block.items()]
    return found


def norms(shape: dict[str, Any]) -> list[str]:
    """Names of the norms; a block of Cohere2 has one."""
    each = ("attn_norm",) if shape["family"] == "cohere2" else ("attn_norm", "ffn_norm")
    return ["output_norm.weight", *(f"blk.{i}.{name}.weight" for i in range(shape["layers"]) for name in each)]


def random_matrix(random: Any, rows: int, columns: int, kind: str) -> Any:
    """Bytes (rows, bytes of a row) of a matrix with random codes."""
    import numpy as np

    if kind == "BF16":
        some = random.normal(0, 0.02, (RANDOM_ROWS, columns)).astype(np.float32)
        some = np.ascontiguousarray(some.view(np.uint16)[:, 1::2]).view(np.uint8)
    else:
        per_block, fields = BLOCKS[kind]
        if columns % per_block:
            raise ValueError(f"{kind} needs widths that are multiples of {per_block}, not {columns}")
        blocks = np.zeros((RANDOM_ROWS, columns // per_block), np.dtype(fields))
        blocks["scale"] = SCALE[kind]
        blocks["codes"] = random.integers(0, 256, blocks["codes"].shape, np.uint8)
        some = blocks.view(np.uint8).reshape(RANDOM_ROWS, -1)
    return np.tile(some, (-(-rows // RANDOM_ROWS), 1))[:rows]


class Model:
    """A model of llama.cpp with its context."""

    def __init__(self, file: str, context: int, threads: int) -> None:
        import llama_cpp as api

        self.api = api
        began = time.perf_counter()
        self.model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {Path(file).name}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = context, max(context, options.n_batch)
        options.n_threads = options.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.seconds = time.perf_counter() - began

    def close(self) -> None:
        """Free it."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def run(self, prompt: int, new: int, threads: int, every: bool = False) -> dict[str, float]:
        """Seconds of a prompt to its first token, and of `new` further tokens, the most likely one each time.

        every: ask for the output of every token of the prompt.
        """
        api = self.api
        api.llama_set_n_threads(self.context, threads, threads)
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        began = time.perf_counter()
        token = self.next_token([3 + i * 7 % (self.vocab - 3) for i in range(prompt)], every)
        first, cpu = time.perf_counter(), time.process_time()
        for _ in range(new):
            token = self.next_token([token])
        seconds, cpu = time.perf_counter() - first, time.process_time() - cpu
        return {"prefill": first - began, "decode": seconds, "decode_cpu": cpu}

    def greedy(self, tokens: list[int], new: int) -> dict[str, list[int]]:
        """The most likely token after these, `new` times."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        found = [self.next_token(tokens)]
        while len(found) < new:
            found.append(self.next_token(found[-1:]))
        return {"tokens": found}

    def logits(self, tokens: list[int], out: str) -> dict[str, int]:
        """Write the logits float32 (tokens, vocabulary) to a file of numpy."""
        import numpy as np

        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.next_token(tokens, every=True)
        rows = [self.api.llama_get_logits_ith(self.context, i) for i in range(len(tokens))]
        np.save(out, np.stack([np.ctypeslib.as_array(row, (self.vocab,)) for row in rows]))
        return {"tokens": len(tokens)}

    def tokens(self, text: str) -> dict[str, list[int]]:
        """What llama.cpp makes of a text, special tokens included."""
        octets, vocab = text.encode(), self.api.llama_model_get_vocab(self.model)
        held = (self.api.llama_token * (len(octets) + 2))()
        count = self.api.llama_tokenize(vocab, octets, len(octets), held, len(held), True, True)
        return {"tokens": list(held[:count])}

    def next_token(self, tokens: list[int], every: bool = False) -> int:
        """The most likely token after these and what is in the cache."""
        import numpy as np

        api = self.api
        held = (api.llama_token * len(tokens))(*tokens)
        batch = api.llama_batch_get_one(held, len(tokens))
        flags = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
        if every:
            batch.logits = flags
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (self.vocab,)).argmax())


class Server:
    """What `LlamaCpp.call` can ask for."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}

    def write(self, **options: Any) -> dict[str, Any]:
        """See the function `write`."""
        return write(**options)

    def load(self, name: str, **options: Any) -> dict[str, Any]:
        """A model from a file, under a name."""
        self.models[name] = Model(**options)
        return {"seconds": self.models[name].seconds}

    def ask(self, verb: str, name: str, **options: Any) -> dict[str, Any]:
        """What a model answers: `run`, `greedy`, `logits` or `tokens`."""
        return getattr(self.models[name], verb)(**options)

    def drop(self, name: str) -> dict[str, Any]:
        """Free a model."""
        self.models.pop(name).close()
        return {}

    def facts(self) -> dict[str, Any]:
        """Version and what the build uses of the processor."""
        import llama_cpp as api

        return {"version": api.__version__, "uses": api.llama_print_system_info().decode()}


def serve() -> None:
    """Answer lines until the input ends."""
    server, answers = Server(), sys.stdout
    sys.stdout = sys.stderr
    silence()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verb = request.pop("verb")
            found = getattr(server, verb)(**request) if hasattr(server, verb) else server.ask(verb, **request)
        except Exception as error:  # the other side decides
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


def silence() -> None:
    """No log of llama.cpp."""
    with contextlib.suppress(ImportError):
        import llama_cpp as api

        silence.callback = api.llama_log_callback(lambda *_: None)  # kept: C calls it later
        api.llama_log_set(silence.callback, ctypes.c_void_p())


def load(args: argparse.Namespace) -> None:
    """Print what loading and a few tokens cost in a process of their own."""
    import llama_cpp  # noqa: F401

    silence()
    before = peak_bytes()
    model = Model(args.file, args.context, args.threads)
    model.run(8, 8, args.threads)
    print(json.dumps({"seconds": model.seconds, "peak_bytes": peak_bytes(), "bytes_before": before}))


def peak_bytes() -> int:
    """Most resident memory of this process so far; getrusage would count that of the parent too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def harness(args: argparse.Namespace) -> None:
    """Compile ggml_matmul.cpp against the libraries of this environment."""
    import importlib.util

    package = Path(importlib.util.find_spec("llama_cpp").origin).parent
    libraries = package / "lib"
    folders = [args.headers, package / "include", package.parent / "include"]
    headers = next((f for f in folders if f is not None and (f / "ggml-cpu.h").is_file()), None)
    if headers is None:
        sys.exit("no headers of ggml here: name their folder with --headers")
    source = Path(__file__).with_name("ggml_matmul.cpp")
    linked = [f"-L{libraries}", "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    command = ["g++", "-O2", "-std=c++17", f"-I{headers}", "-o", str(args.out), str(source), *linked]
    sys.exit(subprocess.run(command).returncode)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="answer the benchmark's lines")
    loading = commands.add_parser("load", help="seconds and memory of loading a file")
    loading.add_argument("file")
    loading.add_argument("--context", type=int, default=256)
    loading.add_argument("--threads", type=int, default=1)
    building = commands.add_parser("harness", help="compile the harness of ggml's matrix product")
    building.add_argument("out", type=Path)
    building.add_argument("--headers", type=Path, help="folder with ggml.h and ggml-cpu.h")
    args = parser.parse_args()
    if args.command == "serve":
        serve()
    else:
        {"load": load, "harness": harness}[args.command](args)


if __name__ == "__main__":
    main()
