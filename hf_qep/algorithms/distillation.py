"""Kullback-Leibler divergence to a teacher of whom only the likeliest classes are kept.

    KL(p ‖ q) ≥ Σ_{i in top k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

The rest is one class of its own, so the bound is that of the merged distribution: zero only if the top k agree, and its
gradient never asks for mass outside them. k classes instead of all make the teacher of a whole calibration set fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-6


@dataclass(frozen=True)
class TopClasses:
    """What is kept of a teacher's output."""

    index: Tensor
    """(..., k) int32, the likeliest classes"""
    log_p: Tensor
    """(..., k) float32, their log-probabilities"""

    @property
    def rest(self) -> Tensor:
        """(...) float32, mass of all other classes."""
        return (1 - self.log_p.exp().sum(-1)).clamp_min(0)


def top_classes(logits: Tensor, k: int) -> TopClasses:
    """The k likeliest classes of logits (..., classes), fewer if there are fewer."""
    log_p, index = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), -1)
    return TopClasses(index.int(), log_p)


def divergence(teacher: TopClasses, logits: Tensor) -> Tensor:
    """The bound above in nats, (...) float32, for the logits (..., classes) of a student."""
    log_q = logits.float().log_softmax(-1).gather(-1, teacher.index.long())
    p, rest = teacher.log_p.exp(), teacher.rest
    q_rest = (1 - log_q.exp().sum(-1)).clamp_min(_TINY)
    merged = torch.where(rest > _TINY, rest * (rest.clamp_min(_TINY) / q_rest).log(), 0.0)
    return (p * (teacher.log_p - log_q)).sum(-1) + merged
