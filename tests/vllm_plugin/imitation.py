"""The interfaces of vLLM 0.33.0 that the plugin touches, imitated: rules of division and loading, no kernels.

Written after `vllm/model_executor/layers/linear.py`, `vocab_parallel_embedding.py`, `quantization/base_config.py`,
`quantization/__init__.py`, `custom_op.py` and `models/utils.py` of the wheel; names, signatures, attributes and the
order of calls are theirs. `modules()` gives them under the names by which they are imported.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WORLD = SimpleNamespace(rank=0, size=1, quant_config=None)
"""Rank and size of the tensor parallel group, and the config of the model that is being built."""

op_registry_oot: dict[str, type] = {}
QUANTIZATION_METHODS = ["fp8", "gptq"]
_CUSTOMIZED: dict[str, type] = {}


def get_current_vllm_config_or_none() -> Any:
    return SimpleNamespace(quant_config=WORLD.quant_config)


def divide(numerator: int, denominator: int) -> int:
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"
    return numerator // denominator


def set_weight_attrs(weight: torch.Tensor, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        assert not hasattr(weight, name), f"Overwriting existing tensor attribute: {name}"
        setattr(weight, name, value)


# ---- quantization ----


class QuantizeMethodBase(ABC):
    requires_device_loading = True
    uses_meta_device = False

    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def embedding(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class QuantizationConfig(ABC):
    online_quantization_config = None

    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None: ...


def register_quantization_config(quantization: str) -> Any:
    def wrapper(cls: type) -> type:
        if quantization not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.append(quantization)
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        _CUSTOMIZED[quantization] = cls
        return cls

    return wrapper


def get_quantization_config(quantization: str) -> type:
    if quantization not in QUANTIZATION_METHODS:
        raise ValueError(f"Invalid quantization method: {quantization}")
    return _CUSTOMIZED[quantization]


class PluggableLayer(nn.Module):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(op_registry_oot.get(cls.__name__, cls))


# ---- linear ----


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ):
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = nn.Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


class LinearBase(PluggableLayer):
    def __init__(
        self, input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix, *, disable_tp=False
    ):
        super().__init__()
        self.input_size, self.output_size, self.skip_bias_add = input_size, output_size, skip_bias_add
        self.params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.quant_config, self.prefix = quant_config, prefix
        if quant_config is None:
            self.quant_method = UnquantizedLinearMethod()
        elif method := quant_config.get_quant_method(self, prefix):
            self.quant_method = method
        else:
            raise ValueError("All linear layers should support quant method.")
        self.tp_rank, self.tp_size = (0, 1) if disable_tp else (WORLD.rank, WORLD.size)

    def _make(self, bias: bool, input_size: int, sizes: list[int], bias_size: int) -> None:
        method, loader = self.quant_method, self.weight_loader
        method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=loader,
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(bias_size, dtype=self.params_dtype), requires_grad=False)
            set_weight_attrs(self.bias, {"output_dim": 0, "weight_loader": loader})


class ReplicatedLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
        *,
        disable_tp=False,
    ):
        super().__init__(
            input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix, disable_tp=disable_tp
        )
        self._make(bias, input_size, [output_size], output_size)

    def weight_loader(self, param, loaded_weight):
        assert param.size() == loaded_weight.size()
        param.data.copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias), None


class ColumnParallelLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        gather_output=False,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
        *,
        disable_tp=False,
    ):
        size = 1 if disable_tp else WORLD.size
        self_sizes = getattr(self, "output_sizes", [output_size])
        super().__init__(
            input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix, disable_tp=disable_tp
        )
        self.input_size_per_partition, self.output_size_per_partition = input_size, divide(output_size, size)
        self.output_partition_sizes = [divide(each, size) for each in self_sizes]
        self._make(bias, input_size, self.output_partition_sizes, self.output_size_per_partition)

    def weight_loader(self, param, loaded_weight):
        dim = getattr(param, "output_dim", None)
        if dim is not None:
            size = param.data.shape[dim]
            loaded_weight = loaded_weight.narrow(dim, self.tp_rank * size, size)
        assert param.data.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias), None

    def load_weights(self, weights):
        for name, loaded in weights:
            shard = getattr(loaded, "shard_id", None)
            param = getattr(self, name, self)
            if param is None and name == "bias":
                continue
            param.weight_loader(param, loaded, *([] if type(self) is ColumnParallelLinear else [shard]))
            yield name


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size, output_sizes, bias=True, *args, disable_tp=False, **kwargs):
        object.__setattr__(self, "output_sizes", output_sizes)
        super().__init__(input_size, sum(output_sizes), bias, *args, disable_tp=disable_tp, **kwargs)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        if loaded_shard_id is None:
            for shard, part in enumerate(loaded_weight.split(self.output_sizes, param.output_dim)):
                self.weight_loader(param, part, shard)
            return
        offset = sum(self.output_sizes[:loaded_shard_id]) // self.tp_size
        size = self.output_sizes[loaded_shard_id] // self.tp_size
        loaded_weight = loaded_weight.narrow(param.output_dim, self.tp_rank * size, size)
        param.data.narrow(param.output_dim, offset, size).copy_(loaded_weight)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        hidden_size,
        head_size,
        total_num_heads,
        total_num_kv_heads=None,
        bias=True,
        *args,
        v_head_size=None,
        disable_tp=False,
        **kwargs,
    ):
        tp_size = 1 if disable_tp else WORLD.size
        total_kv = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        num_heads = divide(total_num_heads, tp_size)
        few = tp_size >= total_kv
        num_kv_heads, replicas = (1, divide(tp_size, total_kv)) if few else (divide(total_kv, tp_size), 1)
        values = {
            "hidden_size": hidden_size,
            "head_size": head_size,
            "v_head_size": head_size if v_head_size is None else v_head_size,
            "total_num_heads": total_num_heads,
            "total_num_kv_heads": total_kv,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "num_kv_head_replicas": replicas,
        }
        values["output_sizes"] = [
            num_heads * head_size * tp_size,
            num_kv_heads * head_size * tp_size,
            num_kv_heads * values["v_head_size"] * tp_size,
        ]
        for name, value in values.items():
            object.__setattr__(self, name, value)
        super().__init__(hidden_size, sum(self.output_sizes), bias, *args, disable_tp=disable_tp, **kwargs)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        whole = [self.total_num_heads * self.head_size, self.total_num_kv_heads * self.head_size]
        whole.append(self.total_num_kv_heads * self.v_head_size)
        if loaded_shard_id is None:
            for shard, part in zip("qkv", loaded_weight.split(whole, param.output_dim), strict=True):
                self.weight_loader(param, part, shard)
            return
        place = "qkv".index(loaded_shard_id)
        size = self.output_partition_sizes[place]
        rank = self.tp_rank if loaded_shard_id == "q" else self.tp_rank // self.num_kv_head_replicas
        loaded_weight = loaded_weight.narrow(param.output_dim, rank * size, size)
        param.data.narrow(param.output_dim, sum(self.output_partition_sizes[:place]), size).copy_(loaded_weight)


class RowParallelLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        params_dtype=None,
        reduce_results=True,
        quant_config=None,
        prefix="",
        *,
        disable_tp=False,
    ):
        super().__init__(
            input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix, disable_tp=disable_tp
        )
        self.input_size_per_partition = divide(input_size, self.tp_size)
        self._make(bias, self.input_size_per_partition, [output_size], output_size)

    def weight_loader(self, param, loaded_weight):
        dim = getattr(param, "input_dim", None)
        if dim is not None:
            size = param.data.shape[dim]
            loaded_weight = loaded_weight.narrow(dim, self.tp_rank * size, size)
        assert param.data.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, x):
        """This rank's share, before the all-reduce."""
        return self.quant_method.apply(self, x, None if self.tp_rank > 0 or self.skip_bias_add else self.bias), None


def modules() -> dict[str, ModuleType]:
    """Name -> module, to be put into sys.modules."""
    from tests.vllm_plugin import imitated_models, imitated_tables

    layers = "vllm.model_executor.layers"
    here = dict(globals())
    contents = {
        "vllm": {"__version__": "0.33.0"},
        "vllm.config": here,
        "vllm.model_executor": {},
        "vllm.model_executor.custom_op": here,
        layers: {},
        f"{layers}.linear": here,
        f"{layers}.quantization": here,
        f"{layers}.quantization.base_config": here,
        f"{layers}.vocab_parallel_embedding": vars(imitated_tables),
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": vars(imitated_models),
    }
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        made[name].__path__ = []
        public = {key: value for key, value in content.items() if not key.startswith("__") or key == "__version__"}
        made[name].__dict__.update(public)
    return made


def method_has_implemented_embedding(method_class: type) -> bool:
    own = inspect.getattr_static(method_class, "embedding", None)
    return own is not None and own is not inspect.getattr_static(QuantizeMethodBase, "embedding", None)
