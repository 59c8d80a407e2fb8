"""Quantise a model with OneComp, for a comparison on the same calibration tokens and the same linears.

Runs inside an environment of OneComp's own; `bench_accuracy.py --peer-python` starts it there. It needs Python 3.12, or
3.11 with the declared version set aside, and on a processor only a part of what it declares:

    python -m venv onecomp-venv
    onecomp-venv/bin/pip install torch transformers accelerate datasets lm-eval scipy safetensors
    onecomp-venv/bin/pip install --no-deps --ignore-requires-python onecomp==1.4.0 primefac ortools immutabledict
    onecomp-venv/bin/python scripts/peer_onecomp.py MODEL --model-class LlamaForCausalLM --tokens tokens.safetensors \\
        --modules modules.json --method dbf --bits 1.5 --qep --out OUT

Settings are OneComp's defaults but for the float32 weights it starts from (float16 is its default and slow here).
OUT/weights.safetensors holds the dequantised weights of the linears, named as in the model; OUT/peer.json what they
cost: bits with all scales, as the tensors of the result would lie packed in a file; seconds; peak memory.

For the factored methods `--bits` is a limit on those stored bits: OneComp's own target is the largest that keeps it,
which matters for DBF, whose target does not count the scales. The other methods have one size.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

METHODS = {
    "onebit": ("Onebit", {}),
    "onebit-unbalanced": ("Onebit", {"use_balancing": False}),
    "dbf": ("DBF", {}),
    "dbf-unbalanced": ("DBF", {"use_balancing": False}),
    "mdbf": ("MDBF", {}),
    "mdbf-aware": ("MDBF", {"activation_aware": True}),
    "jointq1": ("JointQ", {"bits": 1, "group_size": None}),
    "jointq2": ("JointQ", {"bits": 2, "group_size": None}),
}
"""Name -> OneComp's class and options. JointQ takes no error propagation in this version."""
FACTORED = ("dbf", "mdbf")
POSTS = {"blockwise": "BlockWisePTQ", "global": "GlobalPTQ"}
"""OneComp's training after the solver: per block towards the float block, or of scales by distillation (dbf, mdbf)."""
SCALE_BITS = 16


class GivenModel:
    """Stands in for OneComp's ModelConfig: a folder loaded as one class, in float32, on the processor."""

    def __init__(self, folder: Path, model_class: str) -> None:
        self.folder, self.model_class = folder, getattr(transformers, model_class)

    def load_model(self, device_map: str | None = None) -> nn.Module:
        """The float model; OneComp's own loader knows language models only."""
        return self.model_class.from_pretrained(self.folder, dtype=torch.float32).eval()

    def load_config(self) -> Any:
        """The model's config."""
        return transformers.AutoConfig.from_pretrained(self.folder)

    def load_tokenizer(self) -> None:
        """None: the calibration data are tokens."""

    def get_device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu")

    def get_model_id_or_path(self) -> str:
        """The folder."""
        return str(self.folder)


