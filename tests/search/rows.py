"""Rows of tasks for the tiny models, drawn at random."""

from __future__ import annotations

import torch

from hf_qep.distill.samples import CAUSAL_LM, IGNORED, IMAGE_CLASSES, TEXT_CLASSES, TaskData
from tests.tiny_models import build_batch


def rows_for(family: str, count: int = 12, length: int = 10, seed: int = 0) -> TaskData:
    """Labelled rows that a tiny model of the family reads: answers are the last token, or one of its classes."""
    make = torch.Generator().manual_seed(seed + 1)
    inputs = build_batch(family, seed=seed, batch_size=count, length=length)
    if family == "vit":
        return TaskData(IMAGE_CLASSES, inputs, torch.randint(5, (count,), generator=make))
    if family == "bert_classifier":
        return TaskData(TEXT_CLASSES, inputs, torch.randint(3, (count,), generator=make))
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    inputs["input_ids"][:, -1] = torch.randint(5, 9, (count,), generator=make)
    labels[:, -1] = inputs["input_ids"][:, -1]
    return TaskData(CAUSAL_LM, inputs, labels)
