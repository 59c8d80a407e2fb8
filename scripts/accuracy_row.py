"""One row of `bench_accuracy.py`: quantise a model by one recipe and measure it, in a process of its own.

    python scripts/accuracy_row.py ORDER.json RESULT.json

A process of its own, so that the peak memory is that of this row. What rows share (calibration tokens, the float
model's answers) is made by the first that needs it and kept in the work folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PEER_SCRIPT = Path(__file__).with_name("peer_onecomp.py")


@dataclass(frozen=True)
class Setting:
    """What all rows of one model have in common."""

    name: str
    """of the model, in tables"""
    model: str
    """folder or Hub id of the float model"""
    dataset: str | None
    """calibration text as `hf-qep quantize --dataset` takes it; None: the model writes its own"""
    num_samples: int
    seq_len: int
    text: str | None
    """held-out text; None: the bundled tales"""
    window: int | None
    max_tokens: int | None
    cloze: str | None
    """task file, or plain text that becomes one; None: no cloze column"""
    cloze_items: int
    device: str = "cpu"
    """where ours is quantised and all is measured; OneComp runs on the processor"""


@dataclass(frozen=True)
class Row:
    """What one row is about."""

    label: str
    group: str
    """ours, baselines or peer; or the name of an ablation"""
    bits: float
    """asked for"""
    seed: int
    recipe: dict[str, Any]
    """arguments of QepConfig, or of peer_onecomp.py if `peer`"""
    peer: bool = False
    cloze: bool = False
    """whether to answer the cloze items, by far the longest of the measurements"""
    setting: dict[str, Any] = field(default_factory=dict)
    """fields of the Setting that this row changes"""


def key_of(setting: Setting, row: Row) -> str:
    """By what a row is known again in a results file; whether the cloze items are answered is part of it."""
    facts = asdict(setting) | {"model": Path(setting.model).name, "device": None} | asdict(row)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def main(order_file: str, result_file: str) -> None:
    """Carry out one order. Raises QepError, or RuntimeError if the peer fails."""
    order = json.loads(Path(order_file).read_text(encoding="utf-8"))
    setting, row, work = Setting(**order["setting"]), Row(**order["row"]), Path(order["work"])
    setting = replace(setting, **row.setting)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = by_peer(setting, row, work, order["peer_python"]) if row.peer else by_us(setting, row, work)
    Path(result_file).write_text(json.dumps(found), encoding="utf-8")


def load(setting: Setting) -> tuple[Any, Any, Any]:
    """The float model computing in float32, its tokenizer, and the dtype of its files."""
    import torch

    from hf_qep.engine.source import load_float_model, resolve_model

    model, tokenizer = load_float_model(resolve_model(setting.model))
    stored_as = model.dtype
    return model.to(setting.device, torch.float32), tokenizer, stored_as


def calibration_of(setting: Setting, seed: int, model: Any, tokenizer: Any, work: Path) -> Any:
    """The calibration rows, the same for all recipes of a seed; the work folder keeps them."""
    from safetensors.torch import load_file, save_file

    from hf_qep.engine.calibration import load_calibration

    facts = [setting.name, setting.dataset, setting.num_samples, setting.seq_len, seed]
    file = work / f"tokens-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.safetensors"
    sizes = {"num_samples": setting.num_samples, "seq_len": setting.seq_len, "seed": seed, "model": model}
    if not file.is_file():
        made = load_calibration(setting.dataset, tokenizer, **sizes)
        save_file(made.inputs, f"{file}.{os.getpid()}")
        os.replace(f"{file}.{os.getpid()}", file)
    return load_calibration(load_file(file), tokenizer, **sizes)


def without_padding(inputs: dict[str, Any]) -> Any:
    """Token rows (n, seq_len) for OneComp, which takes the mask of the first row for that of all.

    Rows that are filled up are laid end to end and cut again, so that it sees the same tokens.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return ids
    dense = ids[mask.bool()]
    return dense[: len(dense) // ids.shape[1] * ids.shape[1]].reshape(-1, ids.shape[1])


def by_us(setting: Setting, row: Row, work: Path) -> dict[str, Any]:
    """Quantise by a recipe of hf_qep and measure."""
    from hf_qep.accounting import bits_report
    from hf_qep.config import QepConfig
    from hf_qep.engine.job import quantize_model

    model, tokenizer, stored_as = load(setting)
    calibration = calibration_of(setting, row.seed, model, tokenizer, work)
    config = QepConfig(num_samples=setting.num_samples, seq_len=setting.seq_len, seed=row.seed, **row.recipe)
    began, began_cpu = time.perf_counter(), time.process_time()
    report = quantize_model(model, config, calibration)
    cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
    cost["peak_bytes"] = peak_bytes()
    measured = measure(load(setting)[0], model, tokenizer, setting, row, work)
    bits = bits_report(model, stored_as=stored_as)
    return {
        **measured,
        **cost,
        "mean_error": sum(layer.error for layer in report.layers) / len(report.layers),
        "bits_linear": bits["bits_linear"],
        "bits_model": bits["bits_model"],
        "file_bytes": bytes_on_disk(model, stored_as, work),
    }


def bytes_on_disk(model: Any, stored_as: Any, work: Path) -> int:
    """Bytes of the weight files of `model`, which afterwards holds its float weights in the dtype of the original."""
    from hf_qep.modules import packed_modules

    packed = {id(tensor) for module in packed_modules(model).values() for tensor in module.tensors().values()}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            parameter.data = parameter.data.to(stored_as)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def by_peer(setting: Setting, row: Row, work: Path, python: str) -> dict[str, Any]:
    """Let OneComp quantise the same linears on the same tokens in its environment, and measure its weights here.

    file_bytes is the payload that its packed tensors and our float rest would make; it writes no file here.
    """
    from safetensors.torch import load_file, save_file

    from hf_qep.accounting import bits_report
    from hf_qep.architectures.structure import describe
    from hf_qep.engine.source import resolve_model

    model, tokenizer, stored_as = load(setting)
    calibration = calibration_of(setting, row.seed, model, tokenizer, work)
    structure = describe(model, {"input_ids": calibration.inputs["input_ids"][:1, :32]})
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder)
        names = [ref.name for ref in structure.linears()]
        tokens = out / "tokens.safetensors"
        save_file({"input_ids": without_padding(calibration.inputs)}, tokens)
        (out / "modules.json").write_text(json.dumps(names), encoding="utf-8")
        words = [python, PEER_SCRIPT, resolve_model(setting.model), "--model-class", type(model).__name__]
        words += ["--tokens", tokens, "--modules", out / "modules.json", "--out", out, "--seed", row.seed]
        words += ["--method", row.recipe["method"], "--bits", row.bits]
        words += ["--qep" if row.recipe["qep"] else "--no-qep"]
        words += ["--post", row.recipe["post"]] if "post" in row.recipe else []
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"OneComp ended with exit status {done.returncode} and said: {said[:300]}")
        weights, facts = load_file(out / "weights.safetensors"), json.loads((out / "peer.json").read_text())
    quantized = load(setting)[0]
    missing = quantized.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise RuntimeError(f"the peer's weights name {missing.unexpected_keys[0]}, which the model has not")
    float_bits = bits_report(model, stored_as=stored_as)
    all_weights, others = float_bits["model_weights"], float_bits["model_weights"] - facts["linear_weights"]
    total = facts["stored_bits"] + 8 * stored_as.itemsize * others
    return {
        **measure(model, quantized, tokenizer, setting, row, work),
        **{name: facts[name] for name in ("seconds", "cpu_seconds", "peak_bytes")},
        "bits_linear": facts["stored_bits"] / facts["linear_weights"],
        "bits_model": total / all_weights,
        "file_bytes": total // 8,
    }


