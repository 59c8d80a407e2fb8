"""`hf_qep_manifest.json` as a card reads it: checked, because it may have been edited."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hf_qep.engine.headers import MANIFEST, read_json
from hf_qep.errors import CardError

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """One quantised matrix. stored_bits: of all its tensors, scales and padding included."""

    name: str
    out_features: int
    in_features: int
    stored_bits: int
    error: float | None
    format: str

    @property
    def weights(self) -> int:
        """Weights the matrix stands for."""
        return self.out_features * self.in_features

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return self.stored_bits / self.weights

    @property
    def family(self) -> str:
        """Name without the place in the stack: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`."""
        return family_of(self.name)

    @property
    def block(self) -> int | None:
        """First number in the name: which block of the stack it is in."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Manifest:
    """What the manifest says of how a checkpoint was made."""

    base_model: str
    revision: str | None
    licence: str | None
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    bits_linear: float | None
    linear_weights: int
    model_weights: int
    weight_bytes: int
    layers: tuple[Layer, ...]
    skipped: dict[str, str]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    versions: dict[str, str]
    raw: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. Raises CardError if it lacks what a card needs, CheckpointError if unreadable."""
        raw = read_json(folder / MANIFEST)
        report, bits = _get(raw, "report", dict), _get(raw, "bits", dict)
        linear = bits.get("bits_linear")
        return cls(
            base_model=_get(raw, "base_model", str),
            revision=_optional(raw, "revision", str),
            licence=_optional(raw, "licence", str),
            recipe=_get(raw, "recipe", dict),
            calibration=_get(raw, "calibration", dict),
            bits_linear=None if linear is None else _number(bits, "bits_linear"),
            linear_weights=_size(bits, "linear_weights"),
            model_weights=_size(bits, "model_weights"),
            weight_bytes=_size(bits, "weight_bytes"),
            layers=tuple(_layer(entry) for entry in _get(report, "layers", list)),
            skipped={name: _get(report["skipped"], name, str) for name in _get(report, "skipped", dict)},
            seconds={name: _number(report["seconds"], name) for name in _optional(report, "seconds", dict) or {}},
            warnings=tuple(str(warning) for warning in _optional(report, "warnings", list) or []),
            versions={name: str(version) for name, version in (_optional(raw, "versions", dict) or {}).items()},
            raw=raw,
        )

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Calibration sources, with their names."""
        listed = self.calibration.get("sources")
        known = isinstance(listed, list) and all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in listed)
        return listed if known and isinstance(listed, list) else []


def family_of(name: str) -> str:
    """A module's name from behind its last number on, or the whole name without one."""
    return re.split(r"\.\d+\.", name)[-1]


def _layer(entry: Any) -> Layer:
    if not isinstance(entry, dict):
        raise _broken("layers", entry)
    spec, error = _get(entry, "spec", dict), entry.get("error")
    return Layer(
        name=_get(entry, "name", str),
        out_features=_size(entry, "out_features"),
        in_features=_size(entry, "in_features"),
        stored_bits=_size(entry, "stored_bits"),
        error=None if error is None else _number(entry, "error"),
        format=str(spec.get("format")),
    )


def _get(values: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = values.get(key)
    if not isinstance(value, kind):
        raise _broken(key, value)
    return value


def _optional(values: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    return None if values.get(key) is None else _get(values, key, kind)


def _size(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise _broken(key, value)
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise _broken(key, value)
    return float(value)  # type: ignore[arg-type]


def _broken(key: str, value: Any) -> CardError:
    return CardError(
        f"{key!r} in {MANIFEST!r} is {value!r:.60}, so the card cannot say how this was made; quantise again"
    )
