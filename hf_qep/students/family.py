"""The families that students can be cut from: what every dimension of every parameter of their models stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.errors import ArchitectureError
from hf_qep.students.modeling_student import FFN, HIDDEN, KEY_VALUE, LAYOUTS, QUERY, Layout, layer_lists
from hf_qep.students.spec import LayerSpec, TeacherShape

VOCAB = "vocab"
Axes = tuple[str | None, ...]
"""What each dimension of a parameter is: HIDDEN, QUERY, KEY_VALUE, FFN, VOCAB, or None where it stays. Dimensions
behind the last label stay too, so () is a parameter that is never cut."""
AXES = (HIDDEN, QUERY, KEY_VALUE, FFN, VOCAB)
Table = tuple[tuple[str, Axes], ...]
"""(regular expression of a whole name, axes); the first that matches counts."""

_HIDDEN_ONE, _HIDDEN_LAST = (HIDDEN,), (None, HIDDEN)
_INSIDE: Table = (
    (r"self_attn\.[qk]_norm\.weight|gate", ()),
    (r"(.+\.)?(\w*norm\w*|LayerNorm)\.(weight|bias)", _HIDDEN_ONE),
)
_DECODER: Table = (
    (r"embed_tokens\.weight|lm_head\.weight", (VOCAB, HIDDEN)),
    (r"norm\.weight", _HIDDEN_ONE),
    (r"score\.weight", _HIDDEN_LAST),
)
_BERT: Table = (
    (r"embeddings\.word_embeddings\.weight|cls\.predictions\.decoder\.weight", (VOCAB, HIDDEN)),
    (r"embeddings\.(position|token_type)_embeddings\.weight", _HIDDEN_LAST),
    (r"cls\.predictions(\.decoder)?\.bias", (VOCAB,)),
    (r"(pooler|cls\.predictions\.transform)\.dense\.weight", (HIDDEN, HIDDEN)),
    (r"(pooler|cls\.predictions\.transform)\.dense\.bias", _HIDDEN_ONE),
    (r"(embeddings|cls\.predictions\.transform)\.LayerNorm\.(weight|bias)", _HIDDEN_ONE),
    (r"(classifier|qa_outputs|cls\.seq_relationship)\.weight", _HIDDEN_LAST),
    (r"(classifier|qa_outputs|cls\.seq_relationship)\.bias", ()),
)
_VIT: Table = (
    (r"embeddings\.(cls_token|mask_token|position_embeddings)", (None, None, HIDDEN)),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)|layernorm\.(weight|bias)", _HIDDEN_ONE),
    # what the pooler writes is as wide as the configuration says, whatever the hidden size
    (r"(pooler\.dense|classifier)\.weight", _HIDDEN_LAST),
    (r"(pooler\.dense|classifier)\.bias", ()),
)
_CLIP: Table = (
    (r"embeddings\.(class_embedding|patch_embedding\.weight)", _HIDDEN_ONE),
    (r"embeddings\.position_embedding\.weight", _HIDDEN_LAST),
    (r"(pre_layrnorm|post_layernorm)\.(weight|bias)", _HIDDEN_ONE),
    # what it writes is the space that the texts live in, so that classes never seen keep their places
    (r"visual_projection\.weight", _HIDDEN_LAST),
)
_DETR: Table = (
    (r"(backbone|position_embedding|query_position_embeddings|input_projection)\..+", ()),
    (r"(decoder\.layernorm|class_labels_classifier|bbox_predictor)\..+", ()),
)
_DECODER_FIELDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "hidden": "hidden_size",
}
_ENCODER_FIELDS = {name: text for name, text in _DECODER_FIELDS.items() if name != "kv_heads"}


def _detr_fields(side: str) -> dict[str, str]:
    names = {"layers": f"{side}_layers", "heads": f"{side}_attention_heads", "ffn": f"{side}_ffn_dim"}
    return names | {"hidden": "d_model"}


@dataclass(frozen=True)
class Family:
    """What there is to know about the models of one family.

    inside, outside: axes of the parameters inside a layer that are not those of `layout.linears()`, and outside the
    layers, by names relative to the layer and to the base model. fields: per stack, what the configuration calls
    `layers`, `heads`, `kv_heads`, `ffn` and `hidden`. classifier: class with a fresh head for classes, "" for none.
    parallel: attention and MLP read the same norm. fixed_hidden: why the hidden size cannot be cut, "" if it can.
    head_dim: "explicit" if the configuration has a field for it, "optional" if one is read where it is set, "tied" if
    it is always hidden size / heads.
    """

    model_type: str
    layout: Layout
    outside: Table
    classifier: str
    fields: tuple[dict[str, str], ...] = (_DECODER_FIELDS,)
    inside: Table = _INSIDE
    head_dim: str = "explicit"
    parallel: bool = False
    fixed_hidden: str = field(default="")

    def axes(self, name: str, in_layer: bool) -> Axes:
        """Axes of a parameter by its relative name. Raises ArchitectureError for one that the family does not know."""
        leaf, _, kind = name.rpartition(".")
        if in_layer and (linear := self.layout.linears().get(leaf)) is not None:
            return linear if kind == "weight" else linear[:1]
        for pattern, axes in self.inside if in_layer else self.outside:
            if re.fullmatch(pattern, name):
                return axes
        raise ArchitectureError(
            f"the parameter `{name}` is none that a {self.model_type} model is known to have; students are cut from "
            "unchanged models of transformers"
        )


_STAYS: Table = ((r".*norm\w*\.(weight|bias)|encoder_attn\..+|gate", ()),)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", LAYOUTS["llama"], _DECODER, "LlamaForSequenceClassification"),
        Family("qwen3", LAYOUTS["qwen3"], _DECODER, "Qwen3ForSequenceClassification"),
        Family("cohere2", LAYOUTS["cohere2"], _DECODER, "Cohere2ForSequenceClassification", parallel=True),
        Family("bert", LAYOUTS["bert"], _BERT, "BertForSequenceClassification", (_ENCODER_FIELDS,), head_dim="tied"),
        Family("vit", LAYOUTS["vit"], _VIT, "ViTForImageClassification", (_ENCODER_FIELDS,), head_dim="optional"),
        Family("clip_vision_model", LAYOUTS["clip_vision_model"], _CLIP, "", (_ENCODER_FIELDS,), head_dim="tied"),
        Family(
            "detr",
            LAYOUTS["detr"],
            _DETR,
            "",
            (_detr_fields("encoder"), _detr_fields("decoder")),
            inside=_STAYS,
            head_dim="tied",
            fixed_hidden="its backbone and its positions are made for one width",
        ),
    )
}


def family_of(model: nn.Module) -> Family:
    """The family of a teacher or student.

    Raises ArchitectureError for a model of another family, a quantised one, and a text encoder used as a decoder.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "student_base", None) or getattr(config, "model_type", None)
    if not isinstance(model, PreTrainedModel) or model_type not in FAMILIES:
        towers = "; pass its vision tower, `model.vision_model`" if model_type == "clip" else ""
        raise ArchitectureError(
            f"students cannot be cut from {type(model).__name__}; the families are {', '.join(FAMILIES)}{towers}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(f"{type(model).__name__} is quantised; cut the student first and quantise it after")
    if getattr(config, "is_decoder", False) and model_type == "bert":
        raise ArchitectureError("a bert model with `is_decoder` caches what students do not; only encoders can be cut")
    return FAMILIES[model_type]


def layers_of(model: nn.Module, stack: int = 0) -> list[tuple[str, nn.Module]]:
    """(qualified name, module) of every layer of a stack, in order; stack 1 is the decoder of a detector."""
    name, layers = layer_lists(model, family_of(model).layout)[stack]
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


@dataclass(frozen=True)
class Place:
    """Where a parameter or buffer lies: `name` relative to its layer, or to the base model where `layer` is None."""

    name: str
    stack: int | None = None
    layer: int | None = None
    in_base: bool = True
    """Whether it belongs to the base model, as opposed to the head."""


def places(model: PreTrainedModel, names: list[str]) -> dict[str, Place]:
    """Qualified name -> place, for names of parameters and buffers of a model of a family."""
    layout = family_of(model).layout
    lists = [name for name, _ in layer_lists(model, layout)]
    base = lists[0].removesuffix(layout.stacks[0])
    found = {}
    for name in names:
        stack = next((s for s, root in enumerate(lists) if name.startswith(f"{root}.")), None)
        if stack is not None:
            index, _, rest = name.removeprefix(f"{lists[stack]}.").partition(".")
            found[name] = Place(rest, stack, int(index))
        else:
            found[name] = Place(name.removeprefix(base), in_base=name.startswith(base))
    return found


def named_axes(model: PreTrainedModel) -> dict[str, tuple[Place, Tensor, Axes]]:
    """Qualified name -> (place, parameter, axes) of every parameter; tied ones appear under each of their names.

    Raises ArchitectureError for a parameter that is not known or not of a float type.
    """
    family = family_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, place in places(model, list(parameters)).items():
        if not parameters[name].is_floating_point():
            raise ArchitectureError(f"the parameter `{name}` is quantised; cut the student first and quantise it after")
        found[name] = place, parameters[name], family.axes(place.name, place.layer is not None)
    return found


def teacher_shape(model: PreTrainedModel) -> TeacherShape:
    """Sizes of a teacher, which may itself be a student. Raises ArchitectureError as `family_of` does."""
    family, config = family_of(model), model.config
    hidden = getattr(config, family.fields[0]["hidden"])
    head_dim = getattr(config, "student_head_dim", None) or getattr(config, "head_dim", None)
    head_dim = head_dim or hidden // getattr(config, family.fields[0]["heads"])
    listed = getattr(config, "student_layers", None)
    stacks = []
    for stack in range(len(family.layout.stacks)):
        sizes = listed[stack] if listed else [_sizes(m, family.layout, head_dim) for _, m in layers_of(model, stack)]
        stacks.append(tuple(_layer_spec(index, size) for index, size in enumerate(sizes)))
    types = getattr(config, "layer_types", None)
    return TeacherShape(
        family.model_type,
        stacks[0],
        hidden,
        head_dim,
        getattr(config, "vocab_size", None),
        decoder_layers=stacks[1] if len(stacks) > 1 else (),
        layer_types=tuple(types) if types else None,
    )


def _sizes(layer: nn.Module, layout: Layout, head_dim: int) -> dict[str, int]:
    rows = {name: layer.get_submodule(name).out_features // head_dim for name in (layout.query, layout.key)}
    units = layer.get_submodule(layout.mlp_out).in_features
    return {"heads": rows[layout.query], "kv_heads": rows[layout.key], "intermediate_size": units}


def _layer_spec(index: int, sizes: dict[str, object]) -> LayerSpec:
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    return LayerSpec(
        index, kv_heads, heads // kv_heads, sizes["intermediate_size"], skip=frozenset(sizes.get("skip", ()))
    )
