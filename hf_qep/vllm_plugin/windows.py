"""Which part of which stored matrix a layer of vLLM holds on its rank.

    layer of vLLM                  rows                                    columns
    ReplicatedLinear               all                                     all
    ColumnParallelLinear           the rank's share                        all
    MergedColumnParallelLinear     the rank's share of each part           all
    QKVParallelLinear              the rank's heads of q, k and v          all
    RowParallelLinear              all                                     the rank's share

With more ranks than key-value heads, several ranks hold the same head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_qep.errors import ConfigError
from hf_qep.vllm_plugin.interface import layers
from hf_qep.vllm_plugin.shards import Shape, Window, divided

Key = str | int | None
"""How vLLM says which part of a fused layer a tensor is: "q", 0, or None for all of it."""

KINDS = (
    "QKVParallelLinear",
    "MergedColumnParallelLinear",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ReplicatedLinear",
)


@dataclass(frozen=True)
class Part:
    """One stored matrix of a layer. shape: (out, in) of all of it. window: what this rank holds."""

    name: str
    key: Key
    shape: Shape
    window: Window


@dataclass(frozen=True)
class _Output:
    key: Key
    size: int
    rows: range


def kind_of(layer: Any, prefix: str) -> str:
    """Name of the class of vLLM that says how a layer is divided.

    Raises ConfigError for a class with rules of its own: its tensors would be divided in another way.
    """
    known = layers()
    for name in KINDS:
        base = getattr(known, name)
        if isinstance(layer, base):
            if type(layer).weight_loader is base.weight_loader:
                return name
            break
    raise ConfigError(
        f"`{prefix}` is quantised and of class {type(layer).__name__}, which loads weights in a way of its own; "
        f"this plugin serves {', '.join(KINDS)}"
    )


def parts_of(layer: Any, prefix: str, names: Sequence[str]) -> list[Part]:
    """The stored matrices of a layer, in the order of its outputs.

    names: of the matrices; one for each part of a fused layer, or a single one that was fused before it was quantised.
    Raises ConfigError if the names do not fit the layer or sizes cannot be divided.
    """
    kind = kind_of(layer, prefix)
    outputs, width = _outputs(layer, kind), layer.input_size
    columns = divided(width, layer.tp_size, layer.tp_rank) if kind == "RowParallelLinear" else range(width)
    if len(names) == len(outputs):
        pairs = zip(names, outputs, strict=True)
        return [Part(name, o.key, (o.size, width), Window((o.rows,), columns)) for name, o in pairs]
    if len(names) == 1:
        return [Part(names[0], None, (sum(o.size for o in outputs), width), Window(_joined(outputs), columns))]
    raise ConfigError(
        f"`{prefix}` has {len(outputs)} parts and is made of {len(names)} modules, {', '.join(names)}; this plugin "
        "serves fused layers with one module per part, or one for all"
    )


def _joined(outputs: Sequence[_Output]) -> tuple[range, ...]:
    """Rows of each output in a matrix that holds them one behind the other."""
    ranges, before = [], 0
    for output in outputs:
        ranges.append(range(before + output.rows.start, before + output.rows.stop))
        before += output.size
    return tuple(ranges)


def _outputs(layer: Any, kind: str) -> list[_Output]:
    ranks, rank = layer.tp_size, layer.tp_rank
    if kind == "QKVParallelLinear":
        return _heads(layer)
    if kind == "MergedColumnParallelLinear":
        sizes = enumerate(layer.output_sizes)
        return [_Output(key, size, divided(size, ranks, rank, "rows")) for key, size in sizes]
    if kind == "ColumnParallelLinear":
        return [_Output(None, layer.output_size, divided(layer.output_size, ranks, rank, "rows"))]
    return [_Output(None, layer.output_size, range(layer.output_size))]


def _heads(layer: Any) -> list[_Output]:
    replicas = layer.num_kv_head_replicas
    many, few = (layer.total_num_heads, layer.num_heads), (layer.total_num_kv_heads, layer.num_kv_heads)
    wanted = (("q", many, layer.head_size, 1), ("k", few, layer.head_size, replicas))
    outputs = []
    for key, (total, held), width, shared in (*wanted, ("v", few, layer.v_head_size, replicas)):
        first = layer.tp_rank // shared * held
        if first + held > total or layer.tp_size * held != total * shared:
            raise ConfigError(
                f"`{key}` has {total} heads, which {layer.tp_size} processes cannot share; use a number of processes "
                "that divides them or is a multiple of them"
            )
        outputs.append(_Output(key, total * width, range(first * width, (first + held) * width)))
    return outputs
