"""From a float model in memory to a checked folder: the part that `quantize` and `demo` share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_qep.accounting import bits_report
from hf_qep.config import QepConfig
from hf_qep.engine.calibration import Calibration, load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.engine.manifest import build_manifest
from hf_qep.engine.report import QuantizationReport
from hf_qep.engine.source import licence_of, snapshot_revision
from hf_qep.engine.writer import save_checkpoint
from hf_qep.errors import CheckpointError
from hf_qep.files import check_output
from hf_qep.modules import cast_weights
from hf_qep.progress import SILENT, Progress

CHECKED_ROWS, CHECKED_TOKENS = 1, 64
RELOAD_TOLERANCE = 1e-3
"""Largest difference of outputs, in units of the largest output; the same tensors through the same code give 0."""


@dataclass(frozen=True)
class Saved:
    """A finished job. reloaded: the model of the folder. bits: what `bits_report` says of it."""

    reloaded: PreTrainedModel
    report: QuantizationReport
    calibration: Calibration
    bits: dict[str, Any]


def quantize_and_save(
    model: PreTrainedModel,
    tokenizer: Any,
    config: QepConfig,
    out: Path,
    *,
    base_model: str,
    base_folder: Path,
    calibration: Calibration | None = None,
    stored_as: torch.dtype | None = None,
    overwrite: bool = False,
    remote_code: bool = False,
    progress: Progress = SILENT,
) -> Saved:
    """Quantise `model` in place, save it to `out`, load that folder as a user would and compare.

    calibration: default is what `config` asks for. stored_as: dtype in the files of what stays float, for models that
    compute in another one; `model` is cast to it. Raises QepError or OSError; `out` is then as it was, except that it
    is removed if the folder does not load back to the same model.
    """
    check_output(out, overwrite=overwrite)
    if calibration is None:
        calibration = load_calibration(
            config.dataset,
            tokenizer,
            num_samples=config.num_samples,
            seq_len=config.seq_len,
            seed=config.seed,
            model=model,
        )
    report = quantize_model(model, config, calibration, progress=progress, stored_as=stored_as)
    if stored_as is not None:
        cast_weights(model, stored_as)
    manifest = build_manifest(
        base_model=base_model,
        config=config,
        calibration=calibration,
        report=report,
        revision=snapshot_revision(base_folder),
        licence=licence_of(base_folder),
    )
    save_checkpoint(model, out, tokenizer=tokenizer, manifest=manifest, overwrite=overwrite, remote_code=remote_code)
    reloaded = load_back(model, out, calibration)
    return Saved(reloaded, report, calibration, bits_report(reloaded, out))


@torch.no_grad()
def load_back(model: PreTrainedModel, out: Path, calibration: Calibration) -> PreTrainedModel:
    """The model of folder `out` through `from_pretrained`, after its outputs were found equal to those of `model`.

    Raises CheckpointError, and removes the folder, if they are not.
    """
    reloaded = type(model).from_pretrained(out, local_files_only=True).to(model.device).eval()
    batch = {name: _few(value).to(model.device) for name, value in calibration.inputs.items()}
    expected, got = model(**batch)[0].float(), reloaded(**batch)[0].float()
    difference = (expected - got).abs().max().item() / max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)
    if not difference <= RELOAD_TOLERANCE:
        shutil.rmtree(out)
        raise CheckpointError(
            f"the saved model answers differently from the one in memory (relative difference {difference:.2g}, limit "
            f"{RELOAD_TOLERANCE:g}); {str(out)!r} was removed, please report this with the name of the model"
        )
    return reloaded


def _few(value: torch.Tensor) -> torch.Tensor:
    return value[:CHECKED_ROWS, :CHECKED_TOKENS] if value.ndim == 2 else value[:CHECKED_ROWS]
