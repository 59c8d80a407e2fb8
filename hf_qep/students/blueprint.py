"""Class and configuration of a student: those of transformers where they can say its shape, else the student's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hf_qep.errors import ConfigError
from hf_qep.students.family import Family, family_of, layers_of, teacher_shape
from hf_qep.students.modeling_student import stock_class, stock_model, student_class
from hf_qep.students.spec import KEEP, CandidateSpec, LayerSpec, TeacherShape
from hf_qep.students.units import check_student

_FORGOTTEN = ("student_layers", "student_head_dim", "student_base", "auto_map", "architectures", "model_type")
_ID = "_token_id"


@dataclass(frozen=True)
class Blueprint:
    """A student that has no weights yet."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    gates: tuple[tuple[bool, ...], ...]
    """Per stack and layer, whether it has a gate."""


def blueprint(teacher: PreTrainedModel, spec: CandidateSpec) -> Blueprint:
    """What to build for a student. Raises ConfigError if it cannot be cut from this teacher."""
    family, shape = family_of(teacher), teacher_shape(teacher)
    check_student(spec, shape)
    gates = tuple(
        tuple(_gated(family, layer, layers_of(teacher, stack)[layer.source][1]) for layer in layers)
        for stack, layers in spec.stacks()
    )
    stock_config, model_class = stock_class(type(teacher.config)), _stock_model(teacher, family, spec)
    values = {k: v for k, v in teacher.config.to_dict().items() if k not in _FORGOTTEN}
    values |= _sizes(family, spec, shape) | _layer_kinds(values, spec) | _vocabulary(values, spec)
    if spec.head == "classifier":
        values |= {"num_labels": spec.num_labels} | _padding(values, family)
        values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
    stock = not any(any(g) for g in gates) and _stock_can(family, spec, shape) and _of_transformers(model_class)
    if not stock:
        values |= {"student_layers": _listed(spec, gates), "student_head_dim": shape.head_dim}
        values["student_base"] = family.model_type
        stock_config, model_class = student_class(stock_config), student_class(model_class)
    return Blueprint(model_class, stock_config.from_dict(values), gates)


def _gated(family: Family, layer: LayerSpec, source: Any) -> bool:
    """Where the norm comes last no weights make a layer the identity; a layer that is kept keeps its gate."""
    return family.layout.normalised_after if layer.kind != KEEP else hasattr(source, "gate")


def _stock_model(teacher: PreTrainedModel, family: Family, spec: CandidateSpec) -> type[PreTrainedModel]:
    if spec.head == "classifier":
        return stock_model(family.classifier)
    if spec.head == "none":
        return AutoModel._model_mapping[stock_class(type(teacher.config))]
    return stock_class(type(teacher))


def _of_transformers(model_class: type) -> bool:
    return model_class.__module__.startswith("transformers.")


def _stock_can(family: Family, spec: CandidateSpec, shape: TeacherShape) -> bool:
    """Whether the configuration of transformers can say these sizes."""
    if not spec.homogeneous:
        return False
    heads = {layers[0].heads for _, layers in spec.stacks()}
    if family.head_dim == "tied":
        return heads == {spec.hidden_size / shape.head_dim}
    # this configuration refuses numbers of heads that do not divide the hidden size, although its layers take them
    return family.model_type != "llama" or all(spec.hidden_size % count == 0 for count in heads)


def _sizes(family: Family, spec: CandidateSpec, shape: TeacherShape) -> dict[str, Any]:
    """Fields of the stock configuration; where layers differ, the largest."""
    values: dict[str, Any] = {}
    for stack, layers in spec.stacks():
        fields = family.fields[stack]
        values |= {fields["layers"]: len(layers), fields["hidden"]: spec.hidden_size}
        values[fields["ffn"]] = max(layer.intermediate_size for layer in layers)
        heads = max(layer.heads for layer in layers)
        if "kv_heads" in fields:
            values[fields["kv_heads"]] = max(layer.kv_heads for layer in layers)
        if family.fixed_hidden:
            heads = spec.hidden_size // shape.head_dim  # cross attention reads it, and keeps its heads
        elif family.head_dim == "tied" and spec.hidden_size % heads:
            heads = 1  # the layers are made with it before they get their own number, and it must divide
        values[fields["heads"]] = heads
        if family.head_dim == "explicit" or (
            family.head_dim == "optional" and heads * shape.head_dim != spec.hidden_size
        ):
            values["head_dim"] = shape.head_dim
    return values


def _layer_kinds(values: Mapping[str, Any], spec: CandidateSpec) -> dict[str, Any]:
    """A layer keeps its kind of attention wherever it lands: numbering them anew would swap sliding and full ones."""
    if not (types := values.get("layer_types")):
        return {}
    kinds = [types[layer.source] for layer in spec.layers]
    changes: dict[str, Any] = {"layer_types": kinds}
    if "max_window_layers" in values:
        full = [kind == "full_attention" for kind in kinds]
        changes["max_window_layers"] = full.index(False) if False in full else len(full)
    return changes


def _padding(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A decoder classifies by its last token that is no padding."""
    if "kv_heads" not in family.fields[0] or values.get("pad_token_id") is not None:
        return {}
    end = values.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int):
        raise ConfigError("a decoder with a classifier needs `pad_token_id`, and the teacher has neither it nor an eos")
    return {"pad_token_id": end}


def _vocabulary(values: Mapping[str, Any], spec: CandidateSpec) -> dict[str, Any]:
    if spec.vocabulary is None:
        return {}
    return {"vocab_size": len(spec.vocabulary)} | mapped_ids(values, spec.vocabulary)


def mapped_ids(values: Mapping[str, Any], vocabulary: tuple[int, ...]) -> dict[str, Any]:
    """The special token ids of a configuration in the numbering of a smaller vocabulary.

    values: a configuration or generation configuration as a dict; every `*_token_id` in it is mapped. Raises
    ConfigError if one of them is not kept.
    """
    new = {old: position for position, old in enumerate(vocabulary)}

    def position(name: str, old: int) -> int:
        if old not in new:
            raise ConfigError(f"`{name}` is {old}, and the vocabulary does not keep that token; add it")
        return new[old]

    mapped: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith(_ID) and value is not None:
            many = isinstance(value, list)
            mapped[name] = [position(name, v) for v in value] if many else position(name, value)
        elif name in ("suppress_tokens", "begin_suppress_tokens") and value:
            mapped[name] = [new[old] for old in value if old in new]
    return mapped


def _listed(spec: CandidateSpec, gates: tuple[tuple[bool, ...], ...]) -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "kv_heads": layer.kv_heads,
                "heads": layer.heads,
                "intermediate_size": layer.intermediate_size,
                "skip": sorted(layer.skip),
                "gate": gate,
            }
            for layer, gate in zip(layers, gates[stack], strict=True)
        ]
        for stack, layers in spec.stacks()
    ]
