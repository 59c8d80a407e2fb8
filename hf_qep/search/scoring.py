"""How well a model does a task, item by item, so that two models can be compared on the same items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.architectures.skeleton import forward_only
from hf_qep.distill.said import forward_inputs
from hf_qep.distill.samples import TaskData
from hf_qep.errors import ConfigError
from hf_qep.search.answers import answer_labels_of, answer_logits_of


@dataclass(frozen=True)
class Scores:
    """What a model is worth on labelled rows.

    nll: (answers,) float32, negative log-likelihood of each right answer in nats. correct: (answers,) bool. auc: area
    under the ROC curve where there are two classes and both occur, else None. chance: accuracy of always giving the
    commonest answer.
    """

    nll: Tensor
    correct: Tensor
    auc: float | None
    chance: float

    def summary(self) -> dict[str, float | int | None]:
        """JSON value: means and their standard errors."""
        n = len(self.nll)

        def error(values: Tensor) -> float | None:
            return values.float().std().item() / n**0.5 if n > 1 else None

        return {
            "answers": n,
            "nll": self.nll.mean().item(),
            "nll_stderr": error(self.nll),
            "accuracy": self.correct.float().mean().item(),
            "accuracy_stderr": error(self.correct),
            "auc": self.auc,
            "majority": self.chance,
        }


@torch.no_grad()
def score(model: PreTrainedModel, data: TaskData, batch_size: int = 32) -> Scores:
    """Score a model on labelled rows. Raises ConfigError where there are no classes to be right about."""
    nlls, rights, labels_seen, margins = [], [], [], []
    with forward_only(model):
        for batch in data.batches(batch_size, model.device):
            labels = answer_labels_of(batch, data)
            if labels is None:
                raise ConfigError(f"rows of {data.task} without class labels cannot be scored item by item")
            logits = answer_logits_of(model(**forward_inputs(batch)), batch, data).float()
            nlls.append(F.cross_entropy(logits, labels, reduction="none").cpu())
            rights.append((logits.argmax(-1) == labels).cpu())
            labels_seen.append(labels.cpu())
            if logits.shape[-1] == 2:
                margins.append((logits[:, 1] - logits[:, 0]).cpu())
    labels = torch.cat(labels_seen)
    both = bool(margins) and 0 < int(labels.sum()) < len(labels)
    auc = area_under_curve(torch.cat(margins).numpy(), labels.numpy()) if both else None
    most = labels.bincount().max().item() / len(labels)
    return Scores(torch.cat(nlls), torch.cat(rights), None if auc is None else float(auc), most)
