"""What a quantisation run did, as plain values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One quantised linear."""

    name: str
    """Module name; slices of an expert parameter share it."""
    expert: int | None
    out_features: int
    in_features: int
    spec: dict[str, Any]
    stored_bits: int
    """Bits of the stored tensors, scales and padding included."""
    error: float
    """tr((W - What) H (W - What)^T) / tr(W H W^T) for the corrected target W, on the calibration rows."""
    tokens: int
    """Calibration tokens that reached the layer."""
    propagation: float
    """Strength of error propagation that was used."""
    exempt: str | None
    """Why propagation was off, if the architecture says so."""


@dataclass(frozen=True)
class BlockTuning:
    """What tuning did to one block. Losses: see `engine.tuning`."""

    block: str
    trained_on: int
    """Batches that were trained on."""
    held_out: int
    """Batches that were not."""
    before: float
    """Loss on the held-out batches as solved."""
    after: float
    """The same for what is stored; never more than `before`."""
    epoch: int
    """Epoch that was kept; 0 is none."""
    flips: float
    """Share of signs that were turned."""


@dataclass
class QuantizationReport:
    """Outcome of `quantize_model`."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules that stay float, with the reason."""
    tuning: list[BlockTuning] = field(default_factory=list)
    """One entry per block, with `tune_epochs` only."""
    passes: list[tuple[int, int]] = field(default_factory=list)
    """(float passes, quantised passes) of every block."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Wall time by phase: float pass, observe, correct, solve, tune, advance."""
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the manifest."""
        return asdict(self) | {"seconds": {k: round(v, 3) for k, v in self.seconds.items()}}
