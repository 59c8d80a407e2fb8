"""Models whose layers differ in size: the classes of transformers, cut to the sizes that their configuration lists.

This file stands alone (torch and transformers only): a checkpoint carries a copy, so that `trust_remote_code=True` loads
it where hf_qep is not installed.  `StudentLlamaForCausalLM` is LlamaForCausalLM, `StudentLlamaConfig` its configuration
with three fields more:

    student_layers     one list per stack of layers, one dict per layer: kv_heads, heads, intermediate_size, skip, gate
    student_head_dim   width of one attention head, the teacher's
    student_base       model_type of the class it is made of

A sub-block that is skipped has no weights, in memory and in the file.  A layer with a gate starts as the identity:
x + gate * (layer(x) - x), with gate 0; families that normalise after the addition need it to add a layer exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

PREFIX = "student_"
QUERY, KEY_VALUE, FFN, HIDDEN = "query", "key_value", "ffn", "hidden"
"""What the rows or columns of a linear are: channels of query heads, of key-value heads, units of the MLP, channels of
the residual stream."""


@dataclass(frozen=True)
class Layout:
    """Names inside a layer of one family, relative to the layer."""

    stacks: tuple[str, ...]
    """How the names of the lists of layers end."""
    attention: str
    """Module that computes attention."""
    query: str
    key: str
    value: str
    attention_out: str
    """Linear that writes what attention found into the residual stream."""
    mlp_in: tuple[str, ...]
    mlp_out: str
    """Linear that writes what the MLP found into the residual stream."""
    skipped_attention: dict[str, str]
    """Modules that are replaced where attention is skipped -> by what, a key of `_STAND_INS`."""
    skipped_mlp: dict[str, str]
    normalised_after: bool = False
    """Whether the norm follows the addition to the residual stream."""

    def linears(self) -> dict[str, tuple[str, str]]:
        """Linear -> what its rows and columns are."""
        attention = {self.query: QUERY, self.key: KEY_VALUE, self.value: KEY_VALUE}
        return (
            {name: (axis, HIDDEN) for name, axis in attention.items()}
            | {self.attention_out: (HIDDEN, QUERY), self.mlp_out: (HIDDEN, FFN)}
            | {name: (FFN, HIDDEN) for name in self.mlp_in}
        )


def _separate(
    attention: str, out: str, mlp_in: tuple[str, ...], mlp_out: str, norms: tuple[str, str], **more: Any
) -> Layout:
    """Layouts with q_proj, k_proj, v_proj in one module and an MLP in another."""
    q, k, v = (f"{attention}.{name}_proj" for name in "qkv")
    names = {"stacks": ("layers",), "attention": attention, "query": q, "key": k, "value": v, "mlp_in": mlp_in}
    skips = {
        "skipped_attention": {attention: "no_attention"} | ({norms[0]: "identity"} if norms[0] else {}),
        "skipped_mlp": {"mlp": "nothing"} | ({norms[1]: "identity"} if norms[1] else {}),
    }
    return Layout(**(names | {"attention_out": f"{attention}.{out}", "mlp_out": mlp_out} | skips | more))


_GATED = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = _separate("self_attn", "o_proj", _GATED, "mlp.down_proj", ("input_layernorm", "post_attention_layernorm"))
LAYOUTS = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    # attention and MLP read the same norm, so it stays as long as one of them does
    "cohere2": _separate("self_attn", "o_proj", _GATED, "mlp.down_proj", ("", "")),
    "vit": _separate("attention", "o_proj", ("mlp.fc1",), "mlp.fc2", ("layernorm_before", "layernorm_after")),
    "clip_vision_model": _separate(
        "self_attn", "out_proj", ("mlp.fc1",), "mlp.fc2", ("layer_norm1", "layer_norm2"), stacks=("encoder.layers",)
    ),
    "detr": _separate(
        "self_attn",
        "o_proj",
        ("mlp.fc1",),
        "mlp.fc2",
        ("self_attn_layer_norm", "final_layer_norm"),
        stacks=("encoder.layers", "decoder.layers"),
        normalised_after=True,
    ),
    "bert": Layout(
        stacks=("encoder.layer",),
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_out="attention.output.dense",
        mlp_in=("intermediate.dense",),
        mlp_out="output.dense",
        skipped_attention={"attention": "passed_on"},
        skipped_mlp={"intermediate": "identity", "output": "second"},
        normalised_after=True,
    ),
}


class _NoAttention(nn.Module):
    """Adds nothing. The cache still counts tokens: its length is read from whichever layer comes first."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Zero, and no attention weights."""
        if past_key_values is not None:
            count = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(count, count, self.layer_idx)
        return hidden_states.new_zeros(()), None


