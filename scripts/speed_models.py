"""Models of random weight for `bench_speed.py generate`: float and packed, in memory and in folders, and their times.

    python scripts/speed_models.py load FOLDER --threads 1    seconds and memory of `from_pretrained` in a new process
    python scripts/speed_models.py load FOLDER --device-map auto    the same on a GPU and, behind it, a processor

A packed model is built as `from_pretrained` builds it, from a state dict in memory; no float copy is ever made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep import conversion
from hf_qep.bitorder import scale_words
from hf_qep.config import QepConfig
from hf_qep.formats import factored, integer, sign
from hf_qep.modules import QepLinear

CLASSES = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
    "cohere2": (tf.Cohere2Config, tf.Cohere2ForCausalLM),
}
FORMATS = ("sign", "group128", "factored")
ACTIVATIONS = ("exact", "int8")
TABLE_GROUP = 128
WEIGHT_SIZE = 0.02
REPEATED = 1 << 22
"""Random values that differ; they repeat, for only the time counts."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 64
    vocab: int = 32000
    tied: bool = True
    context: int = 512
    rope_theta: float = 500000.0
    logit_scale: float = 0.25
    sliding_window: int = 4096


SHAPES = {
    "llama-0.1b": Shape("llama", 768, 12, 12, 4, 2048),
    "llama-1b": Shape("llama", 2048, 16, 32, 8, 8192),
    "cohere2-0.1b": Shape("cohere2", 768, 12, 12, 4, 2048),
    "cohere2-1b": Shape("cohere2", 2048, 16, 32, 8, 8192),
    "command-a-block": Shape("cohere2", 12288, 1, 96, 8, 36864, head_dim=128, vocab=1024),
    "llama-tiny": Shape("llama", 256, 2, 4, 2, 512, vocab=512),
    "cohere2-tiny": Shape("cohere2", 256, 2, 4, 2, 512, vocab=512),
}
"""llama-1b is Llama 3.2 1B but for its vocabulary of 128,256; command-a-block is one block of Command A."""


# ---- building ----


def config_of(shape: Shape) -> tf.PretrainedConfig:
    """The family's configuration; no token ends a text."""
    options: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    if shape.family == "cohere2":
        options |= {"logit_scale": shape.logit_scale, "sliding_window": shape.sliding_window}
    return CLASSES[shape.family][0](**options)


def build(shape: Shape, form: str | None = None, table_bits: int | None = None) -> PreTrainedModel:
    """A bfloat16 model. form: format of its linears, one of FORMATS, or None for float; table_bits: of its tables."""
    config, kind = config_of(shape), CLASSES[shape.family][1]
    with torch.device("meta"):
        empty = kind(config)
    if form is not None:
        packing = QepConfig()
        packing.set_layers(specs_of(empty, form, table_bits))
        conversion.swap_modules(empty, packing)
        config.quantization_config = packing.to_dict()
    with quiet():
        model = kind.from_pretrained(None, config=config, state_dict=random_state(empty), dtype=torch.bfloat16)
    model.generation_config.pad_token_id = 0
    return model.eval()


def specs_of(model: nn.Module, form: str, table_bits: int | None) -> dict[str, Any]:
    """Name -> spec of what is packed: the linears of the blocks and, with table_bits, embedding and head."""
    specs: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) or name == "lm_head"
        if is_table and table_bits is not None and not (name == "lm_head" and model.config.tie_word_embeddings):
            specs[name] = integer.Spec(table_bits, TABLE_GROUP)
        elif isinstance(module, nn.Linear) and not is_table:
            specs[name] = spec_of(form, *module.weight.shape)
    return specs


def spec_of(form: str, out_features: int, in_features: int) -> Any:
    """What the methods of the package give at one bit."""
    if form == "factored":
        return factored.Spec(rank_of(out_features, in_features))
    return sign.Spec(group_size=128 if form == "group128" else None, column_scale=form == "sign")


def rank_of(out_features: int, in_features: int) -> int:
    """The multiple of 64 that takes up to one bit per weight, scales apart."""
    return max(64, out_features * in_features // (out_features + in_features) // 64 * 64)


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """Random tensors for a model on meta, tied ones left out."""
    tied = model.all_tied_weights_keys
    packed = {f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "spec")}
    state = {}
    for name, empty in model.state_dict().items():
        if name in tied:
            continue
        owner = packed.get(name)
        if owner is not None and isinstance(owner.spec, integer.Spec):
            state[name] = random_integers(
                empty.shape, owner.in_features // (owner.spec.group_size or owner.in_features)
            )
        elif empty.dtype == torch.int32:
            state[name] = random_words(empty.shape)
        elif "norm" in name:
            state[name] = torch.ones(empty.shape, dtype=torch.bfloat16)
        else:
            state[name] = random_floats(name, empty)
    return state


def random_floats(name: str, like: Tensor) -> Tensor:
    """float16 scales: the row's is the size of the weights, the others are about 1; everything else is a weight."""
    if like.dtype == torch.float16:
        size = WEIGHT_SIZE if name.endswith("weight_scale") else 1.0
        return torch.empty(like.shape).uniform_(0.8 * size, 1.2 * size).half()
    some = torch.empty(min(REPEATED, like.numel())).normal_(0, WEIGHT_SIZE).bfloat16()
    return repeated(some, like.shape)


