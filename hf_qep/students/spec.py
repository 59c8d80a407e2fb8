"""The shape of a student, written down in relation to its teacher.

A specification says how many units stay, never which: those with the highest scores do (`students.materialize`). It is
a value: it compares, hashes, and goes to JSON and back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hf_qep.errors import ConfigError
from hf_qep.files import canonical_json

ATTENTION, MLP = "attention", "mlp"
SUB_BLOCKS = (ATTENTION, MLP)
KEEP, COPY_ZERO, NEW_ZERO = "keep", "copy_zero", "new_zero"
KINDS = (KEEP, COPY_ZERO, NEW_ZERO)


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a student, in the order of its output.

    source: number of the teacher's layer that it is made of (of the same stack). kind: `keep`, or a layer that is
    added and starts by changing nothing: `copy_zero`, a copy whose outputs are zero, or `new_zero`, fresh weights with
    zero outputs. kv_heads: key-value heads. q_per_kv: query heads for each of them (1 where the family has no groups).
    intermediate_size: units of the feed-forward network. skip: sub-blocks that are left out, `attention` or `mlp`.
    """

    source: int
    kv_heads: int
    q_per_kv: int
    intermediate_size: int
    kind: str = KEEP
    skip: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", frozenset(self.skip))
        if self.kind not in KINDS:
            raise ConfigError(f"the kind of a layer must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not self.skip <= set(SUB_BLOCKS):
            raise ConfigError(f"a layer can skip {' or '.join(SUB_BLOCKS)}, not {sorted(self.skip - set(SUB_BLOCKS))}")
        if len(self.skip) == len(SUB_BLOCKS):
            raise ConfigError("a layer that skips attention and mlp does nothing; leave the layer out")
        for name in ("source", "kv_heads", "q_per_kv", "intermediate_size"):
            least = 0 if name == "source" else 1
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"`{name}` of a layer must be a whole number of at least {least}, not {value!r}")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.q_per_kv

    @property
    def added(self) -> bool:
        """Whether the layer is not one of the teacher's."""
        return self.kind != KEEP

    def sizes(self) -> tuple[Any, ...]:
        """What decides the shapes of its weights; layers with equal sizes can share a configuration."""
        return self.kv_heads, self.q_per_kv, self.intermediate_size, tuple(sorted(self.skip))

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return asdict(self) | {"skip": sorted(self.skip)}


