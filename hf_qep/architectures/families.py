"""What the structure of a model cannot tell. Everything else is derived from one forward pass.

A family is only mentioned here if it breaks a rule; so far naming conventions that hold across transformers suffice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

LANGUAGE_MODEL = "language_model"
"""Module that holds the blocks to quantise if a model has several chains of blocks (vision-language models)."""

EXPERTS = "experts"
"""Module that holds the experts of a mixture; modules beside it decide which tokens they get."""

EXPERTS_EXEMPT = "the router may send different tokens to this expert in the float and in the quantised stream"

ROUTER_SKIPPED = "router: too small to matter in size, and its choices must not change"


def is_expert(name: str) -> bool:
    """Whether a linear or parameter of this qualified name belongs to an expert."""
    return EXPERTS in name.split(".")


def is_router(model: nn.Module, name: str, out_features: int) -> bool:
    """Whether the linear `name` chooses or weighs experts: it sits beside them and has at most one output for each."""
    experts = getattr(model.get_submodule(name.rpartition(".")[0]), EXPERTS, None)
    if not isinstance(experts, nn.Module):
        return False
    stacked = [len(p) for p in experts.parameters(recurse=False) if p.ndim == 3]
    return out_features <= max(stacked, default=len(list(experts.children())))


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run experts one by one with `functional.linear` while the body runs; other implementations fuse them."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
