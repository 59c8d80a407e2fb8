"""Models whose layers differ in size: the classes of transformers, cut to the sizes that their configuration lists.

This file stands alone (torch and transformers only): a checkpoint carries a copy, so that `trust_remote_code=True`
loads it where hf_qep is not installed. `StudentLlamaForCausalLM` is LlamaForCausalLM, `StudentLlamaConfig` its
configuration with three fields more:

    student_layers     one list per stack of layers, one dict per layer: kv_heads, heads, intermediate_size, skip, gate
    student_head_dim   width of one attention head, the teacher's
    student_base       model_type of the class it is made of

The numbers of the stock configuration (num_attention_heads, intermediate_size, ...) are those of the largest layer.

A sub-block that is skipped has no weights, in memory and in the file.  A layer with a gate starts as the identity:
x + gate * (layer(x) - x), with gate 0; families that normalise after the addition need it to add a layer exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
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

    def removed(self, skip: Iterable[str]) -> dict[str, str]:
        """Modules that go with the sub-blocks `skip` -> what takes their places, a key of `_STAND_INS`."""
        parts = {"attention": self.skipped_attention, "mlp": self.skipped_mlp}
        return {name: stand_in for part in skip for name, stand_in in parts[part].items()}


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
    """Names and lists of the layers of a model, one per stack of the layout. Raises ValueError if one is missing."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = []
    for end in layout.stacks:
        fitting = [(name, module) for name, module in lists if f".{name}".endswith(f".{end}")]
        if not fitting:
            raise ValueError(f"{type(model).__name__} has no list of layers called {end}")
        # heads have lists of `layers` too (the boxes of a detector); those of a stack come first
        found.append(fitting[0])
    return found


def resize_layer(
    layer: nn.Module, layout: Layout, sizes: dict[str, Any], head_dim: int, layer_idx: int
) -> list[nn.Linear]:
    """Cut one layer to its sizes, in place, and return the linears that are new. Doing it again changes nothing."""
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    widths = {QUERY: heads * head_dim, KEY_VALUE: kv_heads * head_dim, FFN: sizes["intermediate_size"]}
    removed = layout.removed(sizes.get("skip", ()))
    for name, stand_in in removed.items():
        layer.set_submodule(name, _STAND_INS[stand_in](layer_idx))
    new = []
    for name, (rows, columns) in layout.linears().items():
        if any(f"{name}.".startswith(f"{module}.") for module in removed):
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
    if sizes.get("gate") and not hasattr(layer, "gate"):
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
    """Make a layer x + gate * (layer(x) - x); its class keeps its name, the weights keep theirs."""
    parameter = next(layer.parameters())
    layer.gate = nn.Parameter(torch.zeros((), device=parameter.device, dtype=parameter.dtype))
    stock = type(layer)

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states + self.gate * (stock.forward(self, hidden_states, *args, **kwargs) - hidden_states)

    layer.__class__ = type(stock.__name__, (stock,), {"forward": forward, "__module__": __name__})


class _StudentConfig:
    """Mixed into the configuration of a family."""

    student_layers = student_head_dim = student_base = None
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if type(self) not in _KNOWN:
            _KNOWN.add(type(self))
            _make_models_known(type(self))

    def validate_architecture(self) -> None:
        """Nothing: the layers have their own numbers of heads, which need not divide the hidden size."""


class _StudentModel:
    """Mixed into the model classes of a family."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.student_base not in LAYOUTS or config.student_layers is None:
            raise ValueError("the configuration has no `student_layers` of a known `student_base`")
        super().__init__(config, *args, **kwargs)
        layout = LAYOUTS[config.student_base]
        for (_, layers), sizes in zip(layer_lists(self, layout), config.student_layers, strict=True):
            for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
                for linear in resize_layer(layer, layout, size, config.student_head_dim, index):
                    if linear.weight.device.type != "meta":
                        self._init_weights(linear)


_KNOWN: set[type] = set()
_MADE: dict[str, type] = {}
_CLASSIFIER = "ForSequenceClassification"
_BROAD = ("AutoModelForPreTraining", "AutoModelForTextEncoding")
"""Auto classes that lead to models which another auto class names better."""


def register_configs() -> None:
    """Make the configurations of all families known to AutoConfig, so that folders load without remote code.

    Only names are entered: making the classes imports what may just be importing AutoConfig.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for model_type in LAYOUTS:
        CONFIG_MAPPING_NAMES[PREFIX + model_type] = f"Student{CONFIG_MAPPING_NAMES[model_type]}"
        CONFIG_MAPPING._modules[PREFIX + model_type] = sys.modules[__name__]


def _make_models_known(config_class: type) -> None:
    """Register the models of a configuration with the auto classes; not before, since they take seconds to import."""
    from transformers.models.auto import modeling_auto

    stock = stock_class(config_class)
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or stock not in mapping:
            continue
        found = mapping[stock]
        _register(auto, config_class, found[0] if isinstance(found, tuple | list) else found)
    if stock.model_type == "cohere2" and stock not in transformers.AutoModelForSequenceClassification._model_mapping:
        _register(transformers.AutoModelForSequenceClassification, config_class, stock_model(f"Cohere2{_CLASSIFIER}"))


def _register(auto: type, config_class: type, stock: type) -> None:
    model_class = student_class(stock)
    if auto.__name__ not in _BROAD:
        model_class._auto_class = auto.__name__
    auto.register(config_class, model_class, exist_ok=True)


def student_class(stock: type) -> type:
    """The student's version of a configuration or model class of transformers; one class for each."""
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


def stock_class(cls: type) -> type:
    """The class of transformers that a student's class stands on; any other class itself."""
    return cls.__bases__[1] if cls.__name__.startswith("Student") else cls


def stock_model(name: str) -> type:
    """A model class of transformers, or a classifier that it lacks. Raises AttributeError for other names."""
    found = getattr(transformers, name, None)
    if found is None and name.endswith(_CLASSIFIER):
        from transformers.modeling_layers import GenericForSequenceClassification

        body = getattr(transformers, name.replace(_CLASSIFIER, "PreTrainedModel"))
        found = type(name, (GenericForSequenceClassification, body), {"__module__": __name__})
    if found is None:
        raise AttributeError(f"transformers has no model called {name}")
    return found


def __getattr__(name: str) -> type:
    """`Student<Stock>` for every class of transformers of a family that has a layout."""
    if not name.startswith("Student"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return student_class(stock_model(name.removeprefix("Student")))
