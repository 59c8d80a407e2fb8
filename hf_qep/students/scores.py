"""How much each unit of a teacher is worth: what decides which units a student keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_qep.students.spec import TeacherShape


@dataclass(frozen=True)
class UnitScores:
    """Scores of a teacher's units, higher is better; only their order within one layer matters.

    heads: per stack, per layer (heads,) float32, query heads in the order of the weight; a key-value head is worth the
    sum of its query heads. ffn: per stack, per layer (intermediate_size,). hidden: (hidden_size,), channels of the
    residual stream.
    """

    heads: tuple[tuple[Tensor, ...], ...]
    ffn: tuple[tuple[Tensor, ...], ...]
    hidden: Tensor

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a file; `from_state` reads them."""
        named = {"hidden": self.hidden}
        for kind in ("heads", "ffn"):
            for stack, layers in enumerate(getattr(self, kind)):
                named |= {f"{kind}.{stack}.{layer}": scores for layer, scores in enumerate(layers)}
        return named

    @classmethod
    def from_state(cls, state: dict[str, Tensor], shape: TeacherShape) -> UnitScores:
        """Inverse of `state` for a teacher of this shape. Raises KeyError where a tensor is missing."""
        stacks = dict(shape.identity().stacks())
        parts: dict[str, Any] = {
            kind: tuple(tuple(state[f"{kind}.{s}.{i}"] for i in range(len(layers))) for s, layers in stacks.items())
            for kind in ("heads", "ffn")
        }
        return cls(**parts, hidden=state["hidden"])

    @classmethod
    def first_units(cls, shape: TeacherShape) -> UnitScores:
        """Scores that keep the first units: for shapes whose weights do not matter, and as the plainest baseline."""

        def falling(count: int) -> Tensor:
            return torch.arange(count, 0, -1, dtype=torch.float32)

        stacks = [layers for _, layers in shape.identity().stacks()]
        heads = tuple(tuple(falling(layer.heads) for layer in layers) for layers in stacks)
        ffn = tuple(tuple(falling(layer.intermediate_size) for layer in layers) for layers in stacks)
        return cls(heads, ffn, falling(shape.hidden_size))
