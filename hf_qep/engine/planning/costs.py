"""Seconds and workspace from a measured table: costs per operation against the width of a linear, phase by phase.

`scripts/bench_scale.py` makes the table. A phase has a number of operations that follows from shapes and tokens, and
the table says how long one of them takes at some widths; between these it is interpolated, beyond them it is that of
the nearest. Workspace has no machine in it: bytes in units of a float32 square as wide as the input, against out / in,
and beside it units of a float32 row, for what a solver holds of a block of columns at a time.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from hf_qep.config import AUTO, QepConfig
from hf_qep.engine.block import error_rows
from hf_qep.engine.extent import FACTORISATIONS, SOLVER_PRODUCTS, training_operations
from hf_qep.engine.planning.block_memory import FLOAT32
from hf_qep.engine.planning.sketch import BlockSketch, GroupSketch, Sketch
from hf_qep.errors import ConfigError
from hf_qep.kernels.processor import processor_name

FILE = "costs.json"
VERSION = 1
RATE_WIDTH, RATE_SECONDS = 1024, 1.0
"""Of the product that says how fast a machine is, and how long it is repeated."""
WITHOUT_PRODUCTS = ("rtn", "onebit")
"""Methods that do not use the Hessian."""


@dataclass(frozen=True)
class CostTable:
    """Measured costs. phases: name -> (width, seconds per operation) rising in width. workspace: method -> (out / in,
    squares, rows) rising in the ratio. rate: operations per second of a float32 product there, see `matrix_rate`.
    disk: bytes per second. about: where it was measured.
    """

    phases: Mapping[str, Sequence[Sequence[float]]]
    workspace: Mapping[str, Sequence[Sequence[float]]]
    rate: float
    disk: float
    about: Mapping[str, Any]

    def seconds(self, phase: str, width: float, operations: float) -> float:
        """Time of so many operations of a phase on linears of a width. Raises KeyError for an unknown phase."""
        return operations * _between(self.phases[phase], width)

    def workspace_bytes(self, method: str, out_features: int, in_features: int) -> float:
        """Bytes that correcting and solving a linear takes besides its moments, for a method of the table or any."""
        rows = self.workspace.get(method) or max(self.workspace.values(), key=lambda rows: rows[-1][1])
        units, blocks = (_extended(rows, out_features / in_features, column) for column in (1, 2))
        return FLOAT32 * in_features * (in_features * units + blocks)


@dataclass(frozen=True)
class Seconds:
    """Time of a job by phase. basis: one sentence on where the figures come from. guess: whether no table served."""

    phases: dict[str, float]
    basis: str
    guess: bool

    @property
    def total(self) -> float:
        """All phases."""
        return sum(self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return {"total": self.total, "phases": self.phases, "basis": self.basis, "guess": self.guess}


def cost_file() -> Path:
    """Where a table that was measured on this machine lies."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hf_qep" / FILE


