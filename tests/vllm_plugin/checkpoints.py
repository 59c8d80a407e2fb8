"""Tiny models that were quantised and saved, for vLLM to load."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from hf_qep import QepConfig
from hf_qep.engine.calibration import Calibration
from hf_qep.engine.job import quantize_model
from hf_qep.formats import factored, sign
from tests.plugin.packing import pack_model, packable

OPTIONS = {
    "llama": {"method": "sign", "embedding_bits": 4, "head_bits": 8, "skip_modules": ["model.layers.0.mlp.up_proj"]},
    "cohere2": {"method": "sign", "embedding_bits": 8},
    "cohere2_vision": {"method": "rtn", "embedding_bits": 8},
}
FAMILIES = [*OPTIONS, "qwen3"]
MIXED = {
    sign.Spec(column_scale=True): ("q_proj", "gate_proj"),
    factored.Spec(24, flat=True): ("k_proj", "o_proj", "down_proj"),
    factored.Spec(20): ("v_proj",),
}
"""Formats of the linears of Qwen3, as method `auto` mixes them; `up_proj` stays float."""


class Saved(NamedTuple):
    """A quantised model and the folder that `save_pretrained` wrote."""

    model: PreTrainedModel
    folder: Path


def write(family: str, model: PreTrainedModel, batch: dict[str, Tensor], folder: Path) -> Saved:
    """Quantise a float model with our quantiser, or pack it in mixed formats, and save it."""
    if family in OPTIONS:
        config = QepConfig(num_samples=4, seq_len=16, distill_epochs=0, **OPTIONS[family])
        quantize_model(model, config, Calibration(batch, {}, "", batch["input_ids"].numel()))
    else:
        for spec, leaves in MIXED.items():
            pack_model(model, spec, [name for name in packable(model) if name.endswith(leaves)])
    model.save_pretrained(folder)
    return Saved(model.eval(), folder)
