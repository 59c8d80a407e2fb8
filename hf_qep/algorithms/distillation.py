"""Distance to a teacher of whom only the likeliest classes, or all, are kept.

    KL(p ‖ q) ≥ Σ_{i in top k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

The rest is one class of its own, so the bound is that of the merged distribution: zero only if the top k agree, and its
gradient never asks for mass outside them. k classes instead of all make the teacher of a whole calibration set fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-6
NORM_EPS = 1e-6
"""As in the norms of transformers: keeps what is relative to a token's size finite where the token is zero."""


@dataclass(frozen=True)
class TopClasses:
    """What is kept of a teacher's output."""

    index: Tensor | None
    """(..., k) int32, the likeliest classes; None if all are kept, in order"""
    log_p: Tensor
    """(..., k) float16, their log-probabilities"""

    @property
    def rest(self) -> Tensor:
        """(...) float32, mass of all other classes."""
        if self.index is None:
            return torch.zeros(self.log_p.shape[:-1], device=self.log_p.device)
        return (1 - self.log_p.float().exp().sum(-1)).clamp_min(0)

    def to(self, device: torch.device) -> TopClasses:
        """The same on another device."""
        return TopClasses(None if self.index is None else self.index.to(device), self.log_p.to(device))


def top_classes(logits: Tensor, k: int, keep: Tensor | None = None) -> TopClasses:
    """The k likeliest classes of logits (..., classes), or all if there are no more.

    keep: (...) int64, a class that takes the place of the last of the k if it is not among them; below 0 for none.
    Rounding to float16 (relative 2^-11) never makes another class the likeliest, or as likely.
    """
    log_p, index, best = logits.float().log_softmax(-1), None, logits.argmax(-1, keepdim=True)
    if k < logits.shape[-1]:
        index = log_p.topk(k, -1).indices
        if keep is not None:
            missing = (keep >= 0) & (index != keep.unsqueeze(-1)).all(-1)
            index[..., -1] = torch.where(missing, keep, index[..., -1])
        log_p, best = log_p.gather(-1, index), torch.zeros_like(best)  # topk sorts
    return TopClasses(None if index is None else index.int(), _rounded(log_p, best))


def _rounded(log_p: Tensor, best: Tensor) -> Tensor:
    half = log_p.half()
    tied = (half >= half.gather(-1, best)).scatter(-1, best, False)
    return torch.where(tied, half * (1 + 2.0**-10), half)


def divergence(teacher: TopClasses, logits: Tensor) -> Tensor:
    """The bound above in nats, (...) float32, for the logits (..., classes) of a student."""
    log_q, log_p = logits.float().log_softmax(-1), teacher.log_p.float()
    p = log_p.exp()
    if teacher.index is None:
        return (p * (log_p - log_q)).sum(-1)
    log_q, rest = log_q.gather(-1, teacher.index.long()), teacher.rest
    q_rest = (1 - log_q.exp().sum(-1)).clamp_min(_TINY)
    merged = torch.where(rest > _TINY, rest * (rest.clamp_min(_TINY) / q_rest).log(), 0.0)
    return (p * (log_p - log_q)).sum(-1) + merged


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of each token in units of the token's mean square, (...) float32, for outputs (..., width)."""
    wanted = wanted.float()
    return (found.float() - wanted).square().mean(-1) / (wanted.square().mean(-1) + NORM_EPS)
