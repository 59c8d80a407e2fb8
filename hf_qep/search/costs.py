"""What a student costs before it exists: memory by a model, latency by a table, parameters by a count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_qep.errors import ConfigError
from hf_qep.search.limits import Workload
from hf_qep.students.spec import ATTENTION, MLP, CandidateSpec, TeacherShape

MEGABYTE = 10**6
BLOCKS, EMBEDDINGS, REST = "blocks", "embeddings", "rest"
PARTS = (BLOCKS, EMBEDDINGS, REST)
"""Linear weights of the blocks, which can be quantised; embeddings and output head; everything else."""
SLIDING = "sliding_attention"
_LOGIT_BYTES = 4
"""Logits are computed in float32."""


@dataclass(frozen=True)
class Choice:
    """A student and how its blocks are stored: in `bits` per weight, or unquantised (None)."""

    spec: CandidateSpec
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not 0 < self.bits <= 16:
            raise ConfigError(f"bits per weight must be above 0 and at most 16, not {self.bits}")

    def key(self) -> str:
        """The key of the specification, with the bits where there are any: equal for equal choices only."""
        return self.spec.key() + ("" if self.bits is None else f"-{self.bits:g}b")

    def __str__(self) -> str:
        layers = " + ".join(str(len(stack)) for _, stack in self.spec.stacks())
        bits = "" if self.bits is None else f", {self.bits:g} bits"
        return f"{self.key()[:8]} ({layers} layers, hidden {self.spec.hidden_size}{bits})"

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return {"spec": self.spec.to_dict(), "bits": self.bits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choice:
        """Inverse of `to_dict`. Raises ConfigError for what is no student."""
        return cls(CandidateSpec.from_dict(values["spec"]), values["bits"])


@dataclass(frozen=True)
class Cost:
    """Milliseconds for one step of the workload, MB (10^6 bytes) at its peak, number of parameters."""

    latency_ms: float
    memory_mb: float
    parameters: float

    def __str__(self) -> str:
        return f"{self.latency_ms:.4g} ms, {self.memory_mb:.4g} MB, {self.parameters:.6g} parameters"

    def to_dict(self) -> dict[str, float]:
        """JSON value."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Cost:
        """Inverse of `to_dict`."""
        return cls(**values)


@dataclass(frozen=True)
class CostModel:
    """Cost of any choice for one teacher and workload.

    count_parameters: numbers of parameters of a student by part, with the keys PARTS. latency: milliseconds of a
    choice; None counts latency as 0. decoder: keys and values are kept for `workload.context` tokens. window: tokens
    that layers of the kind `sliding_attention` keep. positions: positions of each row whose logits are computed, 1 for
    generation and `workload.sequence` for a loss over every token; 0 for a model without a vocabulary at its output.
    activations: bytes that the layers of a student need at once, None for a guess.
    """

    teacher: TeacherShape
    workload: Workload
    count_parameters: Callable[[CandidateSpec], Mapping[str, int]]
    latency: Callable[[Choice], float] | None = None
    decoder: bool = True
    window: int | None = None
    positions: int = 1
    activations: Callable[[CandidateSpec], float] | None = None

    def __call__(self, choice: Choice) -> Cost:
        """Latency, memory and parameters of a choice."""
        counts = self._counts(choice.spec)
        memory = self.weight_bytes(counts, choice.bits)
        memory += self.cache_bytes(choice.spec) + self.activation_bytes(choice.spec)
        latency = self.latency(choice) if self.latency is not None else 0.0
        return Cost(float(latency), memory / MEGABYTE, float(sum(counts.values())))

    def weight_bytes(self, counts: Mapping[str, int], bits: float | None) -> float:
        """Bytes of all parameters: blocks at `bits` per weight if they are quantised, all else in the data type."""
        wide = self._bytes()
        return counts[BLOCKS] * (wide if bits is None else bits / 8) + (counts[EMBEDDINGS] + counts[REST]) * wide

    def cache_bytes(self, spec: CandidateSpec) -> float:
        """Bytes of keys and values: 2 · Σ kv_heads · head_dim · min(context, window) · batch; 0 without a decoder."""
        if not self.decoder:
            return 0.0
        kept = sum(layer.kv_heads * self._span(layer.source) for layer in spec.layers if ATTENTION not in layer.skip)
        return 2.0 * kept * self.teacher.head_dim * self.workload.batch * self._bytes()

    def activation_bytes(self, spec: CandidateSpec) -> float:
        """Bytes at the peak of a step: of the layer that needs most, or of the logits in float32 behind them.

        Without `activations` a layer needs batch · sequence · max(widest FFN, 4 · hidden), and logits come on top: that
        knows nothing of how many tensors the code of a family holds at once.
        """
        if self.activations is not None:
            return max(self.activations(spec), self._logit_bytes(spec))
        widest = max((layer.intermediate_size for layer in spec.all_layers() if MLP not in layer.skip), default=0)
        tokens = self.workload.batch * self.workload.sequence
        return tokens * max(widest, 4 * spec.hidden_size) * self._bytes() + self._logit_bytes(spec)

    def _logit_bytes(self, spec: CandidateSpec) -> float:
        if spec.head == "none":
            return 0.0
        if spec.num_labels is not None:
            return float(self.workload.batch * spec.num_labels * _LOGIT_BYTES)
        vocabulary = self.teacher.vocab_size or 0 if spec.vocabulary is None else len(spec.vocabulary)
        return float(self.workload.batch * self.positions * vocabulary * _LOGIT_BYTES)

    def _span(self, source: int) -> int:
        """Tokens that a layer made of this one keeps."""
        types, context = self.teacher.layer_types, self.workload.context
        sliding = types is not None and types[source] == SLIDING and self.window is not None
        return min(context, self.window) if sliding else context  # type: ignore[type-var]

    def _bytes(self) -> int:
        dtype = getattr(torch, self.workload.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"`dtype` of the workload must be a torch type like bfloat16, not {self.workload.dtype!r}"
            )
        return dtype.itemsize

    def _counts(self, spec: CandidateSpec) -> Mapping[str, int]:
        counts = self.count_parameters(spec)
        if set(counts) != set(PARTS):
            raise ConfigError(f"parameters must be counted by {', '.join(PARTS)}, not by {', '.join(counts)}")
        return counts
