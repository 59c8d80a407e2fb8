"""What a model is made of, as values: linears, groups that share an input, blocks in a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearRef:
    """One weight matrix of a model: a linear layer, or one slice of a 3-D parameter."""

    name: str
    """Qualified name of the module; of the parameter if it is a slice (`model.layers.0.mlp.experts.gate_up_proj`)."""
    expert: int | None
    """Slice of a 3-D parameter (experts, out, in), else None."""
    kind: Literal["linear", "conv1d", "expert"]
    """nn.Linear, transformers' Conv1D (its weight is stored (in, out)), or a slice."""
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def label(self) -> str:
        """Name for messages, with the slice."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass(frozen=True)
class Group:
    """Linears that read the same input tensor; for experts all slices of one parameter, each with tokens of its own."""

    linears: tuple[LinearRef, ...]
    exempt: str | None = None
    """Reason why error propagation is off for this group, or None."""
    strength: float = 1.0
    """Multiplies the propagation alpha of the user for this group."""


@dataclass(frozen=True)
class Block:
    """One member of the chain of blocks; its input is the output of the member before it."""

    name: str
    groups: tuple[Group, ...]
    """In order of execution."""
    outputs: int | None = None
    """Length of the tuple that the block returns, hidden state first; None if it returns the hidden state itself."""


@dataclass(frozen=True)
class Structure:
    """All that quantisation needs to know about a model."""

    family: str
    """`model_type` of the configuration."""
    blocks: tuple[Block, ...]
    skipped: dict[str, str]
    """Module (or 3-D parameter) that stays float -> reason. A subtree without blocks is one entry, by its root."""

    def linears(self) -> list[LinearRef]:
        """Every matrix to quantise, in order of execution."""
        return [ref for block in self.blocks for group in block.groups for ref in group.linears]
