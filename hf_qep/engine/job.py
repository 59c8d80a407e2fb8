"""The main job: a float model in, the same model with packed linears out."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from hf_qep.architectures.families import eager_experts
from hf_qep.architectures.skeleton import block_inputs, forward_only
from hf_qep.architectures.structure import Structure, describe
from hf_qep.config import QepConfig
from hf_qep.conversion import settle
from hf_qep.engine.block import Job, quantize_block
from hf_qep.engine.calibration import Calibration, advise
from hf_qep.engine.report import QuantizationReport
from hf_qep.engine.streams import StreamStore
from hf_qep.engine.tuning import rows_per_step, tuning_data
from hf_qep.errors import AlreadyQuantizedError, ArchitectureError
from hf_qep.modules import QepExpertWeight, packed_modules
from hf_qep.progress import SILENT, Progress
from hf_qep.registry import METHODS

SAMPLE_TOKENS = 32
"""Tokens of the one row that shows the structure; every linear but rare experts is reached by any."""


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    config: QepConfig,
    calibration: Calibration,
    *,
    progress: Progress = SILENT,
    stream_budget: int = 8 << 30,
    stream_folder: Path | None = None,
) -> QuantizationReport:
    """Quantise the linears of a transformers model in place and set `model.config.quantization_config`.

    model: float, in memory, on any device. config: copied, not changed. calibration: inputs of the model.
    stream_budget: bytes of activations kept in memory; the rest goes to files under stream_folder.
    Raises AlreadyQuantizedError, ArchitectureError, BitsError, ConfigError, IllConditionedError, NonFiniteError. The
    model is unusable if an error comes after the first block.
    """
    if packed_modules(model) or getattr(model, "is_quantized", False):
        raise AlreadyQuantizedError("this model is quantised already; start from the float model")
    model.eval()
    rows = rows_per_step(calibration.inputs) if config.tune_epochs else config.batch_size
    batches = calibration.batches(min(rows, config.batch_size))
    structure = describe(model, _sample(batches[0]), config.skip_modules or ())
    _check_shapes(structure, config)
    report = QuantizationReport(skipped=dict(structure.skipped), calibration=dict(calibration.description))
    with StreamStore(stream_budget, stream_folder) as store, forward_only(model), eager_experts(model):
        inputs = block_inputs(model, structure, batches)
        _warn(report, advise(sum(h.shape[:-1].numel() for h in inputs.first_hidden), _widest(structure)))
        floats, quantized = store.stream(), store.stream()
        for hidden in inputs.first_hidden:
            floats.append(hidden)
            quantized.append(hidden)
        inputs.first_hidden.clear()
        tuning = tuning_data(model, structure, batches, config) if config.tune_epochs else None
        job = Job(model, config, inputs, floats, quantized, store, report, tuning)
        with progress.bar("quantising", total=len(structure.blocks), unit="block") as bar:
            for index, block in enumerate(structure.blocks):
                quantize_block(job, index, block)
                bar.advance(1, detail=f"error {report.layers[-1].error:.3f}")
    _mark_quantized(model, config)
    return report


def _sample(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row, cut short if there is nothing but rows of tokens (image placeholders must stay whole)."""
    tokens_only = all(v.ndim == 2 for v in batch.values())
    return {k: v[:1, :SAMPLE_TOKENS] if tokens_only else v[:1] for k, v in batch.items()}


def _check_shapes(structure: Structure, config: QepConfig) -> None:
    """Refuse a width that the method cannot serve before hours of work, not in the middle of them."""
    method = METHODS.get(config.method)
    refs = [ref for block in structure.blocks for group in block.groups for ref in group.linears]
    if not refs:
        raise ArchitectureError("skip_modules leaves nothing to quantise")
    for ref in {(r.out_features, r.in_features): r for r in refs}.values():
        method.spec(config.bits, config.group_size, ref.out_features, ref.in_features)


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
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    if any(isinstance(m, QepExpertWeight) for m in model.modules()):
        model.set_experts_implementation("eager")  # the only one that asks for one expert's matrix at a time
