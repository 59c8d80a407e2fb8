"""Packed models without the engine: signs and mean magnitudes of the float weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from hf_qep import QepConfig
from hf_qep.conversion import finish_loading, settle
from hf_qep.formats import factored, sign
from hf_qep.modules import QepExpertWeight, packed_like, replace_module

SIGN = sign.Spec(column_scale=True)


def packable(model: PreTrainedModel) -> list[str]:
    """Linears of the repeated layers and 3-D expert parameters, in model order."""
    modules = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and _in_a_layer(n)]
    return modules + [n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n]


def _in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split(".")) and not name.startswith("model.vision_tower")


@torch.no_grad()
def pack_model(model: PreTrainedModel, spec: Any = SIGN, names: list[str] | None = None) -> PreTrainedModel:
    """Replace `names` (default: all packable) in place and leave the model as loading would."""
    for name in packable(model) if names is None else names:
        new = packed_like(model, name, spec)
        if isinstance(new, QepExpertWeight):
            for expert, weight in enumerate(model.get_parameter(name)):
                new.load_packed_expert(expert, _pack(weight, spec))
        else:
            old = model.get_submodule(name)
            new.load_packed(_pack(old.weight.t() if isinstance(old, Conv1D) else old.weight, spec))
            if old.bias is not None:
                new.bias.copy_(old.bias)
        replace_module(model, name, new)
    config = QepConfig(layers=[])
    settle(model, config)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, "qep"
    finish_loading(model, config)
    return model


def _pack(weight: Tensor, spec: Any) -> dict[str, Tensor]:
    if isinstance(spec, factored.Spec):
        return _pack_factored(weight.float(), spec)
    width = weight.shape[1] if spec.group_size is None else spec.group_size
    parts = {"signs": weight >= 0, "row_scale": weight.float().unflatten(1, (-1, width)).abs().mean(-1)}
    if spec.column_scale:
        parts["column_scale"] = 1 + 0.1 * torch.sin(torch.arange(weight.shape[1]).float())
    return sign.pack(parts, spec)


def _pack_factored(weight: Tensor, spec: factored.Spec) -> dict[str, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    u, s, v = u[:, : spec.rank], s[: spec.rank], v[: spec.rank]
    scales = {"row_scale": u.abs().mean(1), "middle_scale": s, "column_scale": v.abs().mean(0)}
    return factored.pack({"left": u >= 0, "right": v >= 0, **scales}, spec)


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """First output of a forward pass without gradients."""
    with torch.no_grad():
        return model(**batch)[0]
