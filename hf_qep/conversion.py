"""From checkpoint names to packed modules and back.

In the order of a load: `swap_modules` puts packed modules in place while the model is on meta, `packed_transforms`
keeps the family's weight converters off packed experts, `check_files` compares the headers of the files with what the
packed modules need, `finish_loading` freezes or frees the scales. `dequantize_modules` goes back to a float model.

A head that is tied to a packed embedding is packed as well and shares its tensor; only the embedding is listed in the
config and stored, for the tie is the model's own rule.

On disk a packed linear is `<name>.weight` (int32), `<name>.weight_scale`, ...; the names are the Hub's original ones
wherever transformers renames a family's tensors. Packed experts keep the name of the float parameter for their signs,
`...experts.gate_up_proj`, so that a loader without this package stops at a shape it does not expect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from hf_qep.config import QepConfig
from hf_qep.errors import CheckpointError
from hf_qep.kernels.dispatch import EXACT
from hf_qep.modules import (
    PackedTensors,
    QepConv1D,
    QepEmbedding,
    QepExpertWeight,
    QepLinear,
    packed_like,
    packed_modules,
    packed_tables,
    replace_module,
    tied_names,
)
from hf_qep.registry import FORMATS

STORED_DTYPES = {torch.int32: {"I32"}, torch.float16: {"F16"}}
FLOATS = {"F64", "F32", "F16", "BF16"}
SMALL_BYTES = 1 << 20
"""Of a tensor that is copied rather than left in a file that is mapped to memory."""
END_OF_NAME = r"(?![\w.])"
"""Ends a pattern that shall match `experts.gate_up_proj` but not `experts.gate_up_proj.weight`; transformers drops
lookaheads where the pattern is the target of a renaming."""


# ---- before the weights are loaded ----


def swap_modules(model: PreTrainedModel, config: QepConfig) -> None:
    """Replace every module that `config.layers` names by an empty packed one on meta.

    Names are tried as they are, with and without the base model's prefix, and through the family's renamings. A class
    other than the one that saved the checkpoint may lack some of them: AutoModel has no head.
    Raises CheckpointError for a name that the model does not have or that is no linear.
    """
    specs = config.layer_specs()
    located = _locate(model, specs)
    missing = [name for name in specs if name not in located]
    same_class = type(model).__name__ in (model.config.architectures or [type(model).__name__])
    if missing and (same_class or not located):
        raise CheckpointError(
            f"the quantization config lists {_some(missing)}, which {type(model).__name__} does not have; config.json "
            "does not belong to this checkpoint, or to this class"
        )
    for name, found in located.items():
        replace_module(model, found, packed_like(model, found, specs[name], device="meta"))
    _swap_tied(model)
    prefer_eager_experts(model)


def _swap_tied(model: PreTrainedModel) -> None:
    """Pack the other side of every tie whose one side is a packed table; transformers joins them after loading."""
    tables = packed_tables(model)
    for pair in tied_names(model).items():
        for name, other in (pair, pair[::-1]):
            if other in tables and name not in tables:
                replace_module(model, name, packed_like(model, name, tables[other].spec, device="meta"))


def _locate(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, str]:
    """Name in the checkpoint's config -> name in this model. names: with the specs."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    prefix = f"{model.base_model_prefix}."
    located: dict[str, str] = {}
    renamings: list[WeightTransform] | None = None
    for name in names:
        candidates = [name, name.removeprefix(prefix), prefix + name]
        if not any(c in modules or c in parameters for c in candidates):
            if renamings is None:
                renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
            candidates.append(loaded_name(f"{name}.weight", model, renamings, parameters).removesuffix(".weight"))
        found = next((c for c in candidates if c in modules or c in parameters), None)
        if found is None:
            continue
        _check_packable(found, modules.get(found), parameters.get(found), names[name])
        located[name] = found
    return located


def _check_packable(name: str, module: nn.Module | None, parameter: Tensor | None, spec: Any) -> None:
    if isinstance(module, nn.Linear | Conv1D) or (parameter is not None and parameter.dim() == 3):
        return
    if isinstance(module, nn.Embedding) and hasattr(FORMATS.get(spec.format), "rows"):
        return
    kind = type(module if parameter is None else parameter).__name__
    raise CheckpointError(
        f"the quantization config lists `{name}` of class {kind}, which cannot be packed in format `{spec.format}`"
    )


