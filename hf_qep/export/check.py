"""A GGUF file held against the checkpoint that it was made from: names, types, shapes, facts, and every number.

The file is read by the official reader, the checkpoint by `hf_qep.reader`; each is made dense on a way of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_qep.errors import CheckpointError
from hf_qep.export.blocks import signs_from_blocks
from hf_qep.export.families import columns_of
from hf_qep.export.tensors import Planned, Source
from hf_qep.extras import require
from hf_qep.progress import SILENT, Progress

Array = np.ndarray
PANEL = 1 << 22
"""Weights that are made dense at a time."""
ARCHITECTURE = "general.architecture"
FREE = ("general.", "GGUF.")
"""Beginnings of keys that a user may change, but for ARCHITECTURE: name, description, licence."""


@dataclass
class Comparison:
    """tensors: those compared. differs: one sentence for each difference; nothing means that there is none."""

    tensors: int = 0
    differs: list[str] = field(default_factory=list)


def open_gguf(path: Path) -> Any:
    """`gguf.GGUFReader` of a file. Raises CheckpointError if it is missing, cut short or no GGUF file."""
    gguf = require("gguf", "gguf")

    class Strict(gguf.GGUFReader):
        """Notices where a file ends early; the reader itself goes on with empty arrays, for as long as it is told."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Array:
            found = super()._get(offset, dtype, count, *order, **named)
            if len(found) != count:
                raise ValueError("it ends early")
            return found

    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} is no file; give a GGUF file")
    try:
        return Strict(path)
    except (ValueError, LookupError, OverflowError, TypeError, OSError, MemoryError) as error:
        raise CheckpointError(f"{path.name!r} is no whole GGUF file: {error}; export or download it again") from error


def compare(opened: Any, source: Source, planned: Sequence[Planned], *, progress: Progress = SILENT) -> Comparison:
    """Compare the tensors of a file, as `open_gguf` gives it, with those of a checkpoint."""
    found = Comparison()
    there = {tensor.name: tensor for tensor in opened.tensors}
    found.differs += [f"it has a tensor {name!r} too many" for name in sorted(there.keys() - {t.name for t in planned})]
    with progress.bar("compare", len(planned), "tensor") as bar:
        for tensor in planned:
            found.differs += _differences(there.get(tensor.name), tensor, source)
            found.tensors += 1
            bar.advance(detail=tensor.name)
    return found


def compare_facts(opened: Any, expected: dict[str, Any]) -> list[str]:
    """Differences between the facts of a file, as `open_gguf` gives it, and those that would be written (key -> value),
    besides FREE ones."""
    fields = opened.fields
    bound = [key for key in {**expected, **fields} if key == ARCHITECTURE or not key.startswith(FREE)]
    differs = [
        f"{key} is {_brief(_contents(fields[key]))}, and should not be there" for key in bound if key not in expected
    ]
    for key, value in ((key, expected[key]) for key in bound if key in expected):
        there = _contents(fields[key]) if key in fields else None
        if not _same(there, value):
            differs.append(f"{key} is {_brief(there)}, not {_brief(value)}")
    return differs


def _contents(field: Any) -> Any:
    try:
        return field.contents()
    except (ValueError, LookupError, TypeError) as error:
        return f"unreadable ({error})"


def _same(there: Any, value: Any) -> bool:
    if isinstance(value, float) and isinstance(there, float):
        return np.float32(there) == np.float32(value)
    if isinstance(value, (list, tuple)) and isinstance(there, list):
        return len(there) == len(value) and all(map(_same, there, value))
    return there == value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _differences(there: Any, tensor: Planned, source: Source) -> Iterator[str]:
    if there is None:
        yield f"the tensor {tensor.name!r} is missing"
        return
    kind, shape = there.tensor_type.name, tuple(int(n) for n in reversed(there.shape))
    if (kind, shape) != (tensor.kind, tensor.shape):
        yield f"{tensor.name!r} is {kind} {shape}, not {tensor.kind} {tensor.shape}"
        return
    if tensor.module in source.checkpoint.modules and tensor.name.endswith(".weight"):
        lost, allowed = _packed_error(there, tensor, source), source.folds.lost.get(tensor.module, 0.0)
        # The loss of a fold was computed from the scales alone; here it is summed over all weights.
        if not lost <= allowed * (1 + 1e-6):
            yield f"the weights of {tensor.name!r} differ by {lost:.3g}, relative and squared, not {allowed:.3g}"
    elif not np.array_equal(_octets(there.data), _octets(tensor.read())):
        yield f"the numbers of {tensor.name!r} are others"


def _octets(values: Any) -> Array:
    return np.ascontiguousarray(values).view(np.uint8).ravel()


def _packed_error(there: Any, tensor: Planned, source: Source) -> float:
    """Relative squared difference between a packed module and its tensor, the factors that moved put back."""
    module, columns = tensor.module, columns_of(source.config, tensor.module)
    order = np.arange(tensor.shape[0])[source.order(module)]
    given, taken = source.folds.given.get(module), source.folds.taken.get(module)
    wrong, total, step = 0.0, 0.0, max(1, PANEL // columns)
    for first in range(0, len(order), step):
        rows = order[first : first + step]
        exact = source.checkpoint.rows(module, rows, columns=columns).astype(np.float64)
        exact = exact if taken is None else exact * taken[rows, None].astype(np.float64)
        found = _dense(there.data[first : first + step], there.tensor_type).astype(np.float64)
        found = found if given is None else found * given.astype(np.float64)
        wrong += np.square(exact - found).sum()
        total += np.square(exact).sum()
    return float(wrong / max(total, 1e-300))


def _dense(data: Array, kind: Any) -> Array:
    """float32 (rows, columns) of blocks."""
    return signs_from_blocks(data) if kind.name == "Q1_0" else require("gguf", "gguf.quants").dequantize(data, kind)
