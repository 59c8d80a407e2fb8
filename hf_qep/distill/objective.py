"""The loss of a batch, as a sum over its answers and the number of them, and what is measured of it.

Sums can be put together in any way: over the batches of an accumulated step, over processes. Where a term belongs to a
row and not to an answer (hidden states), it counts once for every answer of its row. Two terms know only the batch they
are in: the Hungarian loss of a detector, which is scaled by the objects of a batch, and the relation of embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.algorithms.calibrated import Calibration
from hf_qep.algorithms.distillation import TopClasses
from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.distill.hidden import Projections, last_hidden, row_relation, token_relation
from hf_qep.distill.losses import DistillLoss, class_loss, in_chunks, teacher_loss
from hf_qep.distill.said import (
    Said,
    answer_labels,
    answer_logits,
    answer_mask,
    embedding_of,
    forward_inputs,
    hidden_states,
)
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, IGNORED, shifted
from hf_qep.errors import ConfigError

BOX_WEIGHT = 5.0
"""Of the L1 distance of boxes, as in DETR's own loss (arXiv 2005.12872, appendix A.4)."""


@dataclass
class Objective:
    """The loss of one task.

    answers: as in TaskData. prototypes: (classes, width), what embeddings are compared to. calibration: of the teacher.
    projections: for hidden states, None if they are not compared. objects: classes of a detector without "no object".
    Raises ConfigError for a calibration where there is nothing to calibrate.
    """

    config: DistillLoss
    task: str
    answers: tuple[int, ...] | None = None
    prototypes: Tensor | None = None
    calibration: Calibration | None = None
    projections: Projections | None = None
    objects: int | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and self.task in (EMBEDDING, DETECTION):
            raise ConfigError(f"a calibration is for classes that rows or tokens have; {self.task} has none of them")

    def inputs(self, batch: Mapping[str, Any], *, judged: bool = False) -> dict[str, Any]:
        """Forward keyword arguments. judged: for a measurement, so that a detector computes its own loss."""
        inputs = forward_inputs(batch)
        if self.task == DETECTION and batch.get("labels") is not None and (judged or self.config.alpha):
            inputs["labels"] = batch["labels"]
        if self.config.needs_hidden and not judged:
            inputs["output_hidden_states"] = True
        return inputs

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Answers of a batch, a float32 scalar; a token of a rationale counts as much as its weight."""
        if self.task != CAUSAL_LM:
            rows = next(value for name, value in batch.items() if name != "labels")
            return torch.tensor(float(len(rows)), device=rows.device)
        count = answer_mask(batch, self.answers is not None).sum().float()
        reasons = _reasons(batch)
        return count if reasons is None else count + self.config.rationale * reasons.sum()

    def total(self, output: Any, batch: Mapping[str, Any], said: Said | None) -> Tensor:
        """Sum of the loss over the answers of a batch, a float32 scalar. output: of the student."""
        if self.task == CAUSAL_LM:
            return self._language(output, batch, said)
        if self.task == DETECTION:
            each = self._detection(output, batch, said)
        elif self.task == EMBEDDING:
            each = self._embedding(output, batch.get("labels"), said)
        else:
            each = class_loss(self.config, output.logits, batch.get("labels"), said and said.classes, self.calibration)
        return each.sum() + self._rows(output, batch, said).sum()

    def _language(self, output: Any, batch: Mapping[str, Any], said: Said | None) -> Tensor:
        mask = answer_mask(batch, self.answers is not None)
        labels = answer_labels(batch, mask, self.answers)
        logits = answer_logits(output.logits, mask, self.answers)
        total = class_loss(self.config, logits, labels, said and said.classes, self.calibration).sum()
        reasons = _reasons(batch)
        if reasons is not None and reasons.any():
            wanted, logits = shifted(batch["labels"])[reasons], output.logits[reasons]
            total = (
                total
                + self.config.rationale * in_chunks(lambda which: _nll(logits[which], wanted[which]), logits).sum()
            )
        return total + (self._rows(output, batch, said) * mask.sum(1)).sum()

    def _embedding(self, output: Any, labels: Tensor | None, said: Said | None) -> Tensor:
        ours = embedding_of(output).float()
        loss = torch.zeros(len(ours), device=ours.device)
        if said is not None:
            _check_width("teacher's embeddings", said.embedding, ours)
            loss = (1 - self.config.alpha) * (1 - F.cosine_similarity(ours, said.embedding, dim=-1))
        if self.prototypes is not None:
            classes = None if said is None else TopClasses(None, self._near(said.embedding).log_softmax(-1))
            loss = loss + class_loss(self.config, self._near(ours), labels, classes)
        if self.config.relation and said is not None:
            loss = loss + self.config.relation * row_relation(ours, said.embedding)
        return loss

    def _near(self, embedding: Tensor) -> Tensor:
        """Logits over the prototypes."""
        _check_width("prototypes", self.prototypes, embedding)
        bank = F.normalize(self.prototypes.to(embedding).float(), dim=-1)
        return F.normalize(embedding, dim=-1) @ bank.T / self.config.bank_temperature

    def _detection(self, output: Any, batch: Mapping[str, Any], said: Said | None) -> Tensor:
        loss = torch.zeros(len(output.logits), device=output.logits.device)
        if self.config.alpha:
            loss = loss + self.config.alpha * output.loss
        if said is None or self.config.alpha == 1:
            return loss
        if output.logits.shape[-1] != self.objects + 1:
            raise ConfigError("a detector needs a last class for no object, as DETR and YOLOS have; this one has none")
        each = teacher_loss(self.config, output.logits.float().log_softmax(-1), None, said.classes).mean(1)
        sees = said.log_p.argmax(-1) != said.log_p.shape[-1] - 1
        gap = (output.pred_boxes.float() - said.boxes.float()).abs().sum(-1)
        boxes = (gap * sees).sum(1) / sees.sum(1).clamp_min(1)
        return loss + (1 - self.config.alpha) * (each + BOX_WEIGHT * boxes)

    def _rows(self, output: Any, batch: Mapping[str, Any], said: Said | None) -> Tensor:
        """What hidden states add, (rows,)."""
        rows = torch.zeros(1, device=next(iter(output.values())).device)
        if not self.config.needs_hidden or said is None:
            return rows
        layers = hidden_states(output)
        mask = batch.get("attention_mask")
        mask = mask.bool() if mask is not None and mask.shape == layers[-1].shape[:2] else None
        if self.config.hidden:
            rows = rows + self.config.hidden * self.projections(layers, said, mask)
        if self.config.relation and self.task != EMBEDDING:
            rows = rows + self.config.relation * token_relation(layers[-1], last_hidden(said), mask)
        return rows

    def measure(self, output: Any, batch: Mapping[str, Any], said: Said | None) -> tuple[Tensor, Tensor]:
        """What `metrics` needs of a batch, (rows, places, 4) float32, and which of it counts, (rows, places) int64.

        The values are the loss, -log p of the label in nats, 1 if the answer is right, and log p(1) - log p(0) where
        there are two classes; NaN where there is no such thing. Places with the label IGNORED do not count. The loss
        is what is learnt from labels and answers, without hidden states; that of the labels alone where nothing is
        said about the batch, the distance to the teacher where it has no labels.
        """
        labels = batch.get("labels")
        if not self.judges(batch):
            return _everywhere(self._judgement(output, batch, said, alpha=0.0), batch)
        if self.task == DETECTION:
            return _everywhere(output.loss, batch)
        if self.task == CAUSAL_LM:
            mask = answer_mask(batch, self.answers is not None)
            found, places = torch.zeros(*mask.shape, 4, device=mask.device), torch.full_like(labels, IGNORED)
            places[mask] = answer_labels(batch, mask, self.answers)
            found[mask] = _judged(answer_logits(output.logits, mask, self.answers), places[mask])
        else:
            logits = self._near(embedding_of(output).float()) if self.task == EMBEDDING else output.logits
            found, places = _judged(logits, labels.clamp_min(0)).unsqueeze(1), labels.unsqueeze(1)
        if said is not None:
            found[..., 0] = self._judgement(output, batch, said, self.config.alpha)
        return found, places

    def _judgement(self, output: Any, batch: Mapping[str, Any], said: Said | None, alpha: float) -> Tensor:
        """Mean loss per answer without hidden states, a scalar."""
        alone = replace(self, config=replace(self.config, alpha=alpha, hidden=0.0, relation=0.0), projections=None)
        return alone.total(output, batch, said) / alone.count(batch)

    def judges(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch can be measured by its labels, without a teacher."""
        known = batch.get("labels") is not None
        return known and (self.task != EMBEDDING or self.prototypes is not None)


