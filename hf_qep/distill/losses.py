"""What a student is trained for: its labels, and what its teacher says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_qep.algorithms.calibrated import Calibration, corrected, reliability
from hf_qep.algorithms.distillation import TopClasses
from hf_qep.algorithms.divergences import divergence_called, merged, tempered_divergence
from hf_qep.distill.samples import IGNORED
from hf_qep.errors import ConfigError

CHUNK = 1024
"""Answers whose float32 log-probabilities are held at once."""
WIDE = 4096
"""Classes from which on that matters."""


@dataclass(frozen=True)
class DistillLoss:
    """alpha · CE(y) + (1 - alpha) · D(teacher, student) + hidden · H + relation · R, per answer.

    alpha: share of the labels, 0 to 1; 1 asks no teacher. divergence: one of `divergences.DIVERGENCES`; beta, skew:
    their parameters. temperature: of both sides in D. label_correction: where labels are known, a teacher that is wrong
    says the label with a `margin` ahead (`calibrated.corrected`). reliability: 0, or how sharply D fades where the
    teacher gives the label less than `least` nats. hidden: weight of 1 - cos of the hidden states, relation: of how
    rows or tokens lie to each other. rationale: weight of a token of a rationale, where an answer has 1. layer_map:
    teacher's hidden state, 0 for its inputs, that each layer of the student is compared to; None: at equal depth.
    bank_temperature: of the cosines to the prototypes of an embedding task.
    """

    alpha: float = 0.5
    divergence: str = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    label_correction: bool = True
    margin: float = 0.1
    reliability: float = 0.0
    least: float = -math.log(2)
    hidden: float = 0.0
    relation: float = 0.0
    rationale: float = 0.5
    layer_map: tuple[int, ...] | None = None
    bank_temperature: float = 0.05

    def __post_init__(self) -> None:
        divergence_called(self.divergence)
        if self.layer_map is not None:
            object.__setattr__(self, "layer_map", tuple(self.layer_map))
        for name, (low, high, text) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"`{name}` of the loss must be {text}, not {value!r}")
        if not isinstance(self.label_correction, bool):
            raise ConfigError(f"`label_correction` of the loss is true or false, not {self.label_correction!r}")

    @property
    def asks(self) -> bool:
        """Whether a teacher is needed."""
        return self.alpha < 1 or self.needs_hidden

    @property
    def needs_hidden(self) -> bool:
        """Whether hidden states, or embeddings, are compared."""
        return self.hidden > 0 or self.relation > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON value; `from_dict` reads it."""
        return asdict(self) | {"layer_map": None if self.layer_map is None else list(self.layer_map)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillLoss:
        """Inverse of `to_dict`. Raises ConfigError for unknown or impossible values."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"this is no description of a loss: {error}") from error


_LEAST, _MOST = 1e-6, math.inf
_RANGES = {
    "alpha": (0, 1, "0 to 1"),
    "temperature": (_LEAST, 1e6, "above 0"),
    "beta": (_LEAST, 1 - _LEAST, "between 0 and 1"),
    "skew": (0, 1 - _LEAST, "at least 0 and below 1"),
    "margin": (_LEAST, 1 - _LEAST, "between 0 and 1"),
    "reliability": (0, 1e6, "at least 0"),
    "least": (-1e4, 0, "at most 0 nats"),
    "hidden": (0, 1e6, "at least 0"),
    "relation": (0, 1e6, "at least 0"),
    "rationale": (0, 1e6, "at least 0"),
    "bank_temperature": (_LEAST, 1e6, "above 0"),
}


def class_loss(
    config: DistillLoss,
    logits: Tensor,
    labels: Tensor | None,
    said: TopClasses | None,
    calibration: Calibration | None = None,
) -> Tensor:
    """alpha · CE + (1 - alpha) · D of every answer, (answers,) float32 nats.

    logits: of the student (answers, classes). labels: (answers,) int64; where they are IGNORED only D counts, and with
    None only D counts everywhere. said: of the teacher; None leaves D out. calibration: applied to the teacher first.
    """

    def part(which: slice) -> Tensor:
        ours, known = logits[which].float().log_softmax(-1), None if labels is None else labels[which]
        loss = torch.zeros(len(ours), device=ours.device)
        if known is not None and config.alpha:
            loss = config.alpha * F.nll_loss(ours, known, ignore_index=IGNORED, reduction="none")
        if said is not None and config.alpha < 1:
            index = None if said.index is None else said.index[which]
            theirs = TopClasses(index, said.log_p[which])
            loss = loss + (1 - config.alpha) * teacher_loss(config, ours, known, theirs, calibration)
        return loss

    return in_chunks(part, logits)


def teacher_loss(
    config: DistillLoss,
    log_q: Tensor,
    labels: Tensor | None,
    said: TopClasses,
    calibration: Calibration | None = None,
) -> Tensor:
    """D of every answer, (answers,) float32, to the teacher as it is put right by calibration and labels."""
    log_p, log_q = merged(said, log_q)
    if calibration is not None:
        log_p = calibration.apply(log_p)
    weight: Tensor | float = 1.0
    if labels is not None:
        known, place = labels != IGNORED, _places(said, labels)
        if config.reliability:
            trust = reliability(log_p, place, config.reliability, config.least)
            weight = torch.where(known, trust, 1.0)
        if config.label_correction:
            right = corrected(log_p, place, config.margin, rest=said.index is not None)
            log_p = torch.where(known.unsqueeze(-1), right, log_p)
    options = {"temperature": config.temperature, "beta": config.beta, "skew": config.skew}
    return weight * tempered_divergence(config.divergence, log_p, log_q, **options)


def in_chunks(function: Callable[[slice], Tensor], logits: Tensor) -> Tensor:
    """`function` of all rows of logits (answers, classes), a part of them at a time where there are many classes.

    The intermediate values of a part are computed again for its gradient instead of being held.
    """
    if len(logits) <= CHUNK or logits.shape[-1] < WIDE:
        return function(slice(None))
    parts = [slice(start, start + CHUNK) for start in range(0, len(logits), CHUNK)]
    return torch.cat([checkpoint(function, which, use_reentrant=False) for which in parts])


def _places(said: TopClasses, labels: Tensor) -> Tensor:
    """Where the labels stand among the classes that are kept. Raises ConfigError if one was not kept."""
    if said.index is None:
        return labels.clamp_min(0)
    found = said.index == labels.clamp_min(0).unsqueeze(-1)
    if not (found.any(-1) | (labels == IGNORED)).all():
        raise ConfigError("what the teacher said about some labels was not kept; it was asked about rows with others")
    return found.int().argmax(-1)
