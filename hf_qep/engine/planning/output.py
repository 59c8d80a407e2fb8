"""Bytes of the weight files, part by part: the tensors that will be written, on meta, and the headers before them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_qep.accounting import stored_bytes
from hf_qep.architectures.parts import LinearRef
from hf_qep.architectures.tables import Table, embeddings_of, find_tables
from hf_qep.config import AUTO, QepConfig
from hf_qep.conversion import settle
from hf_qep.engine.budget import bit_budget, choices
from hf_qep.engine.plan import block_list, empty_model, quantized_linears
from hf_qep.engine.recipes import Recipe, uniform_recipes
from hf_qep.modules import PackedTensors, packed_like, replace_module

SHARD_SIZE = "5GB"
"""Most bytes of tensors in one file, as the writer asks for them."""
_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""torch dtype -> name in a file, in the order in which a file holds its tensors."""
_PREFIX, _ALIGNMENT = 8, 8
"""Bytes of the length before a header, and what the length is a multiple of."""


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
    state = _stored(model)
    embedding, head = (_weights_of(module) for module in embeddings_of(model))
    tied = any(a is b for a in embedding for b in head)
    packed = _packed_linears(model, [name for table in tables for name in table.names])
    packed_bytes = sum(map(_bytes, packed))
    parts = {"embedding": sum(map(_bytes, embedding)), "head": 0 if tied else sum(map(_bytes, head))}
    headers, files = _headers(state)
    total = sum(map(_bytes, state.values()))
    inside = [_bytes_of(_members(module)) for module in model.get_submodule(chain)]
    return OutputPlan(
        linears=packed_bytes if budget is None else budget,
        **parts,
        rest=total - packed_bytes - sum(parts.values()),
        headers=headers,
        files=files,
        linear_weights=sum(ref.out_features * ref.in_features for ref in linears),
        table_weights=sum(table.rows * table.columns for table in tables),
        table_bytes=_table_bytes(model, tables),
        parameters=parameters,
        float_bytes=float_bytes,
        exact=not auto,
        largest_tensor=max(map(_bytes, state.values())),
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


def _stored(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes, by the names in the files."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def _headers(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of all headers, and number of files."""
    split = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    shards = split.filename_to_tensors.values()
    return sum(header_bytes({name: state[name] for name in names}) for names in shards), len(shards)


def header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the safetensors library writes before these tensors, which may be on meta."""
    rank = {dtype: place for place, dtype in enumerate(_NAMES)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name)):
        tensor = tensors[name]
        span = [at, at := at + _bytes(tensor)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return _PREFIX + length + -length % _ALIGNMENT


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
