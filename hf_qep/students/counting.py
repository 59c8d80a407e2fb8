"""How many parameters a student has, before it exists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from hf_qep.students.blueprint import blueprint
from hf_qep.students.family import VOCAB, Axes, Family, family_of, named_axes, teacher_shape
from hf_qep.students.modeling_student import FFN, HIDDEN, KEY_VALUE, QUERY
from hf_qep.students.spec import CandidateSpec, LayerSpec, TeacherShape
from hf_qep.students.units import check_student

BLOCKS, EMBEDDINGS, REST = "blocks", "embeddings", "rest"


@dataclass(frozen=True)
class _Entry:
    """A parameter: its part of the model, its shape in the teacher and what its dimensions are."""

    name: str
    part: str
    shape: tuple[int, ...]
    axes: Axes

    def count(self, sizes: dict[str, int]) -> int:
        return math.prod(
            sizes.get(self.axes[dim], size) if dim < len(self.axes) else size for dim, size in enumerate(self.shape)
        )


@dataclass(frozen=True)
class _Ledger:
    """All parameters of a teacher, tied ones once: outside the layers, and per stack and layer."""

    family: Family
    shape: TeacherShape
    outside: tuple[_Entry, ...]
    layers: dict[tuple[int, int], tuple[_Entry, ...]]


_LEDGERS: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int | None], _Ledger]] = WeakKeyDictionary()


def count_parameters(teacher: PreTrainedModel, spec: CandidateSpec) -> dict[str, int]:
    """Parameters of a student by part, tied ones counted once.

    `blocks`: weights of the linears inside layers; `embeddings`: token embeddings and a head over the vocabulary that
    is not tied to them; `rest`: everything else (norms, biases, other heads, a backbone). It is arithmetic on the
    shapes of the teacher, in well under a millisecond once they are known. Raises ConfigError if the student cannot be
    cut from this teacher.
    """
    ledger = _ledger(teacher, spec)
    check_student(spec, ledger.shape)
    counts = dict.fromkeys((BLOCKS, EMBEDDINGS, REST), 0)
    sizes = {HIDDEN: spec.hidden_size}
    if spec.vocabulary is not None:
        sizes[VOCAB] = len(spec.vocabulary)
    _add(counts, ledger.outside, sizes)
    for stack, layers in spec.stacks():
        for layer in layers:
            entries = ledger.layers[stack, layer.source]
            removed = tuple(f"{name}." for name in ledger.family.layout.removed(layer.skip))
            gate = ledger.family.layout.normalised_after if layer.added else any(e.name == "gate" for e in entries)
            counts[REST] += gate
            staying = (e for e in entries if e.name != "gate" and not (removed and e.name.startswith(removed)))
            _add(counts, staying, sizes | _layer_sizes(layer, ledger.shape.head_dim))
    return counts


def _add(counts: dict[str, int], entries: Iterable[_Entry], sizes: dict[str, int]) -> None:
    for entry in entries:
        counts[entry.part] += entry.count(sizes)


def _layer_sizes(layer: LayerSpec, head_dim: int) -> dict[str, int]:
    return {QUERY: layer.heads * head_dim, KEY_VALUE: layer.kv_heads * head_dim, FFN: layer.intermediate_size}


def _ledger(teacher: PreTrainedModel, spec: CandidateSpec) -> _Ledger:
    key = spec.head, spec.num_labels
    known = _LEDGERS.setdefault(teacher, {})
    if key not in known:
        known[key] = _read(teacher, spec)
    return known[key]


def _read(teacher: PreTrainedModel, spec: CandidateSpec) -> _Ledger:
    family, shape = family_of(teacher), teacher_shape(teacher)
    model, identity = teacher, shape.identity()
    if spec.head != "same":
        whole = CandidateSpec(
            identity.layers, identity.hidden_size, identity.decoder_layers, head=spec.head, num_labels=spec.num_labels
        )
        plan = blueprint(teacher, whole)
        with torch.device("meta"):
            model = plan.model_class._from_config(plan.config, dtype=teacher.dtype)
    seen, outside, layers = set(), [], {}
    for place, parameter, axes in named_axes(model).values():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        inside = place.layer is not None
        part = BLOCKS if inside and place.name.endswith("weight") and parameter.dim() == 2 else REST
        part = EMBEDDINGS if axes == (VOCAB, HIDDEN) else part
        entry = _Entry(place.name, part, tuple(parameter.shape), axes)
        (layers.setdefault((place.stack, place.layer), []) if inside else outside).append(entry)
    return _Ledger(family, shape, tuple(outside), {key: tuple(entries) for key, entries in layers.items()})
