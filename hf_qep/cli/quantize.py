"""`hf-qep quantize`: a float model of the Hub or of a folder in, a packed checkpoint folder out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.cli.placement import DTYPES, DeviceOption, to_device, to_dtype
from hf_qep.files import check_output, parse_size
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.cli.job import Saved
    from hf_qep.config import QepConfig
    from hf_qep.engine.together.processes import Processes

CALIBRATION_HELP = (
    "Calibration text: a txt, jsonl, csv or parquet file (file:column), a Hub data set (id:config:split:column) or a "
    "weighted mix (a.txt*0.7,b.jsonl*0.3). Left out: the model writes its own."
)
DTYPE_HELP = f"Dtype to compute in: auto (as stored), {', '.join(DTYPES)}. The files keep the stored one."
EFFORT_HELP = (
    "fast solves each layer, balanced also trains the whole model towards the float one, best takes more rows "
    "and trains longer. Sets the options below that are left out."
)
TUNE_HELP = "Passes in which each block is trained towards the float model. 0: none."
LOOKAHEAD_HELP = "Blocks between a tuned block and its loss. Left out: all, and the head."
DISTILL_HELP = "Passes in which the whole model is trained towards the float model. 0: none."
SIGNS_HELP = "Train signs too, 24 bytes of memory each. Left out: up to a thousand million."
BITS_HELP = "Bits per weight: 1.0; with `factored` and `auto` 0.3 to 2.5, scales included."
METHOD_HELP = "Solver: sign, onebit, gptq, rtn, qqa or factored; auto: sign or factored for each layer."
MEMORY_HELP = "Instead of --bits, with `auto`: most bytes of the weight files, such as 14GB."
TABLE_HELP = "Bits of the {}, 4 or 8. Left out: as stored."
EXPORT_HELP = "gguf: keep `sign` to what `hf-qep export gguf` can write for llama.cpp without loss."
ROOM_HELP = (
    "Activations kept in memory while quantising, such as 2GB; the rest goes to the disk. Left out: 8GiB, and block by "
    "block no more than half of the free memory."
)
SHARD_HELP = "Most bytes of tensors in one weight file, such as 500MB. Left out: 5GB."
RESUME_HELP = "Go on behind the last block of a job that was killed or failed."
DROP_HELP = (
    "Of a Hub model, remove each weight file that was downloaded from the cache once no later block needs it; the disk "
    "then holds a few of them."
)
RECIPE = (
    "bits", "method", "max_memory", "group_size", "effort", "dataset", "num_samples", "seq_len", "batch_size",
    "propagation", "residual", "damping", "tune_epochs", "tune_lookahead", "distill_epochs", "distill_signs",
    "embedding_bits", "head_bits", "export", "seed",
)  # fmt: skip
"""Options that are fields of QepConfig."""


def quantize_command(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the float model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the quantised checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub model.")] = None,
    bits: Annotated[float, typer.Option(help=BITS_HELP)] = 1.0,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "sign",
    max_memory: Annotated[str | None, typer.Option(help=MEMORY_HELP)] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale. Left out: the row.")] = None,
    effort: Annotated[str, typer.Option(help=EFFORT_HELP)] = "balanced",
    dataset: Annotated[str | None, typer.Option(help=CALIBRATION_HELP)] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration rows.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    propagation: Annotated[float, typer.Option(help="Strength of error propagation (QEP), 0 to 1.")] = 1.0,
    residual: Annotated[bool, typer.Option(help="Correct the error that the residual stream carries too.")] = True,
    damping: Annotated[float, typer.Option(help="Ridge of the Hessian, in units of its mean diagonal.")] = 0.03,
    tune_epochs: Annotated[int | None, typer.Option(help=TUNE_HELP)] = None,
    tune_lookahead: Annotated[int | None, typer.Option(help=LOOKAHEAD_HELP)] = None,
    distill_epochs: Annotated[int | None, typer.Option(help=DISTILL_HELP)] = None,
    distill_signs: Annotated[bool | None, typer.Option(help=SIGNS_HELP)] = None,
    embedding_bits: Annotated[int | None, typer.Option(help=TABLE_HELP.format("word embeddings"))] = None,
    head_bits: Annotated[int | None, typer.Option(help=TABLE_HELP.format("output head"))] = None,
    export: Annotated[str | None, typer.Option(help=EXPORT_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and solvers.")] = 0,
    skip: Annotated[list[str] | None, typer.Option(help="Module that stays float; may be repeated.")] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    stream_room: Annotated[str | None, typer.Option(help=ROOM_HELP)] = None,
    shard_size: Annotated[str | None, typer.Option(help=SHARD_HELP)] = None,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add files with which the folder loads without this plugin.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    drop_shards: Annotated[bool, typer.Option("--drop-shards", help=DROP_HELP)] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Quantise a model to about one bit per weight and save it.

    Several processes or GPUs share the work of --effort fast: torchrun --nproc-per-node 2 -m hf_qep quantize ...
    """
    recipe = {name: value for name, value in locals().items() if name in RECIPE} | {"skip_modules": skip}
    room = None if stream_room is None else parse_size(stream_room, zero=True)
    check_output(out, overwrite=overwrite or resume)  # before the seconds that the imports below take
    from hf_qep.engine.together.launch import joined, own_device

    began, place, compute_as = time.monotonic(), own_device(to_device(device)), to_dtype(dtype)
    saving = {"overwrite": overwrite, "remote_code": remote_code, "stream_budget": room}
    if shard_size is not None:
        saving["max_shard_size"] = parse_size(shard_size)
    with joined(place) as processes:
        silent = quiet or as_json or not processes.first
        saving |= {"progress": Progress(silent), "processes": processes}
        say = (lambda text: None) if silent else output.note
        found = _quantize(model, revision, recipe, out, place, compute_as, saving, resume, drop_shards, say)
    config, saved, best = found
    if saved is not None:  # the first of several processes says it
        result = summary(model, out, config.method, saved) | {"effort": config.effort}
        _say(result | {"seconds": round(time.monotonic() - began, 1), "best_would_take_times": best}, quiet, as_json)


