"""Distances between two distributions over classes, given as log-probabilities.

Teacher p and student q are (..., classes), of any float dtype and computed in float32; results are (...) nats, never
negative but for rounding, 0 where p = q. Every position stands for itself, so they can be taken in chunks.
Log-probabilities below FLOOR count as FLOOR: a class that one side rules out costs much, never infinitely much.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_qep.algorithms.distillation import TopClasses
from hf_qep.errors import UnknownNameError

FLOOR = -1e4


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q): the student covers all that the teacher holds possible."""
    log_p, log_q = _finite(log_p), _finite(log_q)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q ‖ p): the student stays within what the teacher holds likely."""
    return forward_kl(log_q, log_p)


def generalised_jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q, 0 < β < 1 (arXiv 2306.13649, equation 1).

    β = 0.5 is the Jensen-Shannon divergence, at most log 2.
    """
    middle = _mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, middle) + (1 - beta) * forward_kl(log_q, middle)


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p ‖ α p + (1 - α) q), 0 ≤ α < 1 (DistiLLM, arXiv 2402.03898, equation 4); at most -log α."""
    return forward_kl(log_p, _mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q ‖ (1 - α) p + α q), 0 ≤ α < 1 (DistiLLM, arXiv 2402.03898, section 3.1)."""
    return skew_kl(log_q, log_p, skew)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q|: a share of mass, 0 to 1, not nats."""
    return 0.5 * (_finite(log_p).exp() - _finite(log_q).exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "forward-kl": lambda log_p, log_q, beta, skew: forward_kl(log_p, log_q),
    "reverse-kl": lambda log_p, log_q, beta, skew: reverse_kl(log_p, log_q),
    "jsd": lambda log_p, log_q, beta, skew: generalised_jsd(log_p, log_q, beta),
    "skew-kl": lambda log_p, log_q, beta, skew: skew_kl(log_p, log_q, skew),
    "skew-reverse-kl": lambda log_p, log_q, beta, skew: skew_reverse_kl(log_p, log_q, skew),
    "tvd": lambda log_p, log_q, beta, skew: total_variation(log_p, log_q),
}
"""Name -> function of (log_p, log_q, beta, skew)."""


def divergence_called(name: str) -> Callable[[Tensor, Tensor, float, float], Tensor]:
    """The divergence of a name. Raises UnknownNameError with the known names and the nearest one."""
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    near = difflib.get_close_matches(str(name), DIVERGENCES, 1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise UnknownNameError(f"unknown divergence `{name}`; known: {', '.join(DIVERGENCES)}{hint}")


def tempered_divergence(
    name: str, log_p: Tensor, log_q: Tensor, *, temperature: float = 1.0, beta: float = 0.5, skew: float = 0.1
) -> Tensor:
    """T² D(p^(1/T) ‖ q^(1/T)), both sides normalised again, (...) float32.

    T² keeps the size of the gradient (arXiv 1503.02531, section 2).
    """
    p, q = ((_finite(x) / temperature).log_softmax(-1) for x in (log_p, log_q))
    return temperature**2 * divergence_called(name)(p, q, beta, skew)


def merged(teacher: TopClasses, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides over the classes that are kept of the teacher and, as the last one, all others together.

    log_q: log-probabilities of the student (..., classes). Returns two of (..., k + 1) float32, or (..., classes) where
    all classes are kept; the teacher's are normalised again, because they were rounded when they were written down.
    """
    log_p = teacher.log_p.float()
    if teacher.index is None:
        return log_p.log_softmax(-1), log_q.float()
    index, log_q = teacher.index.long(), log_q.float()
    log_p = torch.cat([log_p, teacher.rest.clamp_min(math.exp(-80)).log().unsqueeze(-1)], -1)
    others = log_q.scatter(-1, index, FLOOR).logsumexp(-1, keepdim=True)
    return log_p.log_softmax(-1), torch.cat([log_q.gather(-1, index), others], -1)


def _finite(log_p: Tensor) -> Tensor:
    return log_p.float().clamp_min(FLOOR)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Logarithm of share · p + (1 - share) · q."""
    if not share:
        return _finite(log_q)
    return torch.logaddexp(_finite(log_p) + math.log(share), _finite(log_q) + math.log1p(-share))
