"""Bytes of the weight files, part by part: the tensors that will be written, on meta, and the headers before them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_qep.accounting import stored_bytes
from hf_qep.architectures.parts import LinearRef
from hf_qep.architectures.tables import Table, embeddings_of, find_tables
from hf_qep.config import AUTO, QepConfig
from hf_qep.conversion import settle
from hf_qep.engine.assembly import SHARD_SIZE, split_into_files, tensors_in_files
from hf_qep.engine.budget import bit_budget, choices
from hf_qep.engine.extent import block_list, empty_model, quantized_linears
from hf_qep.engine.recipes import Recipe, uniform_recipes
from hf_qep.engine.tensor_files import Described, header_of
from hf_qep.modules import PackedTensors, packed_like, replace_module


@dataclass(frozen=True)
class OutputPlan:
    """Bytes of the weight files by part, and what they come to per weight."""

    linears: int
    """Signs, scales and padding of the quantised linears; for `auto` the budget, of which it leaves a little over."""
    embedding: int
    """Of tokens; a head that is tied to it is this one."""
    head: int
    rest: int
    """Norms, biases, routers, other embeddings, linears that are skipped."""
    headers: int
    files: int
    linear_weights: int
    table_weights: int
    """Weights of embedding and head, if they are stored as whole numbers."""
    table_bytes: int
    parameters: int
    float_bytes: int
    """The float model, without headers."""
    exact: bool
    """False for `auto`, whose choices depend on the weights."""
    largest_tensor: int = 0
    packed_blocks: tuple[int, ...] = field(default=(), repr=False)
    """Bytes of each block in the files."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.linears + self.embedding + self.head + self.rest

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return self.tensors + self.headers

    @property
    def bits_linear(self) -> float:
        """Bits per weight of the quantised linears."""
        return 8 * self.linears / self.linear_weights

    @property
    def bits_tables(self) -> float | None:
        """The same for embedding and head in whole numbers."""
        return 8 * self.table_bytes / self.table_weights if self.table_weights else None

    @property
    def bits_model(self) -> float:
        """Bits of all tensors for each weight of the float model."""
        return 8 * self.tensors / self.parameters

    @property
    def saving(self) -> float:
        """Part of the float model's bytes that is saved."""
        return 1 - self.file_bytes / self.float_bytes


def plan_output(config: PreTrainedConfig, recipe: QepConfig, dtype: torch.dtype) -> OutputPlan:
    """Files of a model of this configuration. dtype: of the float files.

    Raises ArchitectureError, BitsError, and ConfigError for a recipe that the model's widths cannot serve.
    """
    model = empty_model(config, dtype)
    chain = block_list(model)
    linears = quantized_linears(model, chain, recipe.skip_modules or ())
    tables = find_tables(model, recipe)
    parameters, float_bytes = sum(p.numel() for p in model.parameters()), stored_bytes(model)
    auto = recipe.method == AUTO
    budget = bit_budget(model, linears, tables, recipe) // 8 if auto else None
    recipes = {ref: choices(*ref.shape)[0] for ref in linears} if auto else uniform_recipes(linears, recipe)
    _pack(model, recipes, tables)
    settle(model, copy.deepcopy(recipe))  # names in the files
    files = {name: Described.of(tensor) for name, tensor in tensors_in_files(model).items()}
    embedding, head = (_weights_of(module) for module in embeddings_of(model))
    tied = any(a is b for a in embedding for b in head)
    packed = _packed_linears(model, [name for table in tables for name in table.names])
    packed_bytes = sum(map(_bytes, packed))
    parts = {"embedding": sum(map(_bytes, embedding)), "head": 0 if tied else sum(map(_bytes, head))}
    headers, number = _headers(files)
    sizes = [tensor.bytes for tensor in files.values()]
    inside = [_bytes_of(_members(module)) for module in model.get_submodule(chain)]
    return OutputPlan(
        linears=packed_bytes if budget is None else budget,
        **parts,
        rest=sum(sizes) - packed_bytes - sum(parts.values()),
        headers=headers,
        files=number,
        linear_weights=sum(ref.out_features * ref.in_features for ref in linears),
        table_weights=sum(table.rows * table.columns for table in tables),
        table_bytes=_table_bytes(model, tables),
        parameters=parameters,
        float_bytes=float_bytes,
        exact=not auto,
        largest_tensor=max(sizes),
        packed_blocks=tuple(size + ((budget or packed_bytes) - packed_bytes) // len(inside) for size in inside),
    )


def _pack(model: nn.Module, recipes: Mapping[LinearRef, Recipe], tables: Sequence[Table]) -> None:
    """Put packed modules in the place of what is quantised, as the engine does."""
    for ref, recipe in recipes.items():
        if not ref.expert:  # all slices of a parameter become one module
            replace_module(model, ref.name, packed_like(model, ref.name, recipe.spec))
    for table in tables:
        new = {name: packed_like(model, name, table.spec) for name in table.names}
        for name, module in new.items():
            module.weight = new[table.names[0]].weight
            if (bias := getattr(model.get_submodule(name), "bias", None)) is not None:
                module.bias = bias
            replace_module(model, name, module)


def _headers(tensors: Mapping[str, Described]) -> tuple[int, int]:
    """Bytes of all headers, and number of files."""
    shards = split_into_files(tensors, SHARD_SIZE).filename_to_tensors.values()
    return sum(len(header_of({name: tensors[name] for name in names})) for names in shards), len(shards)


def _packed_linears(model: nn.Module, tables: Sequence[str]) -> list[Tensor]:
    packed = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedTensors) and name not in tables]
    return [tensor for _, module in packed for tensor in module.packed_state().values()]


def _table_bytes(model: nn.Module, tables: Sequence[Table]) -> int:
    return sum(_bytes(model.get_submodule(table.names[0]).weight) for table in tables)


def _weights_of(module: nn.Module | None) -> list[Tensor]:
    weight = getattr(module, "weight", None)
    return [] if weight is None else [weight]


def _members(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(map(_bytes, {id(tensor): tensor for tensor in tensors}.values()))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
