"""`hf-qep compare`: one model, several recipes, one table. Nothing is saved."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.cli.eval import (
    BosOption,
    LimitOption,
    MaxTokensOption,
    StrideOption,
    TasksDirOption,
    TasksOption,
    TextOption,
    WindowOption,
    choose_tasks,
    read_held_out,
)
from hf_qep.cli.placement import DeviceOption, DtypeOption, to_device, to_dtype
from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from hf_qep.config import QepConfig
    from hf_qep.engine.calibration import Calibration
    from hf_qep.evaluation.pair import EvalOptions
    from hf_qep.evaluation.tasks import Task


@dataclass(frozen=True)
class HeldOut:
    """What every recipe is measured on."""

    texts: Sequence[str]
    source: str | None = None
    tasks: Sequence[Task] = ()
    options: EvalOptions | None = None
    stored_as: torch.dtype | None = None
    """dtype in the files of what stays float, if the models compute in another one"""


def compare_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the float model.")],
    methods: Annotated[str, typer.Option(help="Methods, comma-separated.")] = "rtn,gptq,onebit,sign",
    bits: Annotated[str, typer.Option(help="Bits per weight, comma-separated.")] = "1.0",
    propagation: Annotated[str, typer.Option(help="Strengths of error propagation, comma-separated.")] = "1.0",
    residual: Annotated[str, typer.Option(help="Correct the residual stream too: on, off or both.")] = "on",
    damping: Annotated[str, typer.Option(help="Ridges of the Hessian, comma-separated.")] = "0.03",
    tune_epochs: Annotated[str, typer.Option(help="Epochs of block tuning, comma-separated.")] = "0",
    distill_epochs: Annotated[str, typer.Option(help="Epochs of training at the end, comma-separated.")] = "0",
    group_size: Annotated[str, typer.Option(help="Group sizes, comma-separated; row = one scale per row.")] = "row",
    dataset: Annotated[str | None, typer.Option(help="Calibration text. Left out: the model writes its own.")] = None,
    text: TextOption = None,
    tasks: TasksOption = None,
    tasks_dir: TasksDirOption = None,
    num_samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of calibration, solvers and the items of --limit.")] = 0,
    limit: LimitOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = "auto",
    max_tokens: MaxTokensOption = None,
    batch_size: Annotated[int, typer.Option(help="Rows, windows or prompts per forward pass.")] = 8,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Quantise a model in memory by every combination of the options and measure each on the same text."""
    place, compute_as = to_device(device), to_dtype(dtype)
    from hf_qep.config import QepConfig
    from hf_qep.engine.calibration import load_calibration
    from hf_qep.engine.source import load_float_model, resolve_model
    from hf_qep.evaluation.pair import EvalOptions

    grid = {
        "method": split(methods, "methods", str),
        "bits": split(bits, "bits", float),
        "group_size": split(group_size, "group-size", lambda word: None if word == "row" else int(word)),
        "propagation": split(propagation, "propagation", float),
        "residual": split(residual, "residual", _on_or_off),
        "damping": split(damping, "damping", float),
        "tune_epochs": split(tune_epochs, "tune-epochs", int),
        "distill_epochs": split(distill_epochs, "distill-epochs", int),
    }
    common = {"num_samples": num_samples, "seq_len": seq_len, "seed": seed, "batch_size": batch_size}
    configs = [QepConfig(dataset=dataset, **common, **recipe) for recipe in recipes(grid)]
    texts, source = read_held_out(text)
    options = EvalOptions(window, stride, bos, max_tokens=max_tokens, batch_size=batch_size, limit=limit, seed=seed)
    float_model, tokenizer = load_float_model(resolve_model(model))
    held_out = HeldOut(texts, source, choose_tasks(tasks, tasks_dir, limit, seed), options, float_model.dtype)
    float_model = float_model.to(device=place, dtype=compute_as)
    calibration = load_calibration(
        dataset, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, model=float_model
    )
    rows = run_comparison(float_model, tokenizer, configs, calibration, held_out, progress=Progress(quiet or as_json))
    if as_json:
        output.print_json({"model": model, "text": source, "calibration": calibration.description, "rows": rows})
    else:
        show(rows, f"{model} on {source}")


