"""`hf-qep quantize`: a float model of the Hub or of a folder in, a packed checkpoint folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.cli.placement import DTYPES, DeviceOption, to_device, to_dtype
from hf_qep.files import check_output
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.cli.job import Saved

CALIBRATION_HELP = (
    "Calibration text: a txt, jsonl, csv or parquet file (file:column), a Hub data set (id:config:split:column) or a "
    "weighted mix (a.txt*0.7,b.jsonl*0.3). Left out: the model writes its own."
)
DTYPE_HELP = f"Dtype to compute in: auto (as stored), {', '.join(DTYPES)}. The files keep the stored one."
TUNE_HELP = "Passes in which each block is trained towards the float model; 4 help much. 0: none."
LOOKAHEAD_HELP = "Blocks between a tuned block and its loss. Left out: all, and the head."
BITS_HELP = "Bits per weight: 1.0; with `factored` 0.3 to 2.5, scales included."


def quantize_command(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the float model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the quantised checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub model.")] = None,
    bits: Annotated[float, typer.Option(help=BITS_HELP)] = 1.0,
    method: Annotated[str, typer.Option(help="Solver: sign, onebit, gptq, rtn or factored.")] = "sign",
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale. Left out: the row.")] = None,
    dataset: Annotated[str | None, typer.Option(help=CALIBRATION_HELP)] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    propagation: Annotated[float, typer.Option(help="Strength of error propagation (QEP), 0 to 1.")] = 1.0,
    residual: Annotated[bool, typer.Option(help="Correct the error that the residual stream carries too.")] = True,
    damping: Annotated[float, typer.Option(help="Ridge of the Hessian, in units of its mean diagonal.")] = 0.03,
    tune_epochs: Annotated[int, typer.Option(help=TUNE_HELP)] = 0,
    tune_lookahead: Annotated[int | None, typer.Option(help=LOOKAHEAD_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and solvers.")] = 0,
    skip: Annotated[list[str] | None, typer.Option(help="Module that stays float; may be repeated.")] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add files with which the folder loads without this plugin.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Quantise a model to about one bit per weight and save it."""
    check_output(out, overwrite=overwrite)  # before the seconds that the imports below take
    began = time.monotonic()
    place, compute_as = to_device(device), to_dtype(dtype)
    from hf_qep.cli.job import quantize_and_save
    from hf_qep.config import QepConfig
    from hf_qep.engine.source import load_float_model, resolve_model

    rows = {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size}
    solver = {"propagation": propagation, "residual": residual, "damping": damping, "seed": seed}
    solver |= {"tune_epochs": tune_epochs, "tune_lookahead": tune_lookahead, "skip_modules": skip}
    config = QepConfig(bits=bits, method=method, group_size=group_size, dataset=dataset, **rows, **solver)
    folder = resolve_model(model, revision)
    float_model, tokenizer = load_float_model(folder)
    stored_as = float_model.dtype
    saved = quantize_and_save(
        float_model.to(device=place, dtype=compute_as),
        tokenizer,
        config,
        out,
        base_model=model,
        base_folder=folder,
        stored_as=stored_as if compute_as else None,
        overwrite=overwrite,
        remote_code=remote_code,
        progress=Progress(quiet or as_json),
    )
    result = summary(model, out, config.method, saved) | {"seconds": round(time.monotonic() - began, 1)}
    if as_json:
        output.print_json(result)
    else:
        _show(result, quiet)


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
    if not quiet:
        output.note(f"What was lost is not measured yet: hf-qep eval {result['out']} --baseline {result['model']}")
