"""The rows that a student learns from, as tensors, with what is right about each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_qep.errors import ConfigError

CAUSAL_LM, TEXT_CLASSES, IMAGE_CLASSES = "causal-lm", "text-classification", "image-classification"
EMBEDDING, DETECTION = "image-embedding", "object-detection"
TASKS = (CAUSAL_LM, TEXT_CLASSES, IMAGE_CLASSES, EMBEDDING, DETECTION)
IGNORED = -100
"""Label of what is not an answer, as in transformers."""


@dataclass(frozen=True)
class TaskData:
    """Rows of one task.

    task: one of TASKS. inputs: forward keyword arguments without labels, first dimension rows. labels: for `causal-lm`
    (rows, tokens) int64, as transformers takes them (not shifted; IGNORED outside the answers); for classes (rows,)
    int64; for `object-detection` one dict per row with `class_labels` (n,) int64 and `boxes` (n, 4) float32, centre and
    size relative to the image; None where nothing is known. classes: names. answers: ids of the tokens that can answer,
    one per class, for a `causal-lm` that classifies; its answers are then scored over these tokens only. rationales:
    bool (rows,), for `causal-lm`: rows whose labels are the reasons for an answer, not the answer.
    """

    task: str
    inputs: Mapping[str, Tensor]
    labels: Tensor | Sequence[dict[str, Tensor]] | None = None
    classes: tuple[str, ...] | None = None
    answers: tuple[int, ...] | None = None
    rationales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"the task must be one of {', '.join(TASKS)}, not {self.task!r}")
        if not self.inputs or len({len(value) for value in self.inputs.values()}) != 1:
            sizes = {name: len(value) for name, value in self.inputs.items()}
            raise ConfigError(f"all inputs need the same number of rows, at least one: {sizes}")
        if not len(self):
            raise ConfigError("there is no row to learn from")
        if self.labels is not None and len(self.labels) != len(self):
            raise ConfigError(f"{len(self.labels)} labels for {len(self)} rows")
        if self.rationales is not None and (self.task != CAUSAL_LM or self.rationales.shape != (len(self),)):
            raise ConfigError(f"rationales are one truth value for each of the {len(self)} rows of a {CAUSAL_LM} task")
        if self.task == CAUSAL_LM and self.labels is not None and not (self.labels[:, 1:] != IGNORED).any():
            raise ConfigError("no row has an answer: every label is ignored")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def rows(self, which: slice | Tensor | Sequence[int]) -> TaskData:
        """The same task with some of the rows."""
        labels = self.labels
        if isinstance(labels, Tensor):
            labels = labels[which]
        elif labels is not None:
            numbers = range(len(self))[which] if isinstance(which, slice) else torch.as_tensor(which).tolist()
            labels = [labels[n] for n in numbers]
        inputs = {name: value[which] for name, value in self.inputs.items()}
        told = None if self.rationales is None else self.rationales[which]
        return replace(self, inputs=inputs, labels=labels, rationales=told)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
        """Forward keyword arguments with `labels` and `rationales` where there are any, `size` rows at a time."""
        for start in range(0, len(self), size):
            part = self.rows(slice(start, start + size))
            batch: dict[str, Any] = {name: value.to(device) for name, value in part.inputs.items()}
            if isinstance(part.labels, Tensor):
                batch["labels"] = part.labels.to(device)
            elif part.labels is not None:
                batch["labels"] = [{name: value.to(device) for name, value in row.items()} for row in part.labels]
            if part.rationales is not None:
                batch["rationales"] = part.rationales.to(device)
            yield batch

    def split(self, held_out: float, seed: int = 0) -> tuple[TaskData, TaskData]:
        """Rows to learn from and a share of them to judge by, drawn at random. Raises ConfigError if one is empty."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = round(len(self) * held_out)
        if not 0 < count < len(self):
            raise ConfigError(f"{held_out:g} of {len(self)} rows held out leaves nothing on one side; give more rows")
        return self.rows(order[count:].sort().values), self.rows(order[:count].sort().values)

    def answer_positions(self) -> Tensor | None:
        """Bool (rows, tokens): the tokens whose output is an answer. None where a row has one answer and no tokens.

        A language model answers at the token before the one that is labelled.
        """
        if self.task != CAUSAL_LM or self.labels is None:
            return None
        return shifted(self.labels) != IGNORED

    def fingerprint(self) -> str:
        """SHA-256 over everything that a teacher's answer depends on and the labels."""
        digest = hashlib.sha256(f"{self.task} {self.classes} {self.answers}".encode())
        labels = self.labels if isinstance(self.labels, Tensor | None) else None
        rows = [] if labels is not None or self.labels is None else self.labels
        tensors = [*sorted(self.inputs.items()), ("labels", labels), ("rationales", self.rationales)]
        tensors += [(f"{n}.{key}", value) for n, row in enumerate(rows) for key, value in sorted(row.items())]
        for name, value in tensors:
            if value is not None:
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            if value is not None and value.numel():  # an image without objects has boxes that cannot be viewed as bytes
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def shifted(labels: Tensor) -> Tensor:
    """Labels (rows, tokens) as the token before each of them has to answer; the last token answers nothing."""
    moved = torch.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved
