"""`QepLinearMethod`: linear layers of vLLM with packed weights.

vLLM gives a fused layer one set of parameters; here every stored matrix has its own, because q, k and v have column
scales, ranks and formats of their own, and one of them may have stayed float. The layer's parameters are therefore
empty: they carry the loaders, which put each stored tensor into its part as it comes, divided for this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.modules import QepLinear
from hf_qep.vllm_plugin import shards
from hf_qep.vllm_plugin.interface import layers
from hf_qep.vllm_plugin.windows import Key, Part, parts_of


class PackedPart(QepLinear):
    """This rank's part of one packed matrix, which is loaded tensor by tensor.

    spec: of the whole. Raises ConfigError if the format cannot be divided so.
    """

    def __init__(self, part: Part, spec: Any, activation: str) -> None:
        own = shards.shard_spec(spec, part.shape, part.window)
        rows, columns = part.window.shape
        super().__init__(columns, rows, False, own, device=torch.empty(0).device)  # vLLM's default device
        self.part, self.whole_spec, self.activation = part, spec, activation
        self.missing = set(self.tensor_names)

    def take(self, leaf: str, tensor: Tensor) -> None:
        """Copy this rank's part of a stored tensor. Raises CheckpointError if it is not what the format stores."""
        part = self.part
        self._parameters[leaf].data.copy_(shards.shard_tensor(leaf, tensor, self.whole_spec, part.shape, part.window))
        self.missing.discard(leaf)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., columns), bias (rows,) -> (..., rows), dtype of x."""
        held = self._parameters
        if self.tiled:
            return self.format.tiled_linear(x, held, self.spec, bias, self.out_features, self.activation)
        return self.format.linear(x, held, self.spec, bias, self.activation)


class FloatPart(nn.Module):
    """This rank's part of a matrix that stayed float, in a layer that is fused with packed ones."""

    def __init__(self, part: Part, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.out_features = part, part.window.shape[0]
        self.weight = nn.Parameter(torch.zeros(part.window.shape, dtype=dtype), requires_grad=False)
        self.missing = {"weight"}

    def take(self, leaf: str, tensor: Tensor) -> None:
        """Copy this rank's part of the weight. Raises CheckpointError if it is packed, or of another shape."""
        if leaf != "weight" or tuple(tensor.shape) != self.part.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"`{leaf}` is {tensor.dtype} {tuple(tensor.shape)} where a float weight {self.part.shape} belongs, for "
                "the quantization config does not list it"
            )
        self.weight.data.copy_(shards.pick(tensor, self.part.window))
        self.missing.clear()

    def tile(self) -> None:
        """Nothing to prepare."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., columns), bias (rows,) -> (..., rows)."""
        return F.linear(x, self.weight, bias)


class _LinearMethod:
    """What vLLM asks of a linear method; the base class of vLLM is added by `linear_method`."""

    def __init__(self, prefix: str, specs: dict[str, Any], activation: str) -> None:
        self.prefix, self.specs, self.activation = prefix, specs, activation

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make the parts and the empty parameters that load them. Raises ConfigError if the layer cannot be divided."""
        found = parts_of(layer, self.prefix, list(self.specs))
        held = sum(part.window.shape[0] for part in found), found[0].window.shape[1]
        if held != (sum(output_partition_sizes), input_size_per_partition):
            wanted = sum(output_partition_sizes), input_size_per_partition
            raise ConfigError(f"`{self.prefix}` has the shape {wanted} on this rank, and its parts have {held}")
        # A list hides them from vLLM, which would take parameters that no file names for missing ones.
        layer.qep_parts = [self._part(part, params_dtype) for part in found]
        dtypes = {leaf: own.dtype for part in layer.qep_parts[::-1] for leaf, own in part.named_parameters()}
        for leaf, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._load, layer, leaf)
            layer.register_parameter(leaf, parameter)

    def _part(self, part: Part, dtype: torch.dtype) -> PackedPart | FloatPart:
        spec = self.specs[part.name]
        try:
            return FloatPart(part, dtype) if spec is None else PackedPart(part, spec, self.activation)
        except ConfigError as error:
            raise ConfigError(f"`{part.name}` cannot be served like this: {error}") from error

    def _load(self, layer: nn.Module, leaf: str, parameter: Tensor, loaded: Tensor, key: Key = None) -> None:
        if isinstance(layer.qep_parts, nn.ModuleList):
            raise ConfigError(f"`{self.prefix}` is served already, and packed weights cannot be loaded again")
        part = _part_for(layer.qep_parts, key, self.prefix)
        try:
            part.take(leaf, loaded)
        except CheckpointError as error:
            raise CheckpointError(f"`{part.part.name}` cannot be loaded: {error}") from error

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put the parts into the order of the kernels. Raises CheckpointError if a tensor did not come."""
        if isinstance(layer.qep_parts, nn.ModuleList):
            return
        missing = [f"{part.part.name}.{leaf}" for part in layer.qep_parts for leaf in sorted(part.missing)]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}; download or write it again")
        for part in layer.qep_parts:
            part.tile()
        layer.qep_parts = nn.ModuleList(layer.qep_parts)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in on this rank) -> (..., out on this rank), dtype of x; one product for each part."""
        parts = layer.qep_parts
        if len(parts) == 1:
            return parts[0](x, bias)
        biases = [None] * len(parts) if bias is None else bias.split([part.out_features for part in parts])
        return torch.cat([part(x, own) for part, own in zip(parts, biases, strict=True)], -1)


def _part_for(parts: Sequence[Any], key: Key, prefix: str) -> Any:
    for part in parts:
        if part.part.key == key or (len(parts) == 1 and len(part.part.window.rows) == 1 and key in (0, None)):
            return part
    keys = [part.part.key for part in parts]
    raise CheckpointError(
        f"vLLM loads part {key!r} of `{prefix}`, and the plugin knows {keys}: this model fuses or divides its weights "
        "in a way that packed ones cannot follow"
    )


@cache
def linear_method() -> type:
    """The class that vLLM gets. Raises as `interface.layers` does."""
    return type("QepLinearMethod", (_LinearMethod, layers().LinearMethodBase), {})
