"""The main job: a float model in, the same model with packed linears out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from hf_qep.architectures.families import eager_experts
from hf_qep.architectures.feeds import FEEDS
from hf_qep.architectures.skeleton import block_inputs, forward_only
from hf_qep.architectures.structure import LinearRef, Structure
from hf_qep.architectures.tables import Table, find_tables
from hf_qep.config import AUTO, QepConfig
from hf_qep.conversion import finish_loading, settle
from hf_qep.distill.teacher import take_teacher
from hf_qep.engine.allocation import allocate
from hf_qep.engine.block import Job, quantize_block
from hf_qep.engine.budget import bit_budget
from hf_qep.engine.calibration import Calibration, advise
from hf_qep.engine.curvature import OutputCurvature
from hf_qep.engine.distillation import distill_model
from hf_qep.engine.masks import padding_mask
from hf_qep.engine.recipes import Recipe, uniform_recipes
from hf_qep.engine.report import QuantizationReport
from hf_qep.engine.residence import Residence, align_outside
from hf_qep.engine.streams import ROOM_BYTES, StreamStore
from hf_qep.engine.tables import quantize_tables
from hf_qep.engine.together.processes import Processes
from hf_qep.engine.together.shares import Shares, check_shared, why_alone
from hf_qep.engine.tuning import TuningData, rows_per_step
from hf_qep.errors import AlreadyQuantizedError, ArchitectureError
from hf_qep.modules import QepExpertWeight, packed_modules
from hf_qep.progress import SILENT, Progress

SAMPLE_TOKENS = 32
"""Tokens of the one row that shows the structure; every linear but rare experts is reached by any."""


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    config: QepConfig,
    calibration: Calibration,
    *,
    progress: Progress = SILENT,
    stream_budget: int = ROOM_BYTES,
    stream_folder: Path | None = None,
    stored_as: torch.dtype | None = None,
    residence: Residence | None = None,
    processes: Processes | None = None,
) -> QuantizationReport:
    """Quantise the linears of a transformers model, and its tables if asked, in place.

    `model.config.quantization_config` is set as after loading a quantised one.
    model: float, in memory, on any device. config: copied, not changed. calibration: inputs of the model.
    stream_budget: bytes of activations kept in memory; the rest goes to files under stream_folder.
    stored_as: dtype in the files of what stays float, if it is another one than now; only `max_memory` asks for it.
    residence: where the weights of the blocks are, see `engine.residence`; default: in memory, before and after.
    processes: those that do it together, all with the same arguments; all end with the same model. Default: one.
    Raises AlreadyQuantizedError, ArchitectureError, BitsError, ConfigError, IllConditionedError, NonFiniteError. The
    model is unusable if an error comes after the first block.
    """
    if packed_modules(model) or getattr(model, "is_quantized", False):
        raise AlreadyQuantizedError("this model is quantised already; start from the float model")
    residence = residence or Residence()
    model.eval()
    rows = min(rows_per_step(calibration.inputs), config.batch_size)  # of a step of training
    batches = calibration.batches(rows if config.tune_epochs else config.batch_size)
    processes = processes or Processes()
    check_shared(processes, why_alone(config))
    shares = Shares(processes, len(batches))
    structure = residence.describe(model, _sample(batches[0]), config.skip_modules or ())
    align_outside(model, structure)
    tables = find_tables(model, config)
    recipes, budget = _recipes(model, structure, tables, config, stored_as)
    report = QuantizationReport(skipped=dict(structure.skipped), calibration=dict(calibration.description))
    with StreamStore(stream_budget, stream_folder) as store, forward_only(model), eager_experts(model):
        early = _wants_teacher_first(config, bool(tables) and not residence.rereads)
        job = _begin(model, structure, tables, batches, shares, config, store, report, recipes, budget, early=early)
        if config.output_curvature:
            job.curvature = OutputCurvature(structure, batches, config.damping)
        _walk(job, structure, residence, progress)
        if config.distill_epochs:
            with report.timed("teacher"):
                job.teacher = job.teacher or residence.teacher(job, structure, batches)
            residence.gather(model)
            latents = job.latents if job.distills_signs else {}
            with report.timed("distill"):
                report.distillation = distill_model(
                    model, config, calibration.inputs, job.teacher, latents, rows_per_step=rows, progress=progress
                )
    _mark_quantized(model, config)
    residence.end(model)
    return report


def _walk(job: Job, structure: Structure, residence: Residence, progress: Progress) -> None:
    """Quantise all blocks, or those behind the ones that were done before."""
    done, count = residence.resume(job, structure), len(structure.blocks)
    with progress.bar("quantising", total=count, unit="block") as bar:
        bar.advance(done)
        for index in range(done, count):
            job.shares.processes.doing = f"in block {index + 1} of {count}"
            with residence.holding(job.model, structure.blocks[index]):
                quantize_block(job, index, structure.blocks[index])
                residence.finished(job, index, structure.blocks[index])
            bar.advance(1, detail=f"error {job.report.layers[-1].error:.3f}")


def _begin(
    model: Any,
    structure: Structure,
    tables: Sequence[Table],
    batches: list[dict[str, torch.Tensor]],
    shares: Shares,
    config: QepConfig,
    store: StreamStore,
    report: QuantizationReport,
    recipes: dict[LinearRef, Recipe],
    budget: int | None,
    *,
    early: bool,
) -> Job:
    """Both streams at the first block, and if `early` what the float model says, all before a linear is changed."""
    floats, quantized, sample = store.stream(), store.stream(), _sample(batches[0])
    batches = [batches[number] for number in shares.own]
    inputs = block_inputs(model, structure, batches, floats.append)
    _warn(report, advise(shares.total(floats.tokens), _widest(structure)))
    if budget is not None:
        with report.timed("allocate"):
            inputs.first_hidden = list(floats.all(model.device))
            recipes = allocate(model, structure, batches, inputs, config, budget)
            inputs.first_hidden.clear()
    teacher = take_teacher(model, batches) if early else None
    if tables:  # the quantised stream starts from what will be stored
        quantize_tables(model, tables, sample, report, structure)
        block_inputs(model, structure, batches, quantized.append)
    else:
        for hidden in floats.all(model.device):
            quantized.append(hidden)
    masks = [padding_mask(batch) for batch in batches]
    job = Job(model, config, inputs, floats, quantized, store, report, masks, recipes, teacher=teacher, shares=shares)
    if config.tune_epochs:
        job.tuning = TuningData(structure, batches)
    if config.tune_epochs or job.distills_signs:
        job.latents = {}
    return job


def _wants_teacher_first(config: QepConfig, tables_change: bool) -> bool:
    """Whether what the float model says is wanted before the last block, where its stream says it without a pass."""
    return bool((config.tune_epochs and config.tune_lookahead is None) or (config.distill_epochs and tables_change))


def _sample(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row, cut short if there is nothing but rows of tokens (image placeholders must stay whole)."""
    tokens_only = all(v.ndim == 2 for v in batch.values())
    return {k: v[:1, :SAMPLE_TOKENS] if tokens_only else v[:1] for k, v in batch.items()}


