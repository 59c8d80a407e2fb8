"""Packed checkpoints to read: of whole tiny models, and of single matrices."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from hf_qep.config import FORMAT_VERSION
from hf_qep.formats import factored, sign
from tests.plugin.packing import pack_model

ONE = "model.safetensors"
SPECS = {
    "llama": sign.Spec(group_size=16),
    "qwen3": factored.Spec(24, flat=True),
    "qwen3_moe": factored.Spec(12),
    "gpt2": sign.Spec(column_scale=True),
    "bert": sign.Spec(group_size=32, column_scale=True),
    "cohere2_vision": sign.Spec(),
    "vit": sign.Spec(column_scale=True),
}


@pytest.fixture(scope="session")
def saved(tiny_model, tmp_path_factory):
    """`saved(family)`: the packed model and its folder; change neither."""
    made = {}

    def build(family):
        if family not in made:
            made[family] = pack_model(tiny_model(family), SPECS[family]), tmp_path_factory.mktemp(family)
            made[family][0].save_pretrained(made[family][1])
        return made[family]

    return build


def write(folder: Path, spec: Any, tensors: dict[str, Tensor], **config: Any) -> None:
    """A checkpoint of one matrix, called `m`. config: other values in its quantization_config."""
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / ONE)
    found = {"quant_method": "qep", "format_version": FORMAT_VERSION, "layers": [{"modules": ["m"], **asdict(spec)}]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": found | config}))