def random_words(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """int32 of random bits."""
    count = min(REPEATED, torch.Size(shape).numel())
    return repeated(torch.empty(4 * count, dtype=torch.uint8).random_(0, 256).view(torch.int32), shape)


def random_integers(shape: torch.Size, groups: int) -> Tensor:
    """Rows of format `integer` with random codes of 4 bits or, a little too large, of 8."""
    words = random_words(shape)
    scales = torch.full((scale_words(groups) * 2,), WEIGHT_SIZE / 4, dtype=torch.float16)
    words[:, : scale_words(groups)] = scales.view(torch.int32)
    return words


def repeated(some: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A tensor of that shape, filled with the values again and again."""
    whole = torch.empty(shape, dtype=some.dtype)
    for part in whole.view(-1).split(max(1, some.numel())):
        part.copy_(some[: part.numel()])
    return whole


def set_activation(model: nn.Module, how: str | None) -> None:
    """How packed linears take their inputs: "exact" or "int8"."""
    for module in model.modules():
        if isinstance(module, QepLinear):
            module.activation = how


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers."""
    before = tf.logging.get_verbosity()
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    try:
        yield
    finally:
        tf.logging.set_verbosity(before)
        tf.logging.enable_progress_bar()


def stored_bytes(folder: Path) -> int:
    """Of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---- timing ----


class Stopwatch(tf.StoppingCriteria):
    """Notes the time after every token, and that of the processor, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """After a token."""
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prompt_of(shape: Shape, length: int) -> Tensor:
    """Ids (1, length), the same as llama.cpp gets."""
    return torch.tensor([[3 + i * 7 % (shape.vocab - 3) for i in range(length)]])


def generate(model: PreTrainedModel, prompt: Tensor, new: int, cache: str | None = None) -> dict[str, float]:
    """Seconds of `model.generate`: of the prompt to its first token, and of `new` more tokens (of the processor too).

    cache: None for the default; "static"; "compiled", which also compiles the step of a further token.
    """
    watch = Stopwatch()
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": "static"}
    if cache == "compiled":
        options["compile_config"] = tf.CompileConfig(mode="default")
        options["compile_config"]._compile_all_devices = True  # else transformers compiles on accelerators alone
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        stopping_criteria=tf.StoppingCriteriaList([watch]),
        **options,
    )
    decode = {"decode": watch.times[-1] - watch.times[0], "decode_cpu": watch.cpu[-1] - watch.cpu[0]}
    return {"prefill": watch.times[0] - began} | decode


def operators(model: PreTrainedModel, prompt: Tensor, new: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Where the time of a decoded token goes: operators by their own time, and sums, all in microseconds per token.

    wall: as it is; profiled: under the profiler, which slows operators and Python down; operators: their share of that.
    """
    generate(model, prompt, new)
    sums = {"wall": 1e6 * generate(model, prompt, new)["decode"] / new}
    counts: dict[str, dict[str, float]] = {}
    for tokens, factor in ((0, -1), (new, 1)):  # less what the prompt takes
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sums["profiled"] = 1e6 * generate(model, prompt, tokens)["decode"] / new
        for event in profile.key_averages():
            found = counts.setdefault(event.key, {"us": 0.0, "calls": 0.0})
            found["us"] += factor * event.self_cpu_time_total / new
            found["calls"] += factor * event.count / new
    rows = [{"operator": name, **found} for name, found in counts.items() if found["us"] > 0]
    rows.sort(key=lambda row: -row["us"])
    return rows, sums | {"operators": sum(row["us"] for row in rows)}


def load(folder: str, threads: int, device_map: str | None = None) -> None:
    """Print what loading a folder and a few tokens cost in this process. device_map: as `from_pretrained` takes it."""
    torch.set_num_threads(threads)
    options = {} if device_map is None else {"device_map": device_map}
    before, began = peak_bytes(), time.perf_counter()
    with quiet():
        model = tf.AutoModelForCausalLM.from_pretrained(folder, **options)
    seconds = time.perf_counter() - began
    loaded = peak_bytes()
    prompt = torch.arange(3, 11, device=model.device)[None] % model.config.vocab_size
    times = generate(model.eval(), prompt, 7)
    facts = {"seconds": seconds, "first_tokens": sum(times.values()), "bytes_loaded": loaded}
    if torch.cuda.is_available():
        facts["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(facts | {"peak_bytes": peak_bytes(), "bytes_before": before}))


def peak_bytes() -> int:
    """Most resident memory of this process so far; getrusage would count that of the parent too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def cost_of(command: list[str], threads: int) -> dict[str, float]:
    """Seconds to load and megabytes resident at most, of a process that loads a model; empty if it fails."""
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True)
    if done.returncode:
        print(f"failed: {(done.stderr.splitlines() or ['no reason'])[-1]}", file=sys.stderr)
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"load s": found["seconds"], "peak MB": found["peak_bytes"] / 1e6, "MB before": found["bytes_before"] / 1e6}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["load"])
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device-map", help="cuda, or auto; left out: the processor")
    args = parser.parse_args()
    load(args.folder, args.threads, args.device_map)


if __name__ == "__main__":
    main()
