"""What a teacher says, put right by what is known: its confidence, its leanings, its mistakes.

All take log-probabilities (..., classes) and labels (...) int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.errors import ConfigError

PRIOR = 1.0
"""Rows' worth of belief that nothing needs to be put right, so that classes that can be told apart without an error do
not make the teacher infinitely sure."""
STEPS = 100


def corrected(log_p: Tensor, labels: Tensor, margin: float = 0.1, *, rest: bool = False) -> Tensor:
    """Log-probabilities in which the label is the likeliest class wherever it was not, (..., classes) float32.

    There p' = (1 - m) p + m onehot(y) with the least m that puts y ahead of every other class by `margin`, 0 to 1:
    m = (p_max - p_y + margin) / (1 + p_max - p_y). What p says about the other classes in relation to each other
    stays. rest: the last class is all others together: it gives mass like any, but no label needs to be ahead of it.
    The idea is that of arXiv 2506.15702; the formula is our own.
    """
    p = log_p.float().softmax(-1)
    single = p[..., :-1] if rest else p
    likeliest, of_label = single.max(-1).values, p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    wrong = single.argmax(-1) != labels
    share = torch.where(wrong, (likeliest - of_label + margin) / (1 + likeliest - of_label), 0.0).unsqueeze(-1)
    mixed = (1 - share) * p + share * F.one_hot(labels, p.shape[-1])
    return torch.where(wrong.unsqueeze(-1), mixed.clamp_min(torch.finfo(p.dtype).tiny).log(), log_p.float())


def reliability(log_p: Tensor, labels: Tensor, sharpness: float, least: float) -> Tensor:
    """Weight of what the teacher says, (...) float32 in 0 to 1: sigmoid(sharpness · (log p(y) - least)).

    least: log-probability of the label, in nats, at which the teacher counts by half.
    """
    of_label = log_p.float().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return torch.sigmoid(sharpness * (of_label - least))


@dataclass(frozen=True)
class Calibration:
    """log p' = log_softmax(log p / temperature + bias); bias: one value per class, in nats."""

    temperature: float
    bias: tuple[float, ...]

    def apply(self, log_p: Tensor) -> Tensor:
        """Calibrated log-probabilities, (..., classes) float32. Raises ConfigError for another number of classes."""
        if log_p.shape[-1] != len(self.bias):
            raise ConfigError(f"the calibration is for {len(self.bias)} classes, and the teacher has {log_p.shape[-1]}")
        bias = torch.tensor(self.bias, dtype=torch.float32, device=log_p.device)
        return (log_p.float() / self.temperature + bias).log_softmax(-1)


def fit_calibration(log_p: Tensor, labels: Tensor) -> Calibration:
    """Temperature and bias with the least negative log-likelihood of the labels, by L-BFGS in float64.

    log_p: (rows, classes), of rows that nothing else is judged by. labels: (rows,).
    Raises ConfigError if a class has no row: its bias would be a guess.
    """
    rows, classes = log_p.shape
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if missing:
        raise ConfigError(f"classes {missing} have no row among the {rows} to calibrate by; give more labelled rows")
    scores, labels = log_p.detach().double().cpu(), labels.cpu()
    values = torch.zeros(1 + classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([values], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = scores * torch.exp(-values[0]) + values[1:]
        total = F.cross_entropy(logits, labels) + PRIOR / (2 * rows) * values.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    found = values.detach()
    return Calibration(found[0].exp().item(), tuple((found[1:] - found[1:].mean()).tolist()))
