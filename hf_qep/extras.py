"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from hf_qep.errors import ExtraMissingError


def require(extra: str, module: str) -> ModuleType:
    """Import `module` or raise `ExtraMissingError` that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise ExtraMissingError(
            f"this needs the package `{top}`, which is not installed; run: pip install 'hf-qep[{extra}]'"
        ) from error