class _Nothing(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class _PassedOn(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None


class _Second(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return second


_STAND_INS = {
    "no_attention": _NoAttention,
    "nothing": lambda layer_idx: _Nothing(),
    "passed_on": lambda layer_idx: _PassedOn(),
    "second": lambda layer_idx: _Second(),
    "identity": lambda layer_idx: nn.Identity(),
}


def layer_lists(model: nn.Module, layout: Layout) -> list[tuple[str, nn.ModuleList]]:
    """Names and lists of the layers of a model, one per stack of the layout."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [(n, m) for end in layout.stacks for n, m in lists if n == end or n.endswith(f".{end}")]
    # heads have lists of `layers` too (the boxes of a detector); those of a stack lie highest
    best = [
        min((f for f in found if f[0].endswith(end)), key=lambda f: f[0].count("."), default=None)
        for end in layout.stacks
    ]
    if None in best:
        raise ValueError(f"{type(model).__name__} has no list of layers called {', '.join(layout.stacks)}")
    return best


def resize_layer(
    layer: nn.Module, layout: Layout, sizes: dict[str, Any], head_dim: int, layer_idx: int
) -> list[nn.Module]:
    """Cut one layer to its sizes, in place, and return the modules that are new."""
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    widths = {QUERY: heads * head_dim, KEY_VALUE: kv_heads * head_dim, FFN: sizes["intermediate_size"]}
    skipped = {}
    for name in sizes.get("skip", ()):
        skipped |= layout.skipped_attention if name == "attention" else layout.skipped_mlp
    new = []
    for name, (rows, columns) in layout.linears().items():
        if any(name == module or name.startswith(f"{module}.") for module in skipped):
            continue
        old = layer.get_submodule(name)
        shape = widths.get(columns, old.in_features), widths.get(rows, old.out_features)
        if shape != (old.in_features, old.out_features):
            weight = old.weight
            linear = nn.Linear(*shape, bias=old.bias is not None, device=weight.device, dtype=weight.dtype)
            layer.set_submodule(name, linear)
            new.append(linear)
    if "attention" not in sizes.get("skip", ()):
        _set_numbers(layer.get_submodule(layout.attention), heads, kv_heads, head_dim)
    for name, stand_in in skipped.items():
        layer.set_submodule(name, _STAND_INS[stand_in](layer_idx))
    if sizes.get("gate"):
        _add_gate(layer)
    return new


def _set_numbers(attention: nn.Module, heads: int, kv_heads: int, head_dim: int) -> None:
    """Correct what the module has worked out from the configuration of the whole model."""
    scale = head_dim**-0.5
    numbers = {"num_key_value_groups": heads // kv_heads, "num_attention_heads": heads, "num_heads": heads}
    numbers |= {"head_dim": head_dim, "attention_head_size": head_dim, "all_head_size": heads * head_dim}
    for name, number in (numbers | {"scaling": scale, "scale": scale}).items():
        if hasattr(attention, name):
            setattr(attention, name, number)


def _add_gate(layer: nn.Module) -> None:
    """Make a layer x + gate * (layer(x) - x); the names of its weights stay."""
    parameter = next(layer.parameters())
    layer.gate = nn.Parameter(torch.zeros((), device=parameter.device, dtype=parameter.dtype))
    stock = type(layer)

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states + self.gate * (stock.forward(self, hidden_states, *args, **kwargs) - hidden_states)

    layer.__class__ = type(f"Gated{stock.__name__}", (stock,), {"forward": forward, "__module__": __name__})


class _StudentConfig:
    """Mixed into the configuration of a family."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for listener in listeners:
            listener(type(self))


class _StudentModel:
    """Mixed into the model classes of a family."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layout = LAYOUTS[config.student_base]
        for (_, layers), sizes in zip(layer_lists(self, layout), config.student_layers, strict=True):
            for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
                for module in resize_layer(layer, layout, size, config.student_head_dim, index):
                    if module.weight.device.type != "meta":
                        self._init_weights(module)


listeners: list[Any] = []
"""Called with every class of configuration that is instantiated; hf_qep makes the models known then, and not before: they
take seconds to import."""
_MADE: dict[str, type] = {}


def student_class(stock: type) -> type:
    """The student's version of a configuration or model class of transformers."""
    name = f"Student{stock.__name__}"
    if name not in _MADE:
        is_config = issubclass(stock, transformers.PreTrainedConfig)
        members: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with layers of their own sizes.",
        }
        if is_config:
            members["model_type"] = PREFIX + stock.model_type
        else:
            members["config_class"] = student_class(stock.config_class)
        _MADE[name] = type(name, (_StudentConfig if is_config else _StudentModel, stock), members)
    return _MADE[name]


def __getattr__(name: str) -> type:
    """`Student<Stock>` for every class of transformers of a family that has a layout."""
    stock = getattr(transformers, name.removeprefix("Student"), None) if name.startswith("Student") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return student_class(stock)