@dataclass(frozen=True)
class CandidateSpec:
    """A student.

    layers: of the first stack: all there is in decoders and encoders, the encoder of a detector. decoder_layers: of the
    second stack of a detector. hidden_size: width of the residual stream. vocabulary: token ids of the teacher that
    stay, in rising order; None for all. head: "same" as the teacher's, "classifier" for a new one with `num_labels`
    classes on a decoder or encoder without one, "none" for the bare model.
    """

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    decoder_layers: tuple[LayerSpec, ...] = ()
    vocabulary: tuple[int, ...] | None = None
    head: str = "same"
    num_labels: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "decoder_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.vocabulary is not None:
            object.__setattr__(self, "vocabulary", tuple(int(i) for i in self.vocabulary))
        _check(self)

    def stacks(self) -> Iterator[tuple[int, tuple[LayerSpec, ...]]]:
        """Number and layers of each stack that has layers."""
        yield 0, self.layers
        if self.decoder_layers:
            yield 1, self.decoder_layers

    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Layers of all stacks."""
        return self.layers + self.decoder_layers

    @property
    def homogeneous(self) -> bool:
        """Whether all layers of each stack have equal sizes and none skips a sub-block."""
        return all(len({layer.sizes() for layer in layers}) <= 1 for _, layers in self.stacks()) and not any(
            layer.skip for layer in self.all_layers()
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON value; `from_dict` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("layers", "decoder_layers"):
            values[name] = [layer.to_dict() for layer in values[name]]
        values["vocabulary"] = None if self.vocabulary is None else list(self.vocabulary)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CandidateSpec:
        """Inverse of `to_dict`. Raises ConfigError for missing, unknown or impossible values."""
        try:
            lists = {n: tuple(LayerSpec(**v) for v in values.get(n, ())) for n in ("layers", "decoder_layers")}
            return cls(**dict(values) | lists)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"this is no specification of a student: {error}") from error

    def key(self) -> str:
        """Sixteen hexadecimal digits that two specifications share only if they are equal."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()[:16]

    def with_layer(self, index: int, **changes: Any) -> CandidateSpec:
        """The same with one layer of the first stack changed."""
        layers = list(self.layers)
        layers[index] = replace(layers[index], **changes)
        return replace(self, layers=tuple(layers))


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a teacher: what a specification is measured against."""

    model_type: str
    layers: tuple[LayerSpec, ...]
    hidden_size: int
    head_dim: int
    vocab_size: int | None
    decoder_layers: tuple[LayerSpec, ...] = ()
    layer_types: tuple[str, ...] | None = field(default=None)
    """Kind of attention of each layer (`sliding_attention`, ...) where layers differ."""

    def identity(self) -> CandidateSpec:
        """The specification of the teacher itself."""
        return CandidateSpec(self.layers, self.hidden_size, self.decoder_layers)


def check_against(spec: CandidateSpec, teacher: TeacherShape) -> None:
    """Raise ConfigError unless the student can be cut from this teacher."""
    if spec.hidden_size > teacher.hidden_size:
        raise ConfigError(f"hidden_size {spec.hidden_size} is more than the teacher's {teacher.hidden_size}")
    if spec.vocabulary and (teacher.vocab_size is None or spec.vocabulary[-1] >= teacher.vocab_size):
        raise ConfigError(f"token {spec.vocabulary[-1]} is not in the teacher's vocabulary of {teacher.vocab_size}")
    if bool(spec.decoder_layers) != bool(teacher.decoder_layers):
        raise ConfigError("a student has decoder_layers if, and only if, its teacher has them")
    theirs = {0: teacher.layers, 1: teacher.decoder_layers}
    for stack, layers in spec.stacks():
        for number, layer in enumerate(layers):
            if layer.source >= len(theirs[stack]):
                raise ConfigError(
                    f"layer {number} comes from layer {layer.source}, and the teacher has {len(theirs[stack])}"
                )
            source = theirs[stack][layer.source]
            for name in ("kv_heads", "q_per_kv", "intermediate_size"):
                if getattr(layer, name) > getattr(source, name):
                    raise ConfigError(
                        f"layer {number} asks for {name} {getattr(layer, name)}, and layer {layer.source} of the "
                        f"teacher has {getattr(source, name)}"
                    )


def _check(spec: CandidateSpec) -> None:
    if not spec.layers:
        raise ConfigError("a student needs at least one layer")
    if spec.hidden_size < 1:
        raise ConfigError(f"hidden_size must be at least 1, not {spec.hidden_size}")
    if spec.head not in ("same", "classifier", "none"):
        raise ConfigError(f'head must be "same", "classifier" or "none", not {spec.head!r}')
    if (spec.head == "classifier") != (spec.num_labels is not None):
        raise ConfigError('num_labels belongs to head "classifier": give both or none')
    if spec.num_labels is not None and spec.num_labels < 1:
        raise ConfigError(f"num_labels must be at least 1, not {spec.num_labels}")
    ids = spec.vocabulary
    if ids is not None and (not ids or ids[0] < 0 or any(a >= b for a, b in zip(ids, ids[1:], strict=False))):
        raise ConfigError("vocabulary must be token ids in rising order, each once")
    for _, layers in spec.stacks():
        kept = [layer.source for layer in layers if not layer.added]
        if any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
            raise ConfigError(f"layers that are kept must stay in the teacher's order, each once, not {kept}")
