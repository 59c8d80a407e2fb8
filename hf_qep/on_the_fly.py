"""`from_pretrained(float checkpoint, quantization_config=QepConfig(...))`: quantise right after loading."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import calibration_of
from hf_qep.engine.job import quantize_model
from hf_qep.progress import Progress


def quantize_loaded(model: PreTrainedModel, config: QepConfig) -> None:
    """Calibrate by `config.dataset`, or by text the model writes itself, and quantise `model` in place.

    Raises what `calibration_of` and `quantize_model` raise.
    """
    calibration = calibration_of(config, _tokenizer(model, config), model)
    model.is_quantized = False  # transformers announced it before loading, but every weight is still float
    quantize_model(model, config, calibration, progress=Progress())


def _tokenizer(model: PreTrainedModel, config: QepConfig) -> Any:
    """The given tokenizer, the model's own, or None: tensors as calibration data need none."""
    if config.tokenizer is not None and not isinstance(config.tokenizer, str):
        return config.tokenizer
    source = config.tokenizer or model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        if config.tokenizer is not None:
            raise
        return None
