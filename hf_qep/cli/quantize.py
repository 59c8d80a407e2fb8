"""`hf-qep quantize`: a float model of the Hub or of a folder in, a packed checkpoint folder out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.files import check_output
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.config import QepConfig

CALIBRATION_HELP = (
    "Calibration text: a txt, jsonl, csv or parquet file (file:column), a Hub data set (id:config:split:column) or a "
    "weighted mix (a.txt*0.7,b.jsonl*0.3). Left out: the model writes its own."
)


@dataclass(frozen=True)
class JobOptions:
    """Where and how a job runs; what the result is stands in QepConfig."""

    model: str
    """Hub id or folder of the float model."""
    out: Path
    device: str
    dtype: str
    remote_code: bool
    overwrite: bool
    quiet: bool


def quantize_command(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the float model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the quantised checkpoint.")],
    bits: Annotated[
        float, typer.Option(help="Bits per weight: 1.0; with `factored` 0.3 to 2.5, scales included.")
    ] = 1.0,
    method: Annotated[str, typer.Option(help="Solver: sign, onebit, gptq, rtn, factored.")] = "sign",
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale. Left out: the row.")] = None,
    dataset: Annotated[str | None, typer.Option(help=CALIBRATION_HELP)] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    propagation: Annotated[float, typer.Option(help="Strength of error propagation (QEP), 0 to 1.")] = 1.0,
    damping: Annotated[float, typer.Option(help="Ridge of the Hessian, in units of its mean diagonal.")] = 0.03,
    seed: Annotated[int, typer.Option(help="Seed of sampling and solvers.")] = 0,
    skip: Annotated[list[str] | None, typer.Option(help="Module that stays float; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add loader files, so that no plugin is needed to load the folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Quantise a model to about one bit per weight and save it."""
    job = JobOptions(model, out, device, dtype, remote_code, overwrite, quiet or as_json)
    check_output(out, overwrite=overwrite)  # before the seconds that the imports below take
    from hf_qep.config import QepConfig

    config = QepConfig(
        bits=bits,
        method=method,
        group_size=group_size,
        dataset=dataset,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        propagation=propagation,
        damping=damping,
        seed=seed,
        skip_modules=skip,
    )
    result = quantize_to_folder(job, config)
    if as_json:
        output.print_json(result)
    else:
        show(result)


def quantize_to_folder(job: JobOptions, config: QepConfig) -> dict[str, Any]:
    """Run the whole job; returns what the command prints. Raises QepError or OSError, leaving no folder behind."""
    from hf_qep.accounting import bits_report
    from hf_qep.engine.calibration import load_calibration
    from hf_qep.engine.job import quantize_model
    from hf_qep.engine.source import check_checkpoint, check_finite, load_float_model, resolve_model
    from hf_qep.engine.writer import save_checkpoint

    began = time.monotonic()
    check_output(job.out, overwrite=job.overwrite)
    folder = resolve_model(job.model)
    check_checkpoint(folder)
    model, tokenizer = load_float_model(folder, dtype=job.dtype, device=job.device)
    check_finite(model)
    calibration = load_calibration(
        config.dataset,
        tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        model=model,
    )
    report = quantize_model(model, config, calibration, progress=Progress(job.quiet))
    save_checkpoint(model, tokenizer, job.out, report, overwrite=job.overwrite)
    return {
        "model": job.model,
        "out": str(job.out),
        "method": config.method,
        **bits_report(model, job.out),
        "layers": len(report.layers),
        "mean_error": sum(x.error for x in report.layers) / max(1, len(report.layers)),
        "calibration": calibration.description | {"fingerprint": calibration.fingerprint},
        "warnings": report.warnings,
        "seconds": round(time.monotonic() - began, 1),
    }


def show(result: dict[str, Any]) -> None:
    """The summary table and what to do next."""
    rows = [
        ("method", result["method"]),
        ("bits per weight, quantised linears", result["bits_linear"]),
        ("bits per weight, whole model", result["bits_model"]),
        ("weight files", output.human_bytes(result["file_bytes"])),
        ("quantised layers", result["layers"]),
        ("mean relative layer error", result["mean_error"]),
        ("calibration tokens", result["calibration"]["tokens"]),
        ("seconds", result["seconds"]),
    ]
    output.print_table(result["out"], ["", "value"], [(name, output.cell_text(value)) for name, value in rows])
    output.note(f"What was lost is not measured yet: hf-qep compare {result['model']} {result['out']}")
