"""Every matrix of a model that could be quantised, and the reasons why a model or a matrix cannot."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_qep.architectures.access import get_weight, on_demand
from hf_qep.architectures.parts import LinearRef
from hf_qep.errors import AlreadyQuantizedError, ArchitectureError, ConfigError


def find_linears(model: nn.Module) -> dict[LinearRef, Tensor]:
    """LinearRef -> weight (out, in) of every nn.Linear, Conv1D and slice of a 3-D parameter, in module order."""
    refs: list[LinearRef] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            out_features, in_features = module.weight.shape
            refs.append(LinearRef(name, None, "linear", out_features, in_features))
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            refs.append(LinearRef(name, None, "conv1d", out_features, in_features))
        elif not isinstance(module, _ConvNd):
            refs.extend(_slices(name, module))
    return {ref: get_weight(model, ref) for ref in refs}


def _slices(name: str, module: nn.Module) -> Iterable[LinearRef]:
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and len(parameter) > 1:
            full = f"{name}.{leaf}" if name else leaf
            experts, out_features, in_features = parameter.shape
            yield from (LinearRef(full, e, "expert", out_features, in_features) for e in range(experts))


def check_float(model: nn.Module) -> None:
    """Raises AlreadyQuantizedError for packed weights, ArchitectureError for weights that are not in memory and are not
    read when they are needed either."""
    readable = {id(p) for module in on_demand(model).values() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise AlreadyQuantizedError(
                f"`{name}` is {parameter.dtype}: this model is quantised already; start from the float model"
            )
        if type(parameter.data) is not Tensor:
            raise ArchitectureError(
                f"`{name}` is a {type(parameter.data).__name__}, not a plain tensor; "
                "load the model without sharding and without another quantisation"
            )
        if parameter.device.type == "meta" and id(parameter) not in readable:
            raise ArchitectureError(f"`{name}` is on the meta device; load the weights before quantising")


def check_unshared(model: nn.Module, refs: Iterable[LinearRef]) -> None:
    """Raises ArchitectureError if a weight to quantise is also another parameter."""
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(_memory(parameter), []).append(name)
    for ref in refs:
        parameter = parameters[ref.name if ref.expert is not None else f"{ref.name}.weight"]
        if ref.expert in (None, 0) and len(shared := names[_memory(parameter)]) > 1:
            raise ArchitectureError(
                f"`{shared[0]}` and `{shared[1]}` are one tensor; a shared weight cannot be quantised for two inputs, "
                "so untie it or name one of them in skip_modules"
            )


def _memory(parameter: Tensor) -> int:
    """What two parameters have in common if they are one tensor; meta tensors have no address."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def skipped_by_user(model: nn.Module, names: Sequence[str], skip_modules: Sequence[str]) -> set[str]:
    """Those of `names` that skip_modules covers, by the rules of transformers' `modules_to_not_convert`.

    An entry is the start of a name up to a dot, a regular expression for such a start, or the end of a name. Raises
    ConfigError for an entry that is no regular expression or that covers neither a module without children (a head, a
    router, an embedding) nor one of `names`: `layers.0` ends the name of a block but of none of its linears.
    """
    known = {name for name, module in model.named_modules() if not any(module.children())} | set(names)
    for entry in skip_modules:
        try:
            matches = any(not should_convert_module(name, [entry]) for name in known)
        except re.error as error:
            raise ConfigError(f"skip_modules entry `{entry}` is not a regular expression: {error}") from error
        if not entry or not matches:
            near = difflib.get_close_matches(entry, sorted(known | {n.rpartition(".")[2] for n in known}), 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"skip_modules entry `{entry}` matches no module of this {type(model).__name__}{hint}")
    return {name for name in names if not should_convert_module(name, list(skip_modules))}


def input_key(x: Tensor) -> tuple[int, ...]:
    """Identity of a tensor's content for as long as `x` is kept alive: equal keys mean the same numbers, row by row.

    Leading dimensions do not count, because Conv1D and expert code flatten them. The version tells apart what was
    there before and after an operation in place.
    """
    version = 0 if torch.is_inference(x) else x._version
    return x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), version
