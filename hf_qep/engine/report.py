"""What a quantisation run did, as plain values."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
    """tr((W - What) H (W - What)^T) / tr(W H W^T) for the corrected target W, on the calibration rows; of some
    hundred outputs where there are more than 511."""
    tokens: int
    """Calibration tokens that reached the layer."""
    propagation: float
    """Strength of error propagation that was used."""
    exempt: str | None
    """Why propagation was off, if the architecture says so."""


@dataclass(frozen=True)
class TableReport:
    """An embedding or head that is stored as whole numbers."""

    names: list[str]
    """Modules that hold it: two if they are tied."""
    rows: int
    columns: int
    spec: dict[str, Any]
    stored_bits: int
    """Bits of the stored tensor, scales and padding included; a tied pair has one."""
    error: float
    """Squared error of the weights relative to their squares."""


@dataclass(frozen=True)
class Training:
    """What training did. Losses: distance to the float model, see `engine.tuning` and `engine.distillation`."""

    trained_on: int
    """Batches that were trained on; rows, where the whole model was trained."""
    held_out: int
    """Those that were not."""
    before: float
    """Loss on the held-out ones as solved."""
    after: float
    """The same for what is stored; never more than `before`."""
    epoch: int
    """Epoch that was kept; 0 is none."""
    flips: float
    """Share of signs that were turned."""


@dataclass(frozen=True)
class BlockTuning(Training):
    """What tuning did to one block."""

    block: str


@dataclass
class QuantizationReport:
    """Outcome of `quantize_model`."""

    layers: list[LayerReport] = field(default_factory=list)
    tables: list[TableReport] = field(default_factory=list)
    """With `embedding_bits` or `head_bits` only."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Modules that stay float, with the reason."""
    tuning: list[BlockTuning] = field(default_factory=list)
    """One entry per block, with `tune_epochs` only."""
    distillation: Training | None = None
    """With `distill_epochs` only."""
    passes: list[tuple[int, int]] = field(default_factory=list)
    """(float passes, quantised passes) of every block."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Wall time by phase: allocate, float pass, observe, correct, solve, tune, advance, store,
    distill."""
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the body to a phase."""
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the manifest."""
        return asdict(self) | {"seconds": {k: round(v, 3) for k, v in self.seconds.items()}}
