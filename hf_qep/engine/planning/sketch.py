"""What planning needs to know about a model, found on meta: blocks, groups of linears, what lies outside, the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from hf_qep.architectures.families import is_expert
from hf_qep.architectures.parts import LinearRef
from hf_qep.engine.extent import block_list, empty_model, quantized_linears

META_TOKENS = 2


@dataclass(frozen=True)
class GroupSketch:
    """Linears that read one tensor, or all slices of one parameter of experts."""

    linears: tuple[LinearRef, ...]
    exempt: bool
    """Experts: no error propagation."""
    writes: bool
    """Alone, and as wide as the stream between blocks: its output is taken to be added to it."""

    @property
    def in_features(self) -> int:
        """Width of what all of them read."""
        return self.linears[0].in_features


@dataclass(frozen=True)
class BlockSketch:
    """One block. float_bytes: of its parameters, as the files hold them."""

    float_bytes: int
    groups: tuple[GroupSketch, ...]

    @property
    def linears(self) -> list[LinearRef]:
        """All that get signs."""
        return [ref for group in self.groups for ref in group.linears]


@dataclass(frozen=True)
class CacheLayer:
    """Values that a layer keeps for each token, keys and values together, for at most `window` tokens."""

    values: int
    window: int | None


@dataclass(frozen=True)
class Sketch:
    """A model without its weights. Sizes in bytes of the dtype of its files."""

    kind: str
    dtype: torch.dtype
    parameters: int
    float_bytes: int
    blocks: tuple[BlockSketch, ...]
    hidden: int
    """Width of the stream between blocks."""
    query_width: int
    """Heads times their size."""
    vocabulary: int | None
    """None for a model that does not read tokens."""
    cache: tuple[CacheLayer, ...]
    """Empty for a model that does not generate."""
    active_experts: int
    """Experts that one token is sent to; 1 where there are none."""

    @property
    def outside_bytes(self) -> int:
        """Embeddings, head and whatever else lies outside the blocks."""
        return self.float_bytes - sum(block.float_bytes for block in self.blocks)

    @property
    def linears(self) -> list[LinearRef]:
        """All that get signs, in the order of the blocks."""
        return [ref for block in self.blocks for ref in block.linears]


def sketch_of(config: PreTrainedConfig, dtype: torch.dtype, skip_modules: Sequence[str] = ()) -> Sketch:
    """The sketch of a model of this configuration. dtype: of its files.

    Raises ArchitectureError for a model without a chain of blocks, ConfigError for an entry of skip_modules that
    matches nothing.
    """
    model = empty_model(config, dtype)
    chain = block_list(model)
    linears = quantized_linears(model, chain, skip_modules)
    text = config.get_text_config(decoder=True)
    hidden = getattr(text, "hidden_size", None) or linears[0].in_features
    return Sketch(
        kind=type(model).__name__,
        dtype=dtype,
        parameters=sum(p.numel() for p in model.parameters()),
        float_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        blocks=_blocks(model, chain, linears, hidden),
        hidden=hidden,
        query_width=_heads(text)[0] * _head_size(text),
        vocabulary=getattr(text, "vocab_size", None),
        cache=_cache_layers(config) if model.can_generate() else (),
        active_experts=getattr(text, "num_experts_per_tok", None) or 1,
    )


def _blocks(model: Any, chain: str, linears: Sequence[LinearRef], hidden: int) -> tuple[BlockSketch, ...]:
    shared = _shared_inputs(model, chain)
    members: list[dict[object, list[LinearRef]]] = [{} for _ in model.get_submodule(chain)]
    for ref in linears:
        index, _, inside = ref.name.removeprefix(f"{chain}.").partition(".")
        key = ref.name if ref.expert is not None else shared.get(inside, (inside.rpartition(".")[0], ref.in_features))
        members[int(index)].setdefault(key, []).append(ref)
    return tuple(
        BlockSketch(
            sum(p.numel() * p.element_size() for p in module.parameters()),
            tuple(_group(refs, hidden) for refs in groups.values()),
        )
        for module, groups in zip(model.get_submodule(chain), members, strict=True)
    )


def _group(refs: list[LinearRef], hidden: int) -> GroupSketch:
    exempt = is_expert(refs[0].name)
    return GroupSketch(tuple(refs), exempt, not exempt and len(refs) == 1 and refs[0].out_features == hidden)


class _Seen(Exception):
    """The first block has run."""


def _shared_inputs(model: Any, chain: str) -> dict[str, int]:
    """Linear of the first block, by its name in it -> identity of the tensor that it reads, from a pass on meta.

    Models whose forward asks for a value do not run there: what they did not show is left to the place of a linear.
    """
    first, found, alive = model.get_submodule(chain)[0], {}, []

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            alive.append(args[0])  # so that no other tensor gets its identity
            found[name] = id(args[0])

        return see

    def end(*_: Any) -> None:
        raise _Seen

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in first.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    hooks.append(first.register_forward_hook(end))
    try:
        with torch.no_grad(), contextlib.suppress(Exception):
            model(**_meta_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _meta_inputs(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        config = model.config
        size = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(size, dtype=model.dtype, device="meta")}
    return {"input_ids": torch.zeros((1, META_TOKENS), dtype=torch.int64, device="meta")}


def _cache_layers(config: PreTrainedConfig) -> tuple[CacheLayer, ...]:
    """Layers of the cache that transformers makes for a configuration; what keeps no keys keeps nothing here."""
    text = config.get_text_config(decoder=True)
    _, kept = _heads(text)
    keys = values = kept * _head_size(text)
    if getattr(text, "kv_lora_rank", None):  # latent attention, whose cache holds what the latent becomes
        keys = kept * (text.qk_nope_head_dim + text.qk_rope_head_dim)
        values = kept * text.v_head_dim
    layers = [layer for layer in DynamicCache(config=config).layers if isinstance(layer, DynamicLayer)]
    return tuple(CacheLayer(keys + values, getattr(layer, "sliding_window", None)) for layer in layers)


def _heads(text: Any) -> tuple[int, int]:
    """Heads of queries, and of keys."""
    heads = getattr(text, "num_attention_heads", None) or 1
    return heads, getattr(text, "num_key_value_heads", None) or heads


def _head_size(text: Any) -> int:
    size = getattr(text, "head_dim", None)
    return size or (getattr(text, "hidden_size", None) or 0) // _heads(text)[0]