def load_costs() -> CostTable:
    """The table of this machine, or else the one of the package. Raises ConfigError for a damaged one."""
    own = cost_file()
    shipped = resources.files("hf_qep.engine.planning").joinpath(FILE)
    try:
        found = json.loads((own if own.is_file() else shipped).read_text(encoding="utf-8"))
        if found.pop("version") != VERSION:
            raise ValueError(f"version is not {VERSION}")
        return CostTable(**found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        name = own if own.is_file() else shipped
        raise ConfigError(f"the table of costs {str(name)!r} is not readable ({error}); measure it again") from error


def machine() -> dict[str, Any]:
    """What decides how fast this machine is: processor and threads of torch."""
    return {"processor": processor_name() or platform.machine(), "threads": torch.get_num_threads()}


def matrix_rate(width: int = RATE_WIDTH, seconds: float = RATE_SECONDS) -> float:
    """Operations per second of a float32 matrix product on this machine."""
    a = torch.randn(width, width)
    a @ a  # the first product sets up threads
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        count += 1
    return 2.0 * width**3 * count / (time.perf_counter() - began)


def job_seconds(
    sketch: Sketch, recipe: QepConfig, table: CostTable, *, streaming: bool, written: int
) -> dict[str, float]:
    """Phase -> seconds on the machine of the table. written: bytes of the output.

    The rows that a model writes itself, if it gets no text, are not in it.
    """
    found: Counter[str] = Counter()
    tokens, size = recipe.num_samples * recipe.seq_len, sketch.dtype
    for block in sketch.blocks:
        found.update(_block_seconds(sketch, block, recipe, table, tokens))
    states = 2 * tokens * sketch.hidden * size.itemsize * len(sketch.blocks)
    found["read"] = sketch.float_bytes / table.disk
    found["write"] = (written * (1 + streaming) + states * streaming) / table.disk
    if training := _training(sketch, recipe, tokens):
        width = _mean_width(sketch)
        found["train"] = table.seconds(_float_phase(sketch), width, training)
    return dict(found)


def job_operations(sketch: Sketch, recipe: QepConfig) -> float:
    """Operations of all phases: what a rate turns into seconds where there is no table."""
    flat = CostTable(_AtUnit(), {}, 1.0, math.inf, {})
    return sum(job_seconds(sketch, recipe, flat, streaming=False, written=0).values())


def solver_operations(method: str, out_features: int, in_features: int) -> float:
    """Operations of solving a linear, by the products of its size that the method makes; weights, if it makes none."""
    if method in WITHOUT_PRODUCTS:
        return float(out_features * in_features)
    products = SOLVER_PRODUCTS.get(method, SOLVER_PRODUCTS["sign"])
    return (2.0 * products + 2.0) * out_features * in_features**2 + (FACTORISATIONS - 1) * in_features**3 / 3


def correcting_operations(out_features: int, in_features: int) -> float:
    """A factorisation, two triangular solves, and the product with the cross moment."""
    return in_features**3 / 3 + 4.0 * out_features * in_features**2


def _block_seconds(
    sketch: Sketch, block: BlockSketch, recipe: QepConfig, table: CostTable, tokens: int
) -> Counter[str]:
    found: Counter[str] = Counter()
    method = "sign" if recipe.method == AUTO else recipe.method
    packed = "packed.factored" if method == "factored" else "packed.sign"
    behind, propagates = 0.0, recipe.propagation > 0
    for group in block.groups:
        floats = running = 0.0
        for ref in _running(group, sketch):
            width, product = math.sqrt(ref.out_features * ref.in_features), 2.0 * tokens * math.prod(ref.shape)
            floats += table.seconds(_float_phase(sketch), width, product)
            running += table.seconds(packed, width, product)
        found["float pass"] += floats
        found["observe"] += behind + (floats if group.writes and recipe.residual else 0.0)
        behind += running
        rows, cross = group.in_features, propagates and not group.exempt
        second = (group.linears[0].out_features if group.writes and recipe.residual else rows) if cross else 0
        observed = 2.0 * tokens * rows * (rows + second) * (sketch.active_experts if group.exempt else 1)
        found["observe"] += table.seconds("moments", rows, observed)
        for ref in group.linears:
            width = math.sqrt(ref.out_features * ref.in_features)
            if cross:
                found["correct"] += table.seconds("correct", width, correcting_operations(*ref.shape))
            phase = f"solve.{method}" if f"solve.{method}" in table.phases else "solve.sign"
            found["solve"] += table.seconds(phase, width, solver_operations(method, *ref.shape))
            reported = len(range(ref.out_features)[error_rows(ref.out_features)])
            found["error"] += table.seconds("float.float32", width, 4.0 * reported * ref.in_features**2)
    found["advance"] += behind
    passes = 2 + sum(group.linears[0].expert is None for group in block.groups[1:])
    attention = 4.0 * tokens * recipe.seq_len * sketch.query_width / 2
    found["attention"] = passes * table.seconds("attention", sketch.query_width, attention)
    return found


def _running(group: GroupSketch, sketch: Sketch) -> Sequence[Any]:
    """Linears that each token passes."""
    return group.linears[: sketch.active_experts] if group.linears[0].expert is not None else group.linears


def _training(sketch: Sketch, recipe: QepConfig, tokens: int) -> float:
    weights = sum(math.prod(ref.shape) for ref in sketch.linears)
    return training_operations(weights, (sketch.vocabulary or 0) * sketch.hidden, len(sketch.blocks), tokens, recipe)


def _mean_width(sketch: Sketch) -> float:
    return math.sqrt(sum(math.prod(ref.shape) for ref in sketch.linears) / len(sketch.linears))


def _float_phase(sketch: Sketch) -> str:
    return "float.bfloat16" if sketch.dtype.itemsize == 2 else "float.float32"


class _AtUnit(dict):
    """Every phase at a second per operation."""

    def __missing__(self, phase: str) -> list[list[float]]:
        return [[1.0, 1.0]]


def _between(rows: Sequence[Sequence[float]], at: float) -> float:
    """Interpolation, linear in the logarithms; the nearest row beyond the ends."""
    places = [row[0] for row in rows]
    upper = bisect(places, at)
    if upper in (0, len(rows)):
        return rows[min(upper, len(rows) - 1)][1]
    (x0, y0), (x1, y1) = rows[upper - 1], rows[upper]
    part = (math.log(at) - math.log(x0)) / (math.log(x1) - math.log(x0))
    return math.exp(math.log(y0) * (1 - part) + math.log(y1) * part)


def _extended(rows: Sequence[Sequence[float]], at: float, column: int) -> float:
    """Linear interpolation, and the slope at the ends beyond them."""
    places = [row[0] for row in rows]
    upper = min(max(bisect(places, at), 1), len(rows) - 1)
    (x0, y0), (x1, y1) = ((row[0], row[column]) for row in (rows[upper - 1], rows[upper]))
    return max(0.0, y0 + (y1 - y0) * (at - x0) / (x1 - x0))
