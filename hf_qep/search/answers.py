"""What a model answers on rows of a task, and how much each token counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_qep.distill.said import answer_labels, answer_logits, answer_mask
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, TaskData
from hf_qep.errors import ConfigError


def answer_logits_of(output: Any, batch: dict[str, Any], data: TaskData) -> Tensor:
    """Logits of one batch's answers, (..., classes): a language model's (answers, classes), else as they come.

    output: of the model for `batch`. A language model answers at the tokens before those that are labelled, over the
    classes of `data.answers` if it has them; a detector at every query.
    """
    if data.task != CAUSAL_LM:
        return output.logits
    return answer_logits(output.logits, answer_mask(batch, data.answers is not None), data.answers)


def answer_labels_of(batch: dict[str, Any], data: TaskData) -> Tensor | None:
    """The right class of each answer, (answers,) int64, in the order of the logits; None where nothing is labelled.

    Raises ConfigError for a label that is none of the answers.
    """
    if data.task != CAUSAL_LM or not isinstance(batch.get("labels"), Tensor):
        return None if data.task == DETECTION else batch.get("labels")
    mask = answer_mask(batch, data.answers is not None)
    found = answer_labels(batch, mask, None)
    if data.answers is not None and not torch.isin(found, torch.tensor(data.answers, device=found.device)).all():
        raise ConfigError(f"a token that is labelled is none of the answers {data.answers}")
    return answer_labels(batch, mask, data.answers)


def token_weights(batch: dict[str, Any], data: TaskData, hidden: Tensor) -> Tensor:
    """How much each token of a layer counts, (rows, tokens) float32: padding nothing, all others the same.

    hidden: what the layer reads. Layers that do not see the tokens of the input, such as those of an image, count all.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.new_ones(hidden.shape[:2], dtype=torch.float32)
    return mask.to(hidden.device, torch.float32)


def answer_weights(batch: dict[str, Any], data: TaskData, hidden: Tensor) -> Tensor:
    """The same with the tokens that answer only; of models without such tokens the weights of `token_weights`."""
    weights = token_weights(batch, data, hidden)
    if data.task != CAUSAL_LM or weights.shape != batch["input_ids"].shape:
        return weights
    return answer_mask(batch, data.answers is not None).to(weights)