def _say(result: dict[str, Any], quiet: bool, as_json: bool) -> None:
    if as_json:
        output.print_json(result)
    else:
        _show(result, quiet)


def _quantize(
    model: str,
    revision: str | None,
    recipe: dict[str, Any],
    out: Path,
    place: Any,
    compute_as: Any,
    saving: dict[str, Any],
    resume: bool,
    drop: bool,
    say: Callable[[str], None],
) -> tuple[QepConfig, Saved | None, float | None]:
    """The config that was used, the finished job (None on all processes but the first), and how many times as much work
    the best effort would have been."""
    from hf_qep.cli.job import quantize_and_save, stream_and_save
    from hf_qep.config import EFFORTS, QepConfig
    from hf_qep.engine.extent import count_operations
    from hf_qep.engine.together.shares import check_shared, why_alone
    from hf_qep.engine.unfinished import Unfinished

    config, unfinished, processes = QepConfig(**recipe), Unfinished(out), saving["processes"]
    check_shared(processes, why_alone(config))
    processes.from_first(lambda: unfinished.check(resume=resume, overwrite=saving["overwrite"]))
    options = {"drop": drop, "account": unfinished.shards, "progress": saving["progress"]}
    if resume and revision is None:  # the branch may have moved since
        revision = processes.from_first(lambda: unfinished.revision)
    source = model if processes.count == 1 else _brought(model, revision, drop, processes)
    folder, float_model, tokenizer, blocks, why = _open(source, revision, config, resume, options)
    check_shared(processes, why)
    say(f"All weights are in memory: {why}." if why else "The weights of one block at a time are in memory.")
    best = None
    if config.effort != "best":
        better = QepConfig(**recipe | dict.fromkeys(EFFORTS["best"]) | {"effort": "best"})
        best = count_operations(float_model, better) / count_operations(float_model, config)
    saving |= {"base_model": model, "base_folder": folder, "stored_as": float_model.dtype if compute_as else None}
    if blocks is None:
        del saving["processes"]
        unfinished.remove()  # with --overwrite only: it would have been refused above
        float_model = float_model.to(device=place, dtype=compute_as)
        return config, quantize_and_save(float_model, tokenizer, config, out, **saving), best
    blocks.place(place, compute_as)
    return config, stream_and_save(float_model, blocks, tokenizer, config, out, resume=resume, **saving), best


