"""The tensors behind a LinearRef, oriented out x in."""

from __future__ import annotations

from torch import Tensor, nn

from hf_qep.architectures.parts import LinearRef

ON_DEMAND = "_qep_on_demand"
"""Attribute of a module whose weights are on meta, and read from their files whenever it is called."""


def on_demand(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of a model whose weights are read when it is called."""
    return {name: module for name, module in model.named_modules() if getattr(module, ON_DEMAND, False)}


def get_weight(model: nn.Module, ref: LinearRef) -> Tensor:
    """Weight (out, in) as a view without gradient, in the model's dtype: writing into it changes the model."""
    if ref.expert is not None:
        return _parameter(model, ref.name).data[ref.expert]
    weight = _parameter(model, f"{ref.name}.weight").data
    return weight.T if ref.kind == "conv1d" else weight


def get_bias(model: nn.Module, ref: LinearRef) -> Tensor | None:
    """Bias (out,) as a view without gradient, or None. Experts keep theirs in `<parameter>_bias` (experts, out)."""
    name = f"{ref.name}.bias" if ref.expert is None else f"{ref.name}_bias"
    owner, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(owner), leaf, None)
    if bias is None:
        return None
    return bias.data if ref.expert is None else bias.data[ref.expert]


def _parameter(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
