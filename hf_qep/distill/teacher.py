"""What a teacher said about every row, taken once.

Of a model with classes (a language model's vocabulary) the log-probabilities are kept, all of them where there is room
and else the likeliest; of one without (an encoder) the output itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_qep.algorithms.distillation import TopClasses, divergence, relative_error, top_classes

ROOM_BYTES, LEAST_CLASSES = 1 << 31, 64
"""Room for the outputs of the teacher, and classes kept per token where that is not enough for all of them. What the
classes that are left out get is not trained: 64 of 2,048 kept a third less of the gain than all of them."""


@dataclass(frozen=True)
class Teacher:
    """Outputs of the teacher, on the CPU, one entry per row of the data."""

    said: TopClasses | Tensor

    def __len__(self) -> int:
        return len(self.said.log_p if isinstance(self.said, TopClasses) else self.said)

    def loss(self, output: Any, rows: Tensor | slice, mask: Tensor | None = None) -> Tensor:
        """Distance of a model's output on some rows from what the teacher said about them, a scalar.

        output: as the model returns it. rows: their numbers (rows,) int64, or a slice. mask (rows, tokens): 0 leaves a
        token out. The Kullback-Leibler divergence in nats, or the relative squared error; the mean over the tokens.
        """
        each = distance(output, _rows_of(self.said, rows))
        if mask is None or mask.shape != each.shape:
            return each.mean()
        kept = mask.to(each)
        return (each * kept).sum() / kept.sum().clamp_min(1)


def distance(output: Any, said: TopClasses | Tensor) -> Tensor:
    """Distance per token, (rows, tokens) float32, or per row where the model has one output for each."""
    if isinstance(said, TopClasses):
        return divergence(said.to(output.logits.device), output.logits)
    return relative_error(output[0], said.to(output[0].device))


@torch.no_grad()
def take_teacher(model: Any, batches: Sequence[dict[str, Tensor]], room: int = ROOM_BYTES) -> Teacher:
    """Run the model over all batches, dicts of inputs whose first dimension are rows. room: bytes for what is kept."""
    outputs = (model(**{key: value.to(model.device) for key, value in batch.items()}) for batch in batches)
    return keep_teacher(outputs, count_rows(batches), room)


def count_rows(batches: Iterable[dict[str, Tensor]]) -> int:
    """Of all batches together."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


@torch.no_grad()
def keep_teacher(outputs: Iterable[Any], rows: int, room: int = ROOM_BYTES) -> Teacher:
    """The same of a model's outputs, batch by batch. rows: of all batches together."""
    kept: dict[str, Tensor] = {}
    start = 0
    for output in outputs:
        parts = _parts(output, rows, room)
        size = len(next(iter(parts.values())))
        for name, part in parts.items():
            if name not in kept:
                kept[name] = torch.empty(rows, *part.shape[1:], dtype=part.dtype)
            kept[name][start : start + size] = part
        start += size
    return Teacher(kept["output"] if "output" in kept else TopClasses(kept.get("index"), kept["log_p"]))


def _parts(output: Any, rows: int, room: int) -> dict[str, Tensor]:
    """Tensors to keep of one batch. An entry of a list of likeliest classes takes six bytes, of a full one two."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return {"output": output[0]}
    places, classes = rows * logits.shape[1:-1].numel(), logits.shape[-1]
    fits = 2 * places * classes <= room
    found = top_classes(logits, classes if fits else max(LEAST_CLASSES, room // (6 * places)))
    return {"log_p": found.log_p} | ({} if found.index is None else {"index": found.index})


def _rows_of(said: TopClasses | Tensor, rows: Tensor | slice) -> TopClasses | Tensor:
    where = rows.cpu() if isinstance(rows, Tensor) else rows
    if isinstance(said, Tensor):
        return said[where]
    return TopClasses(None if said.index is None else said.index[where], said.log_p[where])
