"""How much an error in the output of each linear costs the model, by its Fisher information.

    KL(float model || model with errors d) ~ 1/2 sum over tokens t and outputs i of g_ti^2 d_ti^2

g is the gradient of the log-likelihood of labels drawn from the model's own prediction.  Unlike an error relative to
the layer's output this can be compared between layers: a key of little consequence and a value that everything depends
on may have the same relative error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.architectures.access import get_weight
from hf_qep.architectures.observe import LinearObserver, collect_outputs
from hf_qep.architectures.parts import LinearRef
from hf_qep.engine.seeds import derived_seed


@dataclass
class Sensitivity:
    """Of one linear; both are 0 for an expert that no token reached."""

    outputs: Tensor
    """(out,) float32: sum over tokens of g^2, per place where the model predicts."""
    tokens: list[Tensor]
    """One per batch, (tokens,) float32: sum over outputs of g^2, in the order in which the linear sees the tokens."""


def output_sensitivity(
    model: Any, refs: Sequence[LinearRef], batches: Sequence[dict[str, Tensor]], seed: int
) -> dict[LinearRef, Sensitivity]:
    """One forward and backward pass per batch; the model is not changed. batches: inputs of the model."""
    weights = {ref: get_weight(model, ref) for ref in refs}
    found = {ref: Sensitivity(torch.zeros(ref.out_features), []) for ref in refs}
    places = 0
    for number, batch in enumerate(batches):
        outputs: dict[LinearRef, Tensor] = {}
        generator = torch.Generator().manual_seed(derived_seed("sensitivity", seed, number))
        with torch.enable_grad(), LinearObserver(weights, lambda ref, x: None, on_output=collect_outputs(outputs)):
            output = model(**{key: value.to(model.device) for key, value in batch.items()})
            loss, count = drawn_loss(output, batch.get("attention_mask"), generator)
            gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
        places += count
        for ref in refs:
            found[ref].tokens.append(torch.zeros(0))
        for ref, gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                squares = gradient.detach().float().reshape(-1, ref.out_features).square().cpu()
                found[ref].outputs += squares.sum(0)
                found[ref].tokens[-1] = squares.sum(1)
    for one in found.values():
        one.outputs /= max(places, 1)
    return found


def drawn_loss(output: Any, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """A loss whose gradients' second moment is the Fisher information of the output, and the number of its terms.

    Logits: minus log-likelihood of labels drawn from them. Hidden states: the product with Gaussian noise, each token
    in units of its size, so that the second moment is that of half its relative squared error.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        hidden = output[0].float()
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        size = hidden.detach().square().sum(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        each = (hidden * noise).sum(-1) / size
    else:
        rows = logits.float().reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
        each = F.cross_entropy(rows, drawn.to(rows.device), reduction="none").reshape(logits.shape[:-1])
    if mask is None or mask.shape != each.shape:
        return each.sum(), each.numel()
    mask = mask.to(each.device)
    return (each * mask).sum(), int(mask.sum())
