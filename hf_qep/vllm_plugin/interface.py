"""What is taken from vLLM, imported at the first use: importing this file needs no vLLM."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType, SimpleNamespace

from hf_qep.errors import ConfigError, ExtraMissingError

OLDEST = "0.33"
"""vLLM whose source these classes were written against; its interfaces move between minor versions."""

_LAYERS = "vllm.model_executor.layers"
_QUANTISATION = {
    f"{_LAYERS}.quantization": ("register_quantization_config",),
    f"{_LAYERS}.quantization.base_config": ("QuantizationConfig",),
}
_LINEARS = {
    f"{_LAYERS}.linear": (
        "ColumnParallelLinear",
        "LinearBase",
        "LinearMethodBase",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "ReplicatedLinear",
        "RowParallelLinear",
        "UnquantizedLinearMethod",
    ),
    f"{_LAYERS}.vocab_parallel_embedding": (
        "ParallelLMHead",
        "UnquantizedEmbeddingMethod",
        "VocabParallelEmbedding",
    ),
    f"{_LAYERS}.quantization.base_config": ("QuantizeMethodBase",),
    "vllm.model_executor.custom_op": ("op_registry_oot",),
    "vllm.config": ("get_current_vllm_config_or_none",),
}


@cache
def quantisation() -> SimpleNamespace:
    """What registration needs; light enough for every process of vLLM, whatever model it serves.

    Raises ExtraMissingError without vLLM, ConfigError if it is too old.
    """
    return _take(_QUANTISATION)


@cache
def layers() -> SimpleNamespace:
    """The layers and methods of vLLM that the plugin stands on. Raises as `quantisation` does."""
    return _take(_LINEARS)


def _take(wanted: dict[str, tuple[str, ...]]) -> SimpleNamespace:
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:  # no extra brings it: it pins torch and transformers, and is better installed first
        raise ExtraMissingError(
            f"this needs the package `vllm`, which is not installed; run: pip install 'vllm>={OLDEST}'"
        ) from error
    found = {name: _attribute(vllm, module, name) for module, names in wanted.items() for name in names}
    return SimpleNamespace(**found)


def _attribute(vllm: ModuleType, module: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError) as error:
        version = getattr(vllm, "__version__", "of unknown version")
        raise ConfigError(
            f"vLLM {version} has no `{module}.{name}` ({error}), for which the plugin of hf_qep was written; "
            f"run: pip install 'vllm>={OLDEST}'"
        ) from error
