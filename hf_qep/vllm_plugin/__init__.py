"""Plugin of vLLM: with hf_qep installed beside it, `vllm serve CHECKPOINT` reads method "qep".

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process. Nothing of
vLLM is imported before; `import hf_qep` does not import this.

    shards      parts of packed matrices, in plain torch
    windows     which part a layer of vLLM holds on its rank
    linear      the method of linears, fused ones too
    tables      that of embeddings and heads
    config      which layer gets which
    interface   what is taken from vLLM

Written against the source of vLLM 0.33.0; not run on a GPU.  Triton compiles and tunes at the first product of a shape,
which vLLM makes before it captures a CUDA graph of that size.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make method "qep" known to vLLM. May be called again, in any process.

    Raises ExtraMissingError without vLLM, ConfigError if vLLM is too old to have quantisation plugins.
    """
    from hf_qep.vllm_plugin.config import METHOD, config_class
    from hf_qep.vllm_plugin.interface import quantisation

    quantisation().register_quantization_config(METHOD)(config_class())


def __getattr__(name: str) -> Any:
    """`QepServingConfig`, which exists only where vLLM does."""
    if name == "QepServingConfig":
        from hf_qep.vllm_plugin.config import config_class

        return config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
