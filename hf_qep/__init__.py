"""hf_qep: ~1-bit weight quantisation as a Hugging Face plugin.

Importing this package makes `quant_method: "qep"` known to transformers, now or as soon as transformers is imported. It
imports neither torch nor transformers itself: public names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_qep.registration import install, register

if TYPE_CHECKING:
    from hf_qep.adapters import merge_adapter
    from hf_qep.config import QepConfig
    from hf_qep.engine.job import quantize_model
    from hf_qep.errors import QepError
    from hf_qep.modules import QepConv1D, QepEmbedding, QepExpertWeight, QepLinear
    from hf_qep.quantizer import QepHfQuantizer
    from hf_qep.remote_code import add_remote_code

__version__ = "0.1.0"

__all__ = [
    "QepConfig",
    "QepConv1D",
    "QepEmbedding",
    "QepError",
    "QepExpertWeight",
    "QepHfQuantizer",
    "QepLinear",
    "__version__",
    "add_remote_code",
    "merge_adapter",
    "quantize_model",
    "register",
]

_HOME = {
    "QepConfig": "config",
    "QepConv1D": "modules",
    "QepEmbedding": "modules",
    "QepError": "errors",
    "QepExpertWeight": "modules",
    "QepHfQuantizer": "quantizer",
    "QepLinear": "modules",
    "add_remote_code": "remote_code",
    "merge_adapter": "adapters",
    "quantize_model": "engine.job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