def prefer_eager_experts(model: nn.Module) -> None:
    """Let packed experts run through the family's own loop: the fused implementations index the float tensor."""
    for name in _packed_experts(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        if hasattr(owner, "config"):
            owner.config._experts_implementation = "eager"


def packed_transforms(model: nn.Module, transforms: Sequence[WeightTransform]) -> list[WeightTransform]:
    """The family's transforms, kept off packed experts, and one that names their signs like the float parameter.

    The family splits and merges float experts (`experts.0.up_proj.weight` <-> `experts.gate_up_proj`), also in reverse
    when saving, and its patterns would match the packed tensors too.
    """
    experts = _packed_experts(model)
    kept = [_float_only(t, experts) for t in transforms]
    known = {pattern for t in kept for pattern in t._original_source_patterns}
    for tail in sorted({re.escape(".".join(name.split(".")[-2:])) for name in experts}):
        if tail + END_OF_NAME not in known:
            kept.append(WeightRenaming(tail + END_OF_NAME, rf"{tail}\.weight"))
    return kept


def _float_only(transform: WeightTransform, experts: Sequence[str]) -> WeightTransform:
    if not isinstance(transform, WeightConverter):
        return transform
    if not any(name.endswith(target) for target in transform.target_patterns for name in experts):
        return transform
    sources = [p.removesuffix(END_OF_NAME) + END_OF_NAME for p in transform._original_source_patterns]
    targets = [p.removesuffix(END_OF_NAME) + END_OF_NAME for p in transform._original_target_patterns]
    return transform.copy(sources, targets, operations=transform.operations)


def _packed_experts(model: nn.Module) -> list[str]:
    return [name for name, module in packed_modules(model).items() if isinstance(module, QepExpertWeight)]


# ---- the files ----


def check_files(model: PreTrainedModel, files: Sequence[str], transforms: Sequence[WeightTransform]) -> None:
    """Compare file headers with the packed modules of `model` (on meta); no tensor is read.

    Names go through `transforms` exactly as transformers will take them. Raises CheckpointError that names what is
    missing, has another shape or dtype, belongs to no packed tensor, or is packed although the config does not say so.
    """
    stored = _headers(model, files, transforms)
    packed = packed_modules(model)
    needed = {f"{name}.{leaf}": p for name, m in packed.items() for leaf, p in m.named_parameters()}
    problems = {
        "missing": _missing(model, needed, stored),
        "wrong shape or dtype": [
            f"{name} {stored[name][1]} {list(stored[name][0])} instead of {_describe(p)}"
            for name, p in needed.items()
            if name in stored and not _fits(stored[name], p)
        ],
        "not part of the format": [n for n in stored if n.rpartition(".")[0] in packed and n not in needed],
        "packed, but not listed in the quantization config": _unlisted(model, stored, needed),
    }
    found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
    if found:
        raise CheckpointError(
            f"the checkpoint is damaged or does not belong to its config.json: {found}; download or write it again"
        )


Header = tuple[tuple[int, ...], str]


def _headers(model: PreTrainedModel, files: Sequence[str], transforms: Sequence[WeightTransform]) -> dict[str, Header]:
    """Name of a parameter of the model -> (shape, dtype) in the files."""
    expected = model.state_dict()
    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                    entry = tensors.get_slice(key)
                    name = loaded_name(key, model, transforms, expected)
                    headers[name] = (tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file!r} is not a readable safetensors file: {error}") from error
    return headers


def loaded_name(
    key: str, model: PreTrainedModel, transforms: Sequence[WeightTransform], expected: dict[str, Any]
) -> str:
    """Name under which transformers will load the tensor `key` of a file."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    used = [(t, t._was_used) for t in transforms]
    name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
    for transform, before in used:  # asking must not count as use: it decides what is reversed when saving
        transform._was_used = before
    if name not in expected and key in expected:
        return key
    return name


def _fits(header: Header, parameter: Tensor) -> bool:
    shape, dtype = header
    return shape == tuple(parameter.shape) and dtype in STORED_DTYPES.get(parameter.dtype, FLOATS)


def _missing(model: PreTrainedModel, needed: Iterable[str], stored: Iterable[str]) -> list[str]:
    """Names that are not stored, nor under the name of a parameter that they are tied to."""
    tied = model.all_tied_weights_keys
    found = {tied.get(name, name) for name in stored}
    return [name for name in needed if tied.get(name, name) not in found]


def _unlisted(model: nn.Module, stored: dict[str, Header], needed: dict[str, Tensor]) -> list[str]:
    floats = {name for name, p in model.named_parameters() if p.is_floating_point()} - set(needed)
    return [name for name, (_, dtype) in stored.items() if dtype == "I32" and name in floats]


def _describe(parameter: Tensor) -> str:
    return f"{str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}"


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{n}`" for n in names[:limit]) + more


# ---- after the weights are loaded ----


def check_loaded(model: PreTrainedModel) -> None:
    """Raise CheckpointError for packed tensors that a state dict in memory did not hold."""
    tensors = {f"{name}.{leaf}": p for name, m in packed_modules(model).items() for leaf, p in m.named_parameters()}
    missing = [name for name, p in tensors.items() if not getattr(p, "_is_hf_initialized", False)]
    if missing:
        raise CheckpointError(f"the state dict lacks tensors of packed modules: {_some(missing)}")


def finish_loading(model: PreTrainedModel, config: QepConfig, *, mapped: bool = False) -> None:
    """Freeze packed modules, which transformers gives back trainable, and put linears into the order of the kernels.

    With `trainable_scales` their scales train in float32 instead. mapped: tensors are parts of files that are mapped to
    memory; what is small is copied, so that each file is let go of when its last large tensor is tiled.
    """
    if mapped:
        for module in model.modules():
            if not isinstance(module, PackedTensors):
                _copy_small((*module._parameters.values(), *module._buffers.values()))
    for module in packed_modules(model).values():
        module.requires_grad_(False)
        stored = [parameter.data_ptr() for parameter in module.parameters()]
        if isinstance(module, QepLinear):
            module.activation = config.activation or EXACT
        if config.trainable_scales:
            module.train_scales()
        else:
            module.tile()
        if mapped:
            _copy_small(parameter for parameter in module.parameters() if parameter.data_ptr() in stored)


def _copy_small(tensors: Iterable[Tensor | None]) -> None:
    """Copy small tensors, so that they alone keep no file mapped to memory.

    Loaders map files and hand out parts of them. What is large is replaced when it is tiled, file by file, or stays
    mapped, so that the system can drop its pages; a norm of a few kilobytes would hold the addresses of gigabytes.
    """
    for tensor in tensors:
        if tensor is not None and tensor.device.type == "cpu" and tensor.nbytes <= SMALL_BYTES:
            tensor.data = tensor.data.clone()


def settle(model: PreTrainedModel, config: QepConfig) -> None:
    """Make a model that was quantised in memory save as one that was loaded: names, transforms, experts."""
    packed, tied = packed_modules(model), tied_names(model)
    listed = {n: m for n, m in packed.items() if getattr(packed.get(tied.get(n, "")), "weight", None) is not m.weight}
    config.set_layers({name: module.spec for name, module in listed.items()})
    prefer_eager_experts(model)
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:  # not from from_pretrained; prefixes seen in a file are unknown then
        family = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [t for t in family if not isinstance(t, PrefixChange)]
    model._weight_conversions = packed_transforms(model, transforms)


def as_stored(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Part of the state dict of a model under the names, and in the pieces, in which its files hold it.

    state: of all modules that the family converts together, such as one block.
    """
    before = model._weight_conversions
    model._weight_conversions = packed_transforms(model, before)
    try:
        return revert_weight_conversion(model, state)
    finally:
        model._weight_conversions = before


def stored_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """`model.state_dict()` with packed tensors in their stored dtypes."""
    state = model.state_dict()
    for name, module in packed_modules(model).items():
        state.update({f"{name}.{leaf}": tensor for leaf, tensor in module.packed_state().items()})
    return state


@torch.no_grad()
def dequantize_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every packed module by its float original: nn.Linear, Conv1D, nn.Embedding or a 3-D expert parameter.

    dtype: of the weights; what was tied stays tied. Raises CheckpointError if weights are offloaded, hence not in
    memory.
    """
    packed = packed_modules(model)
    made: dict[int, nn.Parameter] = {}
    for name, module in packed.items():
        if any(t.is_meta for t in module.tensors().values()):
            raise CheckpointError(f"`{name}` is offloaded; load the model on one device to dequantise it")
        owner = model.get_submodule(name.rpartition(".")[0])
        if hasattr(owner, "fan_in_fan_out"):  # a LoRA layer: its merge must know that Conv1D stores (in, out)
            owner.fan_in_fan_out = isinstance(module, QepConv1D)
        new = _float_module(module, dtype)
        if isinstance(new, nn.Module):
            new.weight = made.setdefault(id(module.weight), new.weight)
        replace_module(model, name, new)
    if any(isinstance(m, QepExpertWeight) for m in packed.values()):
        _restore_converters(model)


def _float_module(module: PackedTensors, dtype: torch.dtype) -> nn.Module | nn.Parameter:
    weight = module.dequantize(dtype)
    if isinstance(module, QepExpertWeight):
        return nn.Parameter(weight)
    with torch.device("meta"):
        if isinstance(module, QepEmbedding):
            return _float_embedding(module, weight)
        if isinstance(module, QepConv1D):
            linear, weight = Conv1D(module.out_features, module.in_features), weight.t().contiguous()
        else:
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    linear.weight = nn.Parameter(weight)
    if module.bias is not None:  # the same parameter where it can be: a head may share its bias
        linear.bias = module.bias if module.bias.dtype == dtype else nn.Parameter(module.bias.to(dtype))
        linear.bias.requires_grad_(True)
    return linear


def _float_embedding(module: QepEmbedding, weight: Tensor) -> nn.Embedding:
    scale = {} if module.embed_scale is None else {"embed_scale": module.embed_scale}
    new = module.float_class(module.num_embeddings, module.embedding_dim, module.padding_idx, **scale)
    if module.rounds_scale:
        new.embed_scale = torch.tensor(module.embed_scale, device=weight.device)
    new.weight = nn.Parameter(weight)
    return new


def _restore_converters(model: PreTrainedModel) -> None:
    """Float experts again: save and run them as the family does."""
    ours = {re.escape(".".join(name.split(".")[-2:])) + END_OF_NAME for name, _ in model.named_parameters()}
    used = getattr(model, "_weight_conversions", None) or []
    family = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [
        t for t in used if isinstance(t, WeightRenaming) and not ours & set(t._original_source_patterns)
    ] + [t for t in family if isinstance(t, WeightConverter)]
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager":
            module.config._experts_implementation = model.get_correct_experts_implementation(None)
