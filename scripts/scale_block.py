"""One block of a large decoder with random weights, quantised as a job would do it: time by phase, memory, and how
much of the time lies in the products and factorisations that the algorithm consists of. Part of `bench_scale.py`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cohere2Config, Cohere2ForCausalLM

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.engine.planning import costs
from hf_qep.engine.planning.job import Planner, Request
from hf_qep.evaluation.memory import resident_bytes

SHAPE = {"hidden_size": 12288, "intermediate_size": 36864, "num_attention_heads": 96, "num_key_value_heads": 8}
"""A block of Command A."""
VOCABULARY = 256
NEEDED = (
    "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul",
    "aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::cholesky_solve", "aten::linalg_solve_ex",
    "aten::mkldnn_linear", "aten::_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
"""Products and factorisations."""


def block_config(divisor: int, depth: int = 1) -> Cohere2Config:
    """So many blocks of Command A, all widths but that of a head divided."""
    sizes = {name: max(1, size // divisor) for name, size in SHAPE.items()}
    return Cohere2Config(**sizes, num_hidden_layers=depth, vocab_size=VOCABULARY, eos_token_id=1)


@torch.no_grad()
def random_model(config: Cohere2Config, device: str = "cpu") -> nn.Module:
    """In bfloat16, made in place: a float32 copy of one real block takes 6 GB."""
    with torch.device("meta"):
        model = Cohere2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    fresh = Cohere2ForCausalLM._from_config(Cohere2Config(**_tiny(config)), dtype=torch.bfloat16)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    model.model.rotary_emb = fresh.model.rotary_emb.to(device)  # its buffers are in no file, and were on meta too
    model.tie_weights()
    return model.eval()


def _tiny(config: Cohere2Config) -> dict[str, Any]:
    """Options of a config with the same heads and hardly any weights."""
    head = config.hidden_size // config.num_attention_heads
    return {"hidden_size": head, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
            "num_hidden_layers": 1, "vocab_size": VOCABULARY, "head_dim": head}  # fmt: skip


def measure_block(
    divisor: int, tokens: int, seq_len: int, *, method: str = "sign", device: str = "cpu", profile: bool = False
) -> dict[str, Any]:
    """Quantise one block. tokens: of calibration. profile: also count where the time goes, for a block of little width.

    Returns seconds by phase as measured and as planned, bytes at the peak above what the weights take, and with
    `profile` the ratio of all time to that of the products and factorisations.
    """
    config, began = block_config(divisor), time.perf_counter()
    model = random_model(config, device)
    making, before = time.perf_counter() - began, resident_bytes()
    recipe = {"method": method, "effort": "fast", "num_samples": tokens // seq_len, "seq_len": seq_len}
    ids = torch.randint(VOCABULARY, (tokens // seq_len, seq_len), generator=torch.Generator().manual_seed(0))
    rows = load_calibration(ids, None, num_samples=len(ids), seq_len=seq_len, seed=0, model=model)
    began = time.perf_counter()
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
            report = quantize_model(model, QepConfig(**recipe), rows)
    else:
        report = quantize_model(model, QepConfig(**recipe), rows)
    taken = time.perf_counter() - began
    planned = Planner(config, torch.bfloat16, costs.load_costs()).plan(Request(recipe)).seconds.phases
    found = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "tokens": tokens,
        "method": method,
        "threads": torch.get_num_threads(),
        "seconds": taken,
        "making the weights": making,
        "measured": {name: round(seconds, 2) for name, seconds in sorted(report.seconds.items())},
        "planned": {name: round(seconds, 2) for name, seconds in sorted(planned.items())},
        "peak_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before,
        "resident_before": before,
        "error": {layer.name: round(layer.error, 4) for layer in report.layers},
    }
    if profile:
        needed = _needed_seconds(seen.key_averages()) - report.seconds["error"]  # products nobody needs but the reader
        found |= {"needed": needed, "ratio": sum(report.seconds.values()) / needed}
    return found


def _needed_seconds(events: Iterable[Any]) -> float:
    """Seconds in products and factorisations, without what they call."""
    return sum(event.self_cpu_time_total for event in events if event.key in NEEDED) / 1e6


def print_block(found: dict[str, Any]) -> None:
    """One measured block as text."""
    print(
        f"hidden {found['hidden']} intermediate {found['intermediate']} {found['method']} tokens {found['tokens']} "
        f"threads {found['threads']}: {found['seconds']:.1f} s, peak {found['peak_bytes'] / 1e9:.2f} GB above the "
        f"{found['resident_before'] / 1e9:.2f} GB before it"
    )
    for name in sorted({*found["measured"], *found["planned"]}):
        print(f"  {name:12} {found['measured'].get(name, 0):9.2f} s   planned {found['planned'].get(name, 0):9.2f} s")
    if "ratio" in found:
        print(f"  {found['ratio']:.2f} times the {found['needed']:.1f} s of products and factorisations")
