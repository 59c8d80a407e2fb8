"""A packed model made trainable, and packed again.

Linears get float32 latents and logarithms of scales (TunedLinear) or, if their signs shall stay, float32 scales. Norms
and biases train as they are: put the model in float32 first, whatever it is stored in, and let the trainer's mixed
precision choose what it computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_qep.distill.tuned_linear import TunedLinear, share_of_flips
from hf_qep.modules import PackedTensors, QepLinear, packed_modules, replace_module

SIGN_RATE, FACTOR_RATE, SCALE_RATE = 0.64, 1e-2, 3e-3
"""Adam's steps: of latents in units of their scale, divided by the inputs that a row sums over, as in the maximal
update parametrisation (arXiv 2203.03466): the wider a layer, the more of its signs turn by chance. Of latents of two
matrices whose product is the weight: as it is (0.158 instead of 0.184 on the bundled model). Of everything else
relative to its size."""
BETAS = (0.9, 0.95)
HELD_OUT = 8
"""One row, or batch, in so many is not trained on."""


class Trainable:
    """What of a packed model trains.

    model: packed and float32; changed until `finish`. latents: linear -> latents of its sign matrices (see
    `tuned_linear.latents_of`); signs of linears that it does not name stay as they are, and only their scales train.
    Use it inside `nothing_else_trains`.
    """

    def __init__(self, model: nn.Module, latents: Mapping[str, dict[str, Tensor]]) -> None:
        self.model, self.start, packed = model, latents, packed_modules(model)
        signed = {name: m for name, m in packed.items() if isinstance(m, QepLinear) and name in latents}
        self.linears = {name: TunedLinear(module, latents[name]) for name, module in signed.items()}
        self.scaled = [m for name, m in packed.items() if name not in self.linears and _has_scales(m)]
        self.vectors = vectors(model)
        for vector in self.vectors:
            vector.requires_grad_(True)
        for module in self.scaled:
            module.train_scales()
        for name, module in self.linears.items():
            replace_module(model, name, module)

    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for an optimiser, each with its rate."""
        groups: list[dict[str, Any]] = []
        for module in self.linears.values():
            rate = SIGN_RATE / module.in_features if len(module.latents) == 1 else FACTOR_RATE
            groups.append({"params": list(module.latents.values()), "lr": rate})
            groups.append({"params": list(module.scales.values()), "lr": SCALE_RATE})
        biases = [m.bias for m in self.linears.values() if m.bias is not None]
        scales = [p for m in self.scaled for p in m.parameters() if p.requires_grad]
        return groups + [{"params": [p], "lr": SCALE_RATE * typical_size(p)} for p in (*scales, *biases, *self.vectors)]

    def parameters(self) -> list[nn.Parameter]:
        """All that trains, in a fixed order."""
        return [p for group in self.groups() for p in group["params"]]

    def flips(self) -> float:
        """Share of the signs that are not as at the start; 0 if none trains."""
        return share_of_flips(self.linears, self.start)

    @torch.no_grad()
    def finish(self) -> None:
        """Pack what was trained, as it is stored, and put the packed modules back."""
        for name, module in self.linears.items():
            replace_module(self.model, name, module.packed())
        for module in self.scaled:
            for name, tensor in module.packed_state().items():
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def nothing_else_trains(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the body runs, but those that it sets; all are as before afterwards."""
    before = [p for p in model.parameters() if p.requires_grad]
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in before:
            parameter.requires_grad_(True)


def vectors(module: nn.Module) -> list[nn.Parameter]:
    """Vectors that belong to no packed module: weights and biases of norms, biases of float linears."""
    owners = [m for m in module.modules() if not isinstance(m, TunedLinear | PackedTensors)]
    own = [p for m in owners for p in m.parameters(recurse=False)]
    return list({id(p): p for p in own if p.ndim == 1 and p.is_floating_point()}.values())


def _has_scales(module: PackedTensors) -> bool:
    return any(tensor.is_floating_point() for tensor in module.tensors().values())


def typical_size(parameter: Tensor) -> float:
    """Root of the mean square; 1 if all are 0. What the step of a parameter is relative to."""
    return parameter.detach().square().mean().sqrt().item() or 1.0
