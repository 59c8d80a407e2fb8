"""What becomes of each linear: the method that solves it and the spec of its format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hf_qep.architectures.parts import LinearRef
from hf_qep.config import EXPORTS, QepConfig
from hf_qep.errors import ConfigError
from hf_qep.registry import FORMATS, METHODS


@dataclass(frozen=True)
class Recipe:
    """How one linear is quantised."""

    method: str
    """Name in `hf_qep.methods`."""
    spec: Any
    """Spec of the method's format."""

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits of all tensors of a linear, scales and padding included."""
        return FORMATS.get(self.spec.format).stored_bits(self.spec, out_features, in_features)


def uniform_recipes(refs: Iterable[LinearRef], config: QepConfig) -> dict[LinearRef, Recipe]:
    """One method and one budget for every linear.

    Raises BitsError or ConfigError for a budget or a group size that the method cannot serve at some width.
    """
    method = METHODS.get(config.method)
    shapes: dict[tuple[int, int], Recipe] = {}
    found = {}
    for ref in refs:
        if config.export is not None and ref.in_features % EXPORTS[config.export]:
            raise ConfigError(
                f'`{ref.name}` has {ref.in_features} columns, and export="{config.export}" needs a multiple of '
                f"{EXPORTS[config.export]}; keep it float with skip_modules, or leave export out"
            )
        if ref.shape not in shapes:
            spec = method.spec(config.bits, config.group_size, *ref.shape)
            shapes[ref.shape] = Recipe(config.method, replace(spec, column_scale=False) if config.export else spec)
        found[ref] = shapes[ref.shape]
    return found