def measure(float_model: Any, quantized: Any, tokenizer: Any, setting: Setting, row: Row, work: Path) -> dict[str, Any]:
    """Measurements as plain numbers, each with its standard error over tokens, sentences or items."""
    from hf_qep.cli.compare import measurements
    from hf_qep.cli.eval import read_held_out
    from hf_qep.evaluation.pair import EvalOptions, compare_on_tasks, compare_on_text
    from hf_qep.evaluation.schema import to_json
    from hf_qep.evaluation.tasks import find_tasks

    texts, source = read_held_out(setting.text)
    options = EvalOptions(window=setting.window, max_tokens=setting.max_tokens, batch_size=8)
    score = compare_on_text(float_model, quantized, tokenizer, texts, options=options, source=source)
    found = measurements(score) | {"text": source, "cloze": None}
    if setting.cloze and row.cloze:
        tasks = find_tasks([f"cloze={setting.cloze}"], limit=setting.cloze_items)
        theirs = float_answers(float_model, tokenizer, tasks, setting, work)
        (task,) = compare_on_tasks(
            float_model, quantized, tokenizer, tasks, options=replace(options, batch_size=32), baseline_answers=theirs
        )
        (metric,) = [m for m in task.metrics if m.name == "acc"]
        found["cloze"] = {"float": to_json(metric.baseline), "quantized": to_json(metric.subject)}
        found["cloze"] |= {"retention": to_json(metric.retention), "chance": task.chance, "majority": task.majority}
    return found


def float_answers(model: Any, tokenizer: Any, tasks: Sequence[Any], setting: Setting, work: Path) -> dict[str, Any]:
    """Answers of the float model, from the work folder where they are known."""
    import numpy as np

    from hf_qep.evaluation.tasks import Answers, answer_tasks

    items = hashlib.sha256(repr([setting.name, tasks[0].local.items]).encode()).hexdigest()[:12]
    file = work / f"answers-{items}.json"
    if not file.is_file():
        made = answer_tasks(model, tokenizer, tasks, batch_size=32)
        plain = {name: [{k: v.tolist() for k, v in a.scores.items()}, a.chance] for name, a in made.items()}
        file.write_text(json.dumps(plain), encoding="utf-8")
    known = json.loads(file.read_text(encoding="utf-8"))
    return {name: Answers({k: np.array(v) for k, v in s.items()}, chance) for name, (s, chance) in known.items()}


def peak_bytes() -> int:
    """Most memory this process has had, its libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