def _brought(model: str, revision: str | None, drop: bool, processes: Processes) -> str:
    """Folder of all weight files, which are there before processes that share the Hub cache begin."""
    from hf_qep.engine.source import resolve_model
    from hf_qep.errors import ConfigError

    if drop:
        raise ConfigError(
            f"{processes.count} processes read the same files of the Hub cache, so none may remove them; leave out "
            "--drop-shards"
        )
    return str(processes.first_ahead(lambda: resolve_model(model, revision)))


def _open(
    name: str, revision: str | None, config: QepConfig, resume: bool, options: dict[str, Any]
) -> tuple[Path, Any, Any, Any, str | None]:
    """Folder, model, tokenizer, and either what reads the blocks of the model or why all of it is in memory.

    options: of `open_shards`.
    """
    from hf_qep.engine.extent import weights_to_quantize
    from hf_qep.engine.on_demand import load_on_demand
    from hf_qep.engine.remote.shards import open_shards
    from hf_qep.engine.residence import why_in_memory
    from hf_qep.engine.source import load_float_model, resolve_model, snapshot_revision
    from hf_qep.errors import ArchitectureError, ConfigError

    why = why_in_memory(config, sys.maxsize)  # of any model
    if why is None:
        shards = open_shards(name, revision, **options)
        try:
            model, blocks, tokenizer = load_on_demand(shards.folder, shards=shards)
            why = why_in_memory(config, weights_to_quantize(model, config))
        except ArchitectureError as error:
            why = str(error)
        if why is None:
            return shards.folder, model, tokenizer, blocks, None
        shards.close()
        revision = snapshot_revision(shards.folder) or revision
    for asked, what in ((resume, "be resumed"), (options["drop"], "drop its shards")):
        if asked:
            raise ConfigError(f"only a job that reads its model block by block can {what}; this one cannot: {why}")
    folder = resolve_model(name, revision)
    return folder, *load_float_model(folder), None, why


def summary(model: str, out: Path, method: str, saved: Saved) -> dict[str, Any]:
    """What the command prints."""
    errors = [layer.error for layer in saved.report.layers]
    return {
        "model": model,
        "out": str(out),
        "method": method,
        **saved.bits,
        "layers": len(errors),
        "mean_error": sum(errors) / len(errors),
        "calibration": saved.calibration.description | {"fingerprint": saved.calibration.fingerprint},
        "warnings": saved.report.warnings,
    }


def _show(result: dict[str, Any], quiet: bool) -> None:
    facts = {
        "method": result["method"],
        "bits per weight, quantised linears": result["bits_linear"],
        "bits per weight, whole model": result["bits_model"],
        "weight files": output.human_bytes(result["file_bytes"]),
        "quantised layers": result["layers"],
        "mean relative layer error": result["mean_error"],
        "calibration tokens": result["calibration"]["tokens"],
        "seconds": result["seconds"],
    }
    output.print_facts(result["out"], facts)
    if not quiet and result["best_would_take_times"]:
        minutes = max(1, round(result["best_would_take_times"] * result["seconds"] / 60))
        output.note(f"This was --effort {result['effort']}; best would take about {minutes} min on this machine.")
    if not quiet:
        output.note(f"What was lost is not measured yet: hf-qep eval {result['out']} --baseline {result['model']}")
