"""What quantising a model will take and give, from its configuration alone: no weight is read or allocated.

Bytes of the output are exact: they are summed over the tensors that will be written. Memory is the sum of what the
engine holds at once at its widest layer. Operations count the products of the passes, the moments and the solver;
seconds are these over a rate that the caller measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
from hf_qep.architectures.tables import Table, find_tables
from hf_qep.config import AUTO, QepConfig
from hf_qep.engine.budget import bit_budget
from hf_qep.engine.recipes import uniform_recipes
from hf_qep.engine.source import model_class
from hf_qep.errors import ArchitectureError
from hf_qep.formats import integer

SOLVER_PRODUCTS = {"rtn": 0.0, "onebit": 1.0, "gptq": 2.0, "sign": 7.0, "qqa": 180.0, "factored": 60.0, "auto": 90.0}
"""Products of the size (out, in) x (in, in) that a solver makes, from its code; others count as `sign`."""
SQUARES = 8
"""Matrices of the input width squared that are held at once: H, C or G, the damped H, its factor, copies."""
COPIES = 6
"""float32 copies of one weight that a solver holds."""
BYTES_PER_SIGN = 24
"""float32 numbers that training holds for each sign: latent, gradient, two moments, the best latent, the weight."""
FACTORISATIONS = 3
"""Cholesky factorisations per linear: correction, solver, scales."""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, work in floating-point operations, seconds only with a measured rate."""

    parameters: int
    quantized_weights: int
    """Weights that get a sign."""
    float_bytes: int
    """The float model in the dtype of its files."""
    linear_bytes: int
    """The quantised linears, scales and padding included."""
    table_bytes: int
    """Embedding and head as whole numbers; 0 if they stay as they are."""
    rest_bytes: int
    """Everything that stays as it is: norms, biases, embeddings and head unless they are asked for."""
    bits_linear: float
    bits_model: float
    memory_bytes: int
    """Peak while quantising with all weights in memory: float model, activations of both streams, statistics, work of
    the widest layer. A job that reads its model block by block holds one block of it, and the rest as given above."""
    disk_bytes: int
    """Download and output."""
    operations: float
    seconds: float | None
    blocks: int
    kept: tuple[str, ...]
    """Largest modules that stay float."""

    @property
    def file_bytes(self) -> int:
        """Weight files of the output, without their headers."""
        return self.linear_bytes + self.table_bytes + self.rest_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"file_bytes": self.file_bytes}


def plan_quantization(
    config: PreTrainedConfig, recipe: QepConfig, *, dtype: torch.dtype = torch.bfloat16, rate: float | None = None
) -> Plan:
    """Plan for a model of this configuration. dtype: of its files. rate: operations per second, measured.

    Raises ArchitectureError if the model has no chain of blocks, ConfigError for a recipe its widths cannot serve.
    """
    model = empty_model(config, dtype)
    chain = block_list(model)
    linears = quantized_linears(model, chain, recipe.skip_modules or ())
    tables = find_tables(model, recipe)
    bits = linear_bits(model, linears, tables, recipe)
    weights = sum(ref.out_features * ref.in_features for ref in linears)
    parameters = sum(p.numel() for p in model.parameters())
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    table_bytes = sum(integer.stored_bits(t.spec, t.rows, t.columns) for t in tables) // 8
    rest_bytes = float_bytes - (weights + sum(t.rows * t.columns for t in tables)) * dtype.itemsize
    tokens = recipe.num_samples * recipe.seq_len
    members = len(model.get_submodule(chain))
    operations = _operations(model, linears, members, recipe)
    return Plan(
        parameters=parameters,
        quantized_weights=weights,
        float_bytes=float_bytes,
        linear_bytes=bits // 8,
        table_bytes=table_bytes,
        rest_bytes=rest_bytes,
        bits_linear=bits / weights,
        bits_model=(bits + 8 * (table_bytes + rest_bytes)) / parameters,
        memory_bytes=float_bytes
        + _workspace(linears, tokens, members, dtype)
        + training_memory(weights, float_bytes, recipe),
        disk_bytes=float_bytes + bits // 8 + table_bytes + rest_bytes,
        operations=operations,
        seconds=operations / rate if rate else None,
        blocks=members,
        kept=_largest_kept(model, {ref.name for ref in linears} | {name for t in tables for name in t.names}),
    )


def count_operations(model: nn.Module, recipe: QepConfig) -> float:
    """Floating-point operations of quantising a model, which may be loaded or on meta; see `Plan.operations`.

    Raises ArchitectureError if the model has no chain of blocks.
    """
    chain = block_list(model)
    linears = quantized_linears(model, chain, recipe.skip_modules or ())
    return _operations(model, linears, len(model.get_submodule(chain)), recipe)


def weights_to_quantize(model: nn.Module, recipe: QepConfig) -> int:
    """Weights that get signs, of a model that may be on meta. Raises ArchitectureError as `count_operations` does."""
    linears = quantized_linears(model, block_list(model), recipe.skip_modules or ())
    return sum(ref.out_features * ref.in_features for ref in linears)


def linear_bits(model: nn.Module, linears: Sequence[LinearRef], tables: Sequence[Table], recipe: QepConfig) -> int:
    """Bits of the quantised linears; for `auto` what it may spend, of which it leaves a little over."""
    if recipe.method == AUTO:
        return bit_budget(model, linears, tables, recipe)
    recipes = uniform_recipes(linears, recipe)
    return sum(chosen.stored_bits(*ref.shape) for ref, chosen in recipes.items())


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


def _workspace(linears: Sequence[LinearRef], tokens: int, blocks: int, dtype: torch.dtype) -> int:
    """Activations of both streams, inputs that the float pass leaves behind, statistics, one layer's solution."""
    hidden = linears[0].in_features
    first = linears[: max(1, len(linears) // blocks)]
    inputs = sum({ref.in_features: ref.in_features for ref in first}.values())
    streams = tokens * (2 * hidden + inputs) * dtype.itemsize
    solving = max(4 * (SQUARES * r.in_features**2 + COPIES * r.out_features * r.in_features) for r in linears)
    return streams + solving


def training_memory(weights: int, float_bytes: int, recipe: QepConfig) -> int:
    """Distillation holds the model in float32 and, for each sign, latent, gradient, two moments of it and the best."""
    if not recipe.distill_epochs:
        return 0
    return float_bytes + (BYTES_PER_SIGN * weights if recipe.trains_signs(weights) else 0)


def _largest_kept(model: nn.Module, quantized: set[str], count: int = 5) -> tuple[str, ...]:
    sizes: dict[int, tuple[int, str]] = {}  # by identity: a tied head is its embedding
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name not in quantized and isinstance(weight, nn.Parameter) and weight.ndim > 1:
            sizes.setdefault(id(weight), (weight.numel(), name))
    return tuple(name for _, name in sorted(sizes.values(), reverse=True)[:count])
