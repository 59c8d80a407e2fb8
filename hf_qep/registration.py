"""Makes transformers know the method "qep" without importing transformers before the user does.

transformers has no entry points for quantizers, so somebody has to call `register`. `install` does it at once if
transformers' quantizers are imported already, and otherwise leaves an import hook that does it right after they are.
The same hook puts the merge guard of `hf_qep.adapters` into peft, and makes the configurations of students known to
AutoConfig; their models become known when one of these configurations is first made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

METHOD = "qep"
AUTO = "transformers.quantizers.auto"
PEFT = "peft.tuners.tuners_utils"
CONFIGS = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register `QepConfig` and `QepHfQuantizer` with transformers. Calling it again does nothing.

    Classes left by an earlier import of this package are replaced. Raises ConfigError if another package has taken
    the name "qep".
    """
    from transformers.quantizers import auto

    from hf_qep.config import QepConfig
    from hf_qep.errors import ConfigError
    from hf_qep.quantizer import QepHfQuantizer

    tables = {QepConfig: auto.AUTO_QUANTIZATION_CONFIG_MAPPING, QepHfQuantizer: auto.AUTO_QUANTIZER_MAPPING}
    for own, table in tables.items():
        known = table.get(METHOD, own)
        if known.__module__ != own.__module__:
            raise ConfigError(f"quantisation method {METHOD!r} is already registered by `{known.__module__}`")
        table[METHOD] = own
    # transformers ignores loading options, such as dequantize=True, of configs whose class is not in this tuple.
    others = [c for c in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if c.__module__ != QepConfig.__module__]
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, QepConfig)


def _guard_merges() -> None:
    from hf_qep.adapters import guard_merges

    guard_merges()


def _register_students() -> None:
    from hf_qep.students.modeling_student import register_configs

    register_configs()


_AFTER_IMPORT: dict[str, Callable[[], None]] = {AUTO: register, PEFT: _guard_merges, CONFIGS: _register_students}


class _AfterImport(MetaPathFinder):
    """Runs a function once its module has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _AFTER_IMPORT else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _AFTER_IMPORT[fullname]()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Act on what is imported already; leave one hook for the rest. Safe to call again, also after a reload."""
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__qualname__ != _AfterImport.__qualname__]
    sys.meta_path.insert(0, _AfterImport())
    for name, act in _AFTER_IMPORT.items():
        if name in sys.modules:
            act()