def metrics(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Means over the places that count: `loss`, and where they are known `nll`, `accuracy` and, of two classes, `auc`.

    found: (rows, places, 4), labels: (rows, places), see `Objective.measure`.
    """
    counts = labels != IGNORED
    loss, nll, right, margin = found[counts].astype(np.float64).T
    values = {"loss": float(loss.mean())}
    if not np.isnan(right).any():
        values |= {"nll": float(nll.mean()), "accuracy": float(right.mean())}
        if not np.isnan(margin).any():
            values["auc"] = area_under_curve(margin, labels[counts] == 1)
    return values


def _everywhere(loss: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """One loss as that of every row."""
    rows = len(next(iter(forward_inputs(batch).values())))
    found = torch.full((rows, 1, 4), torch.nan, device=loss.device)
    found[..., 0] = loss.detach().float()
    return found, torch.zeros(rows, 1, dtype=torch.int64, device=loss.device)


def _judged(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, which is that of the labels, the same again, whether right, margin of two classes: (answers, 4)."""

    def part(which: slice) -> Tensor:
        log_q = logits[which].float().log_softmax(-1)
        nll = F.nll_loss(log_q, labels[which], reduction="none")
        right = (log_q.argmax(-1) == labels[which]).float()
        two = log_q.shape[-1] == 2
        margin = log_q[:, 1] - log_q[:, 0] if two else torch.full_like(nll, torch.nan)
        return torch.stack([nll, nll, right, margin], -1)

    return in_chunks(part, logits)


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.float().log_softmax(-1), labels, reduction="none")


def _check_width(what: str, found: Tensor, ours: Tensor) -> None:
    if found.shape[-1] != ours.shape[-1]:
        raise ConfigError(
            f"the {what} have width {found.shape[-1]} and the student's {ours.shape[-1]}; make them equal"
        )


def _reasons(batch: Mapping[str, Any]) -> Tensor | None:
    """Bool (rows, tokens): where the output is a token of a rationale; None if the batch says nothing of them."""
    told = batch.get("rationales")
    if told is None or batch.get("labels") is None:
        return None
    return (shifted(batch["labels"]) != IGNORED) & told.unsqueeze(1)