def _recipes(
    model: nn.Module, structure: Structure, tables: list[Table], config: QepConfig, stored_as: torch.dtype | None
) -> tuple[dict[LinearRef, Recipe], int | None]:
    """Method and spec of every linear, or the bits to choose them for.

    A width that the method cannot serve is refused here, before hours of work, not in the middle of them.
    """
    refs = structure.linears()
    if not refs:
        raise ArchitectureError("skip_modules leaves nothing to quantise")
    if config.export is not None and structure.family not in FEEDS:
        raise ArchitectureError(
            f'export="{config.export}" knows the families {", ".join(FEEDS)}, not {structure.family!r}; leave it out'
        )
    if config.method == AUTO:
        return {}, bit_budget(model, refs, tables, config, stored_as)
    return uniform_recipes(refs, config), None


def _widest(structure: Structure) -> int:
    return max(ref.in_features for block in structure.blocks for group in block.groups for ref in group.linears)


def _warn(report: QuantizationReport, text: str | None) -> None:
    if text:
        report.warnings.append(text)
        warnings.warn(text, stacklevel=4)


def _mark_quantized(model: nn.Module, config: QepConfig) -> None:
    """Leave the model as `from_pretrained` leaves a quantised one, so that saving writes the config."""
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k != "quant_method"})
    settle(model, config)
    finish_loading(model, config)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    if any(isinstance(m, QepExpertWeight) for m in model.modules()):
        model.set_experts_implementation("eager")  # the only one that asks for one expert's matrix at a time
