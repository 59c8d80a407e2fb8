"""How well a model does a task, item by item, so that two models can be compared on the same items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.architectures.skeleton import forward_only
from hf_qep.distill.said import Said, embedding_of, forward_inputs
from hf_qep.distill.samples import DETECTION, EMBEDDING, IGNORED, TaskData
from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Progress
from hf_qep.search.answers import answer_labels_of, answer_logits_of
from hf_qep.search.recognition import can_recognise, episodes, recognised

SAID_BATCH = 1024
"""Rows whose labels are looked up at once."""


@dataclass(frozen=True)
class Scores:
    """What a model is worth on labelled rows.

    nll: (answers,) float32, negative log-likelihood of each right answer in nats, None where a model gives no
    probabilities: an embedding is nearer or farther, and no temperature makes that a likelihood. correct: (answers,)
    bool. auc: area under the ROC curve where there are two classes and both occur, else None. auc_stderr: its standard
    error. chance: accuracy of always giving the commonest answer, or of guessing among the classes of an embedding.
    scored: what is asked, in words, where it is not the class of each row.
    """

    nll: Tensor | None
    correct: Tensor
    auc: float | None
    auc_stderr: float | None
    chance: float
    scored: str | None = None

    def summary(self) -> dict[str, float | int | str | None]:
        """JSON value: means and their standard errors, None for those of a single answer and for what is not known;
        `scored` only where it is not the class of each row."""
        n = len(self.correct)

        def error(values: Tensor | None) -> float | None:
            return values.float().std().item() / n**0.5 if values is not None and n > 1 else None

        told = {} if self.scored is None else {"scored": self.scored}
        return told | {
            "answers": n,
            "nll": None if self.nll is None else self.nll.mean().item(),
            "nll_stderr": error(self.nll),
            "accuracy": self.correct.float().mean().item(),
            "accuracy_stderr": error(self.correct),
            "auc": self.auc,
            "auc_stderr": self.auc_stderr,
            "majority": self.chance,
        }


def can_score(data: TaskData) -> bool:
    """Whether there are rows with one right class each, or tokens with one right successor each; for an embedding,
    whether there are two classes and two rows of one of them."""
    if data.task == DETECTION or data.labels is None:
        return False
    return data.task != EMBEDDING or can_recognise(data.labels)


@torch.no_grad()
def score(model: PreTrainedModel, data: TaskData, batch_size: int = 32, *, progress: Progress = SILENT) -> Scores:
    """Score a model on labelled rows, those with the label IGNORED left out; an embedding by one-shot recognition.

    Raises ConfigError where there are no classes to be right about.
    """
    if not can_score(data):
        raise ConfigError(f"rows of {data.task} without class labels cannot be scored item by item")
    if data.task == EMBEDDING:
        return _recognition(_embeddings(model, data, batch_size, progress), data.labels)
    nlls, rights, known, margins = [], [], [], []
    batches = -(-len(data) // batch_size)
    with forward_only(model), progress.bar("scoring", batches, "batch") as bar:
        for batch in data.batches(batch_size, model.device):
            labels = answer_labels_of(batch, data)
            logits = answer_logits_of(model(**forward_inputs(batch)), batch, data).float()
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
            nlls.append(F.cross_entropy(logits, labels, reduction="none").cpu())
            rights.append((logits.argmax(-1) == labels).cpu())
            known.append(labels.cpu())
            if logits.shape[-1] == 2:
                margins.append((logits[:, 1] - logits[:, 0]).cpu())
            bar.advance()
    return _scores(torch.cat(nlls), torch.cat(rights), torch.cat(known), margins)


def score_said(said: Said, data: TaskData) -> Scores:
    """The same for what a teacher said about labelled rows, without asking it again.

    said: with all classes, or embeddings. Raises ConfigError where only the likeliest classes were kept, and as `score`
    does.
    """
    if data.task == EMBEDDING and can_score(data) and said.embedding is not None:
        return _recognition(said.embedding, data.labels)
    if not can_score(data) or said.log_p is None or said.index is not None:
        raise ConfigError(f"rows of {data.task} are scored by what was said about all classes, and labels")
    labels = torch.cat([answer_labels_of(batch, data) for batch in data.batches(SAID_BATCH)])
    log_p = said.log_p.float().log_softmax(-1)[labels != IGNORED]
    labels = labels[labels != IGNORED]
    margins = [log_p[:, 1] - log_p[:, 0]] if log_p.shape[-1] == 2 else []
    return _scores(F.nll_loss(log_p, labels, reduction="none"), log_p.argmax(-1) == labels, labels, margins)


def _embeddings(model: PreTrainedModel, data: TaskData, batch_size: int, progress: Progress) -> Tensor:
    """Embeddings of all rows, (rows, width) float32."""
    parts, batches = [], -(-len(data) // batch_size)
    with forward_only(model), progress.bar("scoring", batches, "batch") as bar:
        for batch in data.batches(batch_size, model.device):
            parts.append(embedding_of(model(**forward_inputs(batch))).float().cpu())
            bar.advance()
    return torch.cat(parts)


def _recognition(embeddings: Tensor, labels: Tensor) -> Scores:
    """labels: (rows,) int64. The questions are the same for every model."""
    asked = episodes(labels)
    return Scores(None, recognised(embeddings, asked), None, None, 1 / asked.ways, asked.described())


def _scores(nll: Tensor, correct: Tensor, labels: Tensor, margins: list[Tensor]) -> Scores:
    """margins: of the second class over the first, where there are two."""
    if not len(labels):
        raise ConfigError("no row has a label, so nothing can be scored")
    ones = int(labels.sum())
    auc = error = None
    if margins and 0 < ones < len(labels):
        auc = float(area_under_curve(torch.cat(margins).numpy(), labels.numpy()))
        error = auc_error(auc, ones, len(labels) - ones)
    most = labels.bincount().max().item() / len(labels)
    return Scores(nll, correct, auc, error, most)


def auc_error(auc: float, ones: int, zeros: int) -> float:
    """Standard error of an area under the ROC curve of so many rows of either class (Hanley and McNeil 1982, eq. 2)."""
    both_ones, both_zeros = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (ones - 1) * (both_ones - auc**2) + (zeros - 1) * (both_zeros - auc**2)
    return max(variance / (ones * zeros), 0.0) ** 0.5