def recipes(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, in order; without propagation there is no residual correction to switch off."""
    found = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [recipe for recipe in found if recipe["residual"] or recipe["propagation"] > 0]


def run_comparison(
    float_model: Any,
    tokenizer: Any,
    configs: Sequence[QepConfig],
    calibration: Calibration,
    held_out: HeldOut,
    *,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Quantise a copy of `float_model` by each config and measure it; one JSON-able row per config, in order.

    float_model: is not changed; it and one copy are in memory at a time.
    Every row has the recipe (method, bits, group_size, propagation, residual, damping, tune_epochs, distill_epochs),
    `status` ("ok" or "impossible"), `reason`, bits_linear, bits_model, weight_bytes, seconds (quantising), mean_error
    (relative layer error on the calibration rows), and measurements {value, stderr, n}: for language models kl,
    top1_agreement, perplexity, float_perplexity, bits_per_byte; for encoders cosine_distance, neighbour_overlap;
    `tasks` maps "task/score" to {float, quantized, retention}. What does not apply is None. A recipe that cannot be
    had (ConfigError, BitsError) becomes a row whose `reason` says why.
    """
    from hf_qep.evaluation.tasks import answer_tasks

    answers = None
    if held_out.tasks:
        options = held_out.options
        extra = {"limit": options.limit, "batch_size": options.batch_size, "seed": options.seed} if options else {}
        answers = answer_tasks(float_model, tokenizer, held_out.tasks, **extra)
    rows = []
    with progress.bar("comparing", len(configs), "recipe") as bar:
        for config in configs:
            rows.append(_compare_one(float_model, tokenizer, config, calibration, held_out, answers))
            bar.advance(1, detail=config.method)
    return rows


def _compare_one(
    float_model: Any, tokenizer: Any, config: QepConfig, calibration: Calibration, held_out: HeldOut, answers: Any
) -> dict[str, Any]:
    from hf_qep.accounting import bits_report
    from hf_qep.engine.job import quantize_model
    from hf_qep.evaluation.pair import compare_on_tasks, compare_on_text

    row = dict.fromkeys(_COLUMNS) | {k: getattr(config, k) for k in _RECIPE}
    quantized = copy.deepcopy(float_model)
    began = time.perf_counter()
    try:
        report = quantize_model(quantized, config, calibration)
    except ConfigError as error:
        return row | {"status": "impossible", "reason": str(error)}
    seconds = time.perf_counter() - began
    score = compare_on_text(
        float_model, quantized, tokenizer, held_out.texts, options=held_out.options, source=held_out.source
    )
    results = (
        compare_on_tasks(
            float_model, quantized, tokenizer, held_out.tasks, options=held_out.options, baseline_answers=answers
        )
        if held_out.tasks
        else ()
    )
    stored = bits_report(quantized, stored_as=held_out.stored_as)
    errors = [layer.error for layer in report.layers]
    return (
        row
        | measurements(score)
        | {
            "status": "ok",
            "bits_linear": stored["bits_linear"],
            "bits_model": stored["bits_model"],
            "weight_bytes": stored["weight_bytes"],
            "seconds": round(seconds, 2),
            "mean_error": sum(errors) / len(errors),
            "tasks": _task_scores(results),
        }
    )


_RECIPE = ("method", "bits", "group_size", "propagation", "residual", "damping", "tune_epochs", "distill_epochs")
_COLUMNS = (
    *_RECIPE, "status", "reason", "bits_linear", "bits_model", "weight_bytes",
    "seconds", "mean_error", "kl", "top1_agreement", "perplexity", "float_perplexity", "bits_per_byte",
    "cosine_distance", "neighbour_overlap", "tasks",
)  # fmt: skip


def measurements(score: Any) -> dict[str, Any]:
    """The measurements of a TextScore or EmbeddingScore that a row shows, each as {value, stderr, n}."""
    from hf_qep.evaluation.divergence import TextScore
    from hf_qep.evaluation.schema import to_json

    if isinstance(score, TextScore):
        found = {
            "kl": score.kl,
            "top1_agreement": score.top1_agreement,
            "perplexity": score.subject.perplexity,
            "float_perplexity": score.baseline.perplexity,
            "bits_per_byte": score.subject.bits_per_byte,
        }
    else:
        found = {"cosine_distance": score.cosine_distance, "neighbour_overlap": score.neighbour_overlap}
    return to_json(found)


def _task_scores(results: Sequence[Any]) -> dict[str, Any]:
    from hf_qep.evaluation.schema import to_json

    return {
        f"{task.name}/{metric.name}": {
            "float": to_json(metric.baseline),
            "quantized": to_json(metric.subject),
            "retention": to_json(metric.retention),
        }
        for task in results
        for metric in task.metrics
    }


def _on_or_off(word: str) -> bool:
    if word not in ("on", "off"):
        raise ValueError(f"{word!r} is neither on nor off")
    return word == "on"


def split(words: str, option: str, read: Any) -> list[Any]:
    """Values of a comma-separated option. Raises ConfigError if it is empty or a value cannot be read."""
    parts = [word.strip() for word in words.split(",") if word.strip()]
    try:
        values = [read(word) for word in parts]
    except ValueError as error:
        raise ConfigError(f"--{option} {words!r} holds a value that cannot be read: {error}") from error
    if not values:
        raise ConfigError(f"--{option} is empty; give at least one value")
    return list(dict.fromkeys(values))


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The rows as a table; impossible recipes are listed below it."""
    done = [row for row in rows if row["status"] == "ok"]
    measured = [name for name in _MEASURED if any(row[name] is not None for row in done)]
    tasks = sorted({name for row in done for name in row["tasks"]})
    if done and done[0]["float_perplexity"]:
        title += f" (float perplexity {done[0]['float_perplexity']['value']:.4g})"
    columns = [
        "method",
        "bits",
        "group",
        "QEP",
        "residual",
        "damping",
        "tuned",
        "distilled",
        "bits, linears",
        "bits, model",
    ]
    table = [
        [
            row["method"], row["bits"], row["group_size"], row["propagation"],
            "on" if row["residual"] and row["propagation"] else "off", row["damping"], row["tune_epochs"],
            row["distill_epochs"],
            row["bits_linear"], row["bits_model"],
            *(_short(row[name]) for name in measured),
            *(_short(row["tasks"][name]["quantized"]) for name in tasks),
            row["seconds"],
        ]
        for row in done
    ]  # fmt: skip
    output.print_table(title, [*columns, *(_MEASURED[name] for name in measured), *tasks, "seconds"], table)
    refused = {(row["method"], row["bits"], row["group_size"]): row["reason"] for row in rows if row["status"] != "ok"}
    for (method, bits, group_size), reason in refused.items():
        output.say(f"* {method}, {bits:g} bits, group {group_size or 'row'}: {reason}")


_MEASURED = {
    "kl": "KL",
    "top1_agreement": "top-1",
    "perplexity": "perplexity",
    "cosine_distance": "1 - cosine",
    "neighbour_overlap": "neighbours",
}


def _short(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return output.cell_text(None)
    spread = "" if measured["stderr"] is None else f" ± {measured['stderr']:.1g}"
    return f"{measured['value']:.4g}{spread}"
