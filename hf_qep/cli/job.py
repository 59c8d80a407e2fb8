"""From a float model, in memory or on the disk, to a checked folder: the part that `quantize` and `demo` share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_qep.accounting import bits_report
from hf_qep.config import QepConfig
from hf_qep.engine.assembly import SHARD_SIZE
from hf_qep.engine.calibration import Calibration, calibration_of
from hf_qep.engine.fingerprint import check_alike, job_parts
from hf_qep.engine.job import quantize_model
from hf_qep.engine.manifest import build_manifest
from hf_qep.engine.on_demand import BlockWeights, free_memory
from hf_qep.engine.report import QuantizationReport
from hf_qep.engine.shards import Shards
from hf_qep.engine.source import licence_of, snapshot_revision
from hf_qep.engine.streaming import Streaming
from hf_qep.engine.streams import ROOM_BYTES, room_bytes
from hf_qep.engine.together.processes import Processes
from hf_qep.engine.unfinished import Unfinished
from hf_qep.engine.writer import save_checkpoint
from hf_qep.errors import CheckpointError, DiskSpaceError
from hf_qep.files import check_output, is_disk_full
from hf_qep.modules import cast_weights
from hf_qep.progress import SILENT, Progress

CHECKED_ROWS, CHECKED_TOKENS = 1, 64
RELOAD_TOLERANCE = 1e-3
"""Largest difference of outputs, in units of the largest output; the same tensors through the same code give 0."""

SHARE = 0.5
"""Of the free memory: for all weights while a model writes its own calibration rows, because it reads them for every
token."""


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
    stream_budget: int | None = None,
    max_shard_size: str | int = SHARD_SIZE,
) -> Saved:
    """Quantise `model` in place, save it to `out`, load that folder as a user would and compare.

    calibration: default is what `config` asks for. stored_as: dtype in the files of what stays float, for models that
    compute in another one; `model` is cast to it. stream_budget: bytes of activations in memory; default: ROOM_BYTES.
    max_shard_size: bytes of tensors in one weight file, or a size such as "500MB".
    Raises QepError or OSError; `out` is then as it was, except that it is removed if the folder does not load back to
    the same model.
    """
    check_output(out, overwrite=overwrite)
    if calibration is None:
        calibration = calibration_of(config, tokenizer, model)
    room = ROOM_BYTES if stream_budget is None else stream_budget
    report = quantize_model(model, config, calibration, progress=progress, stored_as=stored_as, stream_budget=room)
    if stored_as is not None:
        cast_weights(model, stored_as)
    manifest = _manifest(base_model, base_folder, config, calibration, report)
    saving = {"manifest": manifest, "overwrite": overwrite, "remote_code": remote_code}
    save_checkpoint(model, out, tokenizer=tokenizer, max_shard_size=max_shard_size, **saving)
    probe = _probe(calibration)
    reloaded = load_back(type(model), out, probe, _answer(model, probe), device=model.device)
    return Saved(reloaded, report, calibration, bits_report(reloaded, out))


def stream_and_save(
    model: PreTrainedModel,
    blocks: BlockWeights,
    tokenizer: Any,
    config: QepConfig,
    out: Path,
    *,
    base_model: str,
    base_folder: Path,
    stored_as: torch.dtype | None = None,
    overwrite: bool = False,
    resume: bool = False,
    remote_code: bool = False,
    progress: Progress = SILENT,
    stream_budget: int | None = None,
    max_shard_size: str | int = SHARD_SIZE,
    processes: Processes | None = None,
) -> Saved | None:
    """As `quantize_and_save`, for a model whose blocks are read when they are needed.

    What is done is kept beside `out`, so that a job that was killed, or failed, after its first block can go on.
    resume: go on with it. stream_budget: bytes of activations in memory; default: what there is room for.
    processes: those that share the work, all with the same arguments; the first writes, the others return None.
    Raises ResumeError if the job was made of something else, OutputExistsError if something was left and neither option
    says what to do with it, LostProcessError.
    """
    processes, unfinished = processes or Processes(), Unfinished(out)
    check_alike(processes, config, blocks.shards.folder)
    place = {"device": model.device, "dtype": model.dtype if stored_as else None}
    parts = partial(job_parts, blocks.shards, config, **place, progress=progress)
    overwrite = processes.from_first(partial(_begin, unfinished, parts, overwrite, resume))
    with _left_in_order(unfinished, blocks.shards, processes):
        calibration = processes.from_first(lambda: _rows(unfinished, config, tokenizer, model, blocks))
        trains, probe = bool(config.distill_epochs), _probe(calibration)
        streaming = Streaming(blocks, unfinished, probe, stored_as, trains=trains)
        report = quantize_model(
            model,
            config,
            calibration,
            progress=progress,
            stored_as=stored_as,
            residence=streaming,
            stream_budget=room_bytes(free_memory() // processes.neighbours) if stream_budget is None else stream_budget,
            stream_folder=unfinished.folder if unfinished.folder.is_dir() else None,
            processes=processes,
        )
        if stored_as is not None:
            cast_weights(model, stored_as)
        if processes.first:
            saving = {"overwrite": overwrite, "remote_code": remote_code, "max_shard_size": max_shard_size}
            saving["manifest"] = _manifest(base_model, base_folder, config, calibration, report)
            save_checkpoint(model, out, tokenizer=tokenizer, blocks=() if trains else streaming.files, **saving)
        processes.gather()
    if not processes.first:
        processes.gather()
        return None
    answer, computed = (_answer(model, probe), None) if trains else (streaming.answer, place["dtype"])
    reloaded = _read_back(model, out, probe, answer, computed, stored_as)
    processes.gather()
    return Saved(reloaded, report, calibration, bits_report(reloaded, out))


def _read_back(
    model: PreTrainedModel,
    out: Path,
    probe: dict[str, torch.Tensor],
    answer: torch.Tensor,
    computed: torch.dtype | None,
    stored_as: torch.dtype | None,
) -> PreTrainedModel:
    reloaded = load_back(type(model), out, probe, answer, device=model.device, dtype=computed)
    if computed is not None:
        cast_weights(reloaded, stored_as)
    return reloaded


@contextmanager
def _left_in_order(unfinished: Unfinished, shards: Shards, processes: Processes) -> Iterator[None]:
    """What the body has done is kept if it fails, and removed when it has ended. All processes fail with the same
    error: DiskSpaceError if a disk is full."""
    try:
        with processes.agreeing(), _said_when_full(unfinished):
            if processes.first:
                shards.keep_account()
            yield
    except BaseException:
        shards.close()
        if processes.first:
            unfinished.give_up()
        raise
    shards.close()
    if processes.first:
        unfinished.remove()


@contextmanager
def _said_when_full(unfinished: Unfinished) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not is_disk_full(error):
            raise
        kept = any(unfinished.folder.glob("after-*"))
        raise DiskSpaceError(
            f"no space is left on the disk for {str(unfinished.out)!r}; free some, then "
            f"{'go on with --resume, which begins behind the last block' if kept else 'start again'}"
        ) from error


def _begin(unfinished: Unfinished, parts: Callable[[], dict[str, Any]], overwrite: bool, resume: bool) -> bool:
    """Begin, or go on; whether what lies in the output may be replaced."""
    overwrite = overwrite or (resume and unfinished.wrote_output)
    check_output(unfinished.out, overwrite=overwrite)
    unfinished.begin(parts(), resume=resume, overwrite=overwrite)
    return overwrite


def _rows(
    unfinished: Unfinished, config: QepConfig, tokenizer: Any, model: PreTrainedModel, blocks: BlockWeights
) -> Calibration:
    own = config.dataset is None or (isinstance(config.dataset, str) and config.dataset == "self")
    held = own and not unfinished.has_rows and blocks.bytes < SHARE * free_memory()
    with blocks.holding_all() if held else nullcontext():
        return unfinished.calibration(lambda: calibration_of(config, tokenizer, model), costly=own)


@torch.no_grad()
def load_back(
    kind: type[PreTrainedModel],
    out: Path,
    probe: dict[str, torch.Tensor],
    expected: torch.Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model of folder `out` through `from_pretrained`, after its first output for the inputs `probe` was found
    equal to the expected one.

    dtype: to compute in, default is the stored one. Raises CheckpointError, and removes the folder, if it is not.
    """
    options = {} if dtype is None else {"dtype": dtype}
    reloaded = kind.from_pretrained(out, local_files_only=True, **options).to(device).eval()
    got = _answer(reloaded, probe)
    difference = (expected - got).abs().max().item() / max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)
    if not difference <= RELOAD_TOLERANCE:
        shutil.rmtree(out)
        raise CheckpointError(
            f"the saved model answers differently from the one in memory (relative difference {difference:.2g}, limit "
            f"{RELOAD_TOLERANCE:g}); {str(out)!r} was removed, please report this with the name of the model"
        )
    return reloaded


@torch.no_grad()
def _answer(model: PreTrainedModel, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{name: value.to(model.device) for name, value in probe.items()})[0].float()


def _probe(calibration: Calibration) -> dict[str, torch.Tensor]:
    """A few tokens of the first rows, as inputs of the model."""
    return {
        name: value[:CHECKED_ROWS, :CHECKED_TOKENS] if value.ndim == 2 else value[:CHECKED_ROWS]
        for name, value in calibration.inputs.items()
    }


def _manifest(
    base_model: str, base_folder: Path, config: QepConfig, calibration: Calibration, report: QuantizationReport
) -> dict[str, Any]:
    return build_manifest(
        base_model=base_model,
        config=config,
        calibration=calibration,
        report=report,
        revision=snapshot_revision(base_folder),
        licence=licence_of(base_folder),
    )
