"""What of a model is to be quantised, and how much work that is; the model may be on meta.

Operations count the products of the passes, the moments and the solver.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_qep.architectures.families import LANGUAGE_MODEL, is_router
from hf_qep.architectures.linears import find_linears, skipped_by_user
from hf_qep.architectures.parts import LinearRef
from hf_qep.config import QepConfig
from hf_qep.engine.source import model_class
from hf_qep.errors import ArchitectureError

SOLVER_PRODUCTS = {"rtn": 0.0, "onebit": 1.0, "gptq": 2.0, "sign": 7.0, "qqa": 180.0, "factored": 60.0, "auto": 90.0}
"""Products of the size (out, in) x (in, in) that a solver makes, from its code; others count as `sign`."""
FACTORISATIONS = 3
"""Cholesky factorisations per linear: correction, solver, scales."""


def count_operations(model: nn.Module, recipe: QepConfig) -> float:
    """Floating-point operations of quantising a model: of the passes, the moments, the solver and training.

    Raises ArchitectureError if the model has no chain of blocks.
    """
    chain = block_list(model)
    linears = quantized_linears(model, chain, recipe.skip_modules or ())
    return _operations(model, linears, len(model.get_submodule(chain)), recipe)


def weights_to_quantize(model: nn.Module, recipe: QepConfig) -> int:
    """Weights that get signs, of a model that may be on meta. Raises ArchitectureError as `count_operations` does."""
    linears = quantized_linears(model, block_list(model), recipe.skip_modules or ())
    return sum(ref.out_features * ref.in_features for ref in linears)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model on meta: of the class that the configuration names, or else what transformers makes of it.

    Raises ArchitectureError if it makes nothing.
    """
    with torch.device("meta"):
        kind = model_class(config)
        if config.architectures and issubclass(kind, PreTrainedModel):
            return kind._from_config(config, dtype=dtype)
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
            if type(config) in auto._model_mapping:
                return auto.from_config(config, dtype=dtype)
    raise ArchitectureError(f"transformers has no model for the configuration {type(config).__name__}")


def block_list(model: nn.Module) -> str:
    """The list of modules with the most parameters; inside the language model if there is one.

    Raises ArchitectureError if the model has no list of modules.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "experts" not in name}
    inside = {name: m for name, m in lists.items() if LANGUAGE_MODEL in name.split(".")}
    if not lists:
        raise ArchitectureError(f"{type(model).__name__} has no list of blocks that could be quantised")
    return max(inside or lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))


def quantized_linears(model: nn.Module, chain: str, skip_modules: Sequence[str]) -> list[LinearRef]:
    """Linears of the chain that get signs, in module order. Raises ArchitectureError if there are none."""
    refs = [ref for ref in find_linears(model) if ref.name.startswith(f"{chain}.")]
    skipped = skipped_by_user(model, list(dict.fromkeys(ref.name for ref in refs)), skip_modules)
    found = [
        ref
        for ref in refs
        if ref.name not in skipped and (ref.expert is not None or not is_router(model, ref.name, ref.out_features))
    ]
    if not found:
        raise ArchitectureError(f"nothing is left to quantise in the list of blocks `{chain}`")
    return found


def _operations(model: nn.Module, linears: Sequence[LinearRef], blocks: int, recipe: QepConfig) -> float:
    weights = sum(ref.out_features * ref.in_features for ref in linears)
    tokens = recipe.num_samples * recipe.seq_len
    solving = _solving_operations(linears, weights, tokens, recipe)
    embedding = model.get_input_embeddings()
    head = embedding.weight.numel() if isinstance(embedding, nn.Embedding) else 0  # as large as the embedding
    return solving + training_operations(weights, head, blocks, tokens, recipe)


def _solving_operations(linears: Sequence[LinearRef], weights: int, tokens: int, recipe: QepConfig) -> float:
    """Passes to and fro, moments, solver. Groups of a block are counted as its distinct input widths plus one."""
    passes = 2.0 + 1.5  # float, advance, and on the average half a block for each of about three groups
    total = passes * 2.0 * weights * tokens
    products = SOLVER_PRODUCTS.get(recipe.method, SOLVER_PRODUCTS["sign"])
    for ref in linears:
        width = float(ref.in_features)
        total += (2.0 * products + 2.0) * ref.out_features * width**2 + FACTORISATIONS * width**3 / 3
        total += 4.0 * tokens * width**2 / 2  # H and C; about two linears share them
    return total


def training_operations(weights: int, head: int, blocks: int, tokens: int, recipe: QepConfig) -> float:
    """Forward and backward from each block to where its loss is taken, then through the whole model in each epoch of
    distillation, where blocks go forward twice unless signs train. weights, head: numbers of weights in the blocks and
    in the head."""
    whole = recipe.tune_lookahead is None
    ahead = (blocks + 1) / 2 if whole else min(recipe.tune_lookahead + 1, blocks)
    tuning = recipe.tune_epochs * (weights * ahead + head * blocks * whole)
    again = 1.0 if recipe.trains_signs(weights) else 4 / 3
    return 6.0 * tokens * (tuning + recipe.distill_epochs * (weights * again + head))