def quantise(
    model: GivenModel, quantizer: Any, ids: torch.Tensor, qep: bool, post: str | None
) -> Callable[[str, int], torch.Tensor]:
    """Run OneComp's own loop; the results are left in `quantizer.results`.

    Returns what gives the dequantised weight (out, in) of a linear by its name and number of inputs.
    """
    import onecomp
    import onecomp.calibration
    import onecomp.qep._quantize_with_qep_arch as qep_loop
    import onecomp.runner as runner_module
    from onecomp import CalibrationConfig, ModelConfig, QEPConfig, Runner

    def tokens(**_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    class Given(GivenModel, ModelConfig):  # Runner checks the type
        pass

    given = Given.__new__(Given)
    given.__dict__.update(model.__dict__)
    for module in (onecomp.calibration, runner_module, qep_loop):
        module.prepare_calibration_dataset = tokens
    config = CalibrationConfig(max_length=ids.shape[1], num_calibration_samples=len(ids))
    runner = Runner(
        model_config=given,
        quantizer=quantizer,
        calibration_config=config,
        qep=qep,
        qep_config=QEPConfig(device="cpu") if qep else None,
        report_progress=False,
        post_processes=[getattr(onecomp, POSTS[post])(calibration_config=config)] if post else None,
    )
    runner.run()
    if post is None:
        return lambda name, _: quantizer.results[name].compute_dequantized_weight()
    return lambda name, width: effective_weight(runner.quantized_model.get_submodule(name), width)


@torch.no_grad()
def effective_weight(layer: nn.Module, width: int) -> torch.Tensor:
    """What a packed layer of `width` inputs multiplies by, seen from its output for unit vectors."""
    bias = getattr(layer, "bias", None)
    out = layer(torch.eye(width)).float()
    return (out if bias is None else out - bias.float()).T


def stored_bits(result: Any) -> int:
    """Bits of one layer's tensors as a file would hold them: signs packed, scales and envelopes in 16 bits.

    Bookkeeping such as shapes is left out. JointQ of one bit has no packed form in OneComp; its codes and zero points
    are counted as if it had.
    """
    kind = type(result).__name__
    if kind == "OnebitResult":
        return whole_bytes(result.sign.numel()) + SCALE_BITS * (result.a.numel() + result.b.numel())
    if kind == "DBFResult":
        scales = result.dbf_Da.numel() + result.dbf_mid.numel() + result.dbf_Db.numel()
        return 8 * (result.dbf_A.numel() + result.dbf_B.numel()) + SCALE_BITS * scales
    if kind == "MDBFResult":
        signs = [*result.mdbf_A_sign, *result.mdbf_B_sign]
        sizes = [*result.mdbf_A_amp, *result.mdbf_B_amp, *result.mdbf_Q_U_amp, *result.mdbf_Q_V_amp]
        return sum(whole_bytes(s.numel()) for s in signs) + SCALE_BITS * sum(a.numel() for a in sizes)
    if kind == "JointQResult":
        codes = result.bits * (result.assignment.numel() + result.zero_point.numel())
        return codes + SCALE_BITS * result.scale.numel()
    raise TypeError(f"no way to count the bits of a {kind}")


def whole_bytes(bits: int) -> int:
    """`bits` rounded up to bytes."""
    return (bits + 7) // 8 * 8


def planned_bits(method: str, target: float, shapes: list[tuple[int, int]]) -> int:
    """Bits that a factored method will store at OneComp's `target`, by OneComp's own rule for the rank."""
    from onecomp.quantizer.mdbf.utils import DEFAULT_L, bpw_from_rank, rank_from_bpw

    total = 0.0
    for n, m in shapes:
        if method.startswith("mdbf"):
            total += bpw_from_rank(n, m, rank_from_bpw(n, m, target, DEFAULT_L, 1)) * n * m
        else:
            rank = int(target * n * m / (n + m))
            total += whole_bytes(rank * n) + whole_bytes(rank * m) + SCALE_BITS * (n + m + rank)
    return round(total)


def largest_target(bits: Callable[[float], float], limit: float) -> float:
    """The largest target whose `bits` keep the limit, to a thousandth; the smallest one if none does."""
    fitting = [t / 1000 for t in range(50, 4000) if bits(t / 1000) <= limit]
    return fitting[-1] if fitting else 0.05


def make_quantizer(method: str, bits: float, names: list[str], shapes: list[tuple[int, int]]) -> Any:
    """OneComp's quantizer for exactly the linears `names`."""
    import onecomp

    class_name, options = METHODS[method]
    options = dict(options)
    if method.startswith(FACTORED):
        weights = sum(n * m for n, m in shapes)
        options["target_bits"] = largest_target(lambda t: planned_bits(method, t, shapes) / weights, bits)
    return getattr(onecomp, class_name)(include_layer_names=names, exclude_layer_keywords=[], **options)


def main() -> None:
    """One model, one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--model-class", required=True, help="class of transformers that the folder is loaded as")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file with `input_ids` (rows, tokens)")
    parser.add_argument("--modules", type=Path, required=True, help="json list of the linears to quantise")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--bits", type=float, default=1.0, help="limit of stored bits per weight (dbf, mdbf)")
    parser.add_argument("--qep", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--post", choices=POSTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    logging.disable(logging.INFO)
    model = GivenModel(args.model, args.model_class)
    names = json.loads(args.modules.read_text(encoding="utf-8"))
    probe = model.load_model()
    shapes = [tuple(probe.get_submodule(name).weight.shape) for name in names]
    del probe
    quantizer = make_quantizer(args.method, args.bits, names, shapes)
    began, began_cpu = time.perf_counter(), time.process_time()
    weight = quantise(model, quantizer, load_file(args.tokens)["input_ids"], args.qep, args.post)
    cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
    if missing := sorted(set(names) - set(quantizer.results)):
        sys.exit(f"OneComp left {len(missing)} of {len(names)} linears float, among them {missing[0]}")
    widths = dict(zip(names, (m for _, m in shapes), strict=True))
    weights = {f"{name}.weight": weight(name, widths[name]).float().contiguous() for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "weights.safetensors")
    facts = {
        "stored_bits": sum(stored_bits(quantizer.results[n]) for n in names),
        "linear_weights": sum(n * m for n, m in shapes),
        "target_bits": getattr(quantizer, "target_bits", None),
        **cost,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (args.out / "peer.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
