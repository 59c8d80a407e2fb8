"""`QepTableMethod`: word embeddings and output heads of vLLM in format `integer`.

vLLM divides their rows among the ranks and fills them up to a multiple of 64; rows that no token has are zero words,
which are weights of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.registry import FORMATS
from hf_qep.vllm_plugin.interface import layers
from hf_qep.vllm_plugin.shards import check_tensor


class _TableMethod:
    """What vLLM asks of the method of a table; the base class of vLLM is added by `table_method`."""

    def __init__(self, name: str, spec: Any, activation: str) -> None:
        self.format = FORMATS.get(spec.format)
        if not hasattr(self.format, "rows"):
            raise ConfigError(f"the table `{name}` has format `{spec.format}`, and vLLM is served tables of `integer`")
        self.name, self.spec, self.activation = name, spec, activation

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
        """One packed parameter, whose rows vLLM divides. Raises ConfigError if the groups do not divide the width."""
        shape, dtype = self.format.layout(self.spec, sum(output_partition_sizes), input_size)["weight"]
        weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        weight.output_dim, weight.input_dim = 0, 1
        weight.weight_loader = partial(self._load, layer, extra["weight_loader"])
        layer.register_parameter("weight", weight)
        # Packed embeddings store this empty tensor beside their rows; it tells transformers the dtype of the model.
        dtype_like = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        dtype_like.weight_loader = _nothing
        layer.register_parameter("dtype_like", dtype_like)

    def _load(self, layer: nn.Module, load: Callable[..., None], parameter: Tensor, loaded: Tensor) -> None:
        try:
            check_tensor("weight", loaded, self.spec, (layer.org_vocab_size, layer.embedding_dim))
        except CheckpointError as error:
            raise CheckpointError(f"`{self.name}` cannot be loaded: {error}") from error
        load(parameter, loaded)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Rows are read as they are stored."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's rows: x (..., in) -> (..., rows), dtype of x."""
        return self.format.linear(x, {"weight": layer.weight}, self.spec, bias, self.activation)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows of this rank: ids (...) int64 -> (..., embedding_dim) of the model's dtype."""
        weight = {"weight": layer.weight}
        return self.format.rows(input_, weight, self.spec, layer.embedding_dim, layer.params_dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let a head share the table of the embedding, and how it is read."""
        return _tie(layer, embed_tokens)


def _nothing(parameter: Tensor, loaded: Tensor) -> None:
    """Load an empty tensor."""


def _tie(layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
    layer.weight, layer.quant_method = embed_tokens.weight, embed_tokens.quant_method
    return layer


@cache
def table_method() -> type:
    """The class that vLLM gets. Raises as `interface.layers` does."""
    return type("QepTableMethod", (_TableMethod, layers().QuantizeMethodBase), {})


@cache
def float_head_method() -> type:
    """Method of a head that is not listed: float, unless it is tied to an embedding that is packed."""

    def tie_weights(self: Any, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        return _tie(layer, embed_tokens)

    return type("QepFloatHeadMethod", (layers().UnquantizedEmbeddingMethod,), {"tie_weights": tie_weights})


def serve_every_table(is_ours: Callable[[Any], bool]) -> None:
    """Have vLLM ask the config for embeddings that their models build without one, as Cohere's do.

    vLLM lets a plugin replace a layer class by a subclass of it; this one only passes on the config of the model that
    is being built, if `is_ours`. Without effect if it was done before, or another plugin has replaced the class.
    """
    known = layers()
    name = known.VocabParallelEmbedding.__name__
    if name in known.op_registry_oot:
        return

    class QepVocabParallelEmbedding(known.VocabParallelEmbedding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            current = known.get_current_vllm_config_or_none()
            config = getattr(current, "quant_config", None)
            if len(args) < CONFIG_POSITION and kwargs.get("quant_config") is None and is_ours(config):
                kwargs["quant_config"] = config
            super().__init__(*args, **kwargs)

    QepVocabParallelEmbedding.name = name
    known.op_registry_oot[name] = QepVocabParallelEmbedding


CONFIG_POSITION = 6
"""Positional arguments of VocabParallelEmbedding from which on one of them is the config."""
