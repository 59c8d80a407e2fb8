"""From a teacher and a specification to an ordinary model of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_qep.errors import ArchitectureError
from hf_qep.students.blueprint import Blueprint, blueprint, mapped_ids
from hf_qep.students.counting import count_parameters
from hf_qep.students.family import VOCAB, Axes, Place, family_of, layers_of, named_axes, places, teacher_shape
from hf_qep.students.modeling_student import FFN, HIDDEN, KEY_VALUE, QUERY
from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import KEEP, NEW_ZERO, CandidateSpec, LayerSpec
from hf_qep.students.units import KeptUnits, kept_units
from hf_qep.students.weight_scores import channel_energy, norm_gain, weight_scores

__all__ = ["blank_student", "count_parameters", "materialize"]


@torch.no_grad()
def materialize(
    teacher: PreTrainedModel, spec: CandidateSpec, scores: UnitScores | None = None, *, seed: int = 0
) -> PreTrainedModel:
    """The student with weights of the teacher, in eval mode, in its data type and on its device.

    scores: which units stay; those of `weight_scores` if None. seed: for the weights that the teacher has none for (a
    new head, the pooler of an encoder that had none, layers of the kind `new_zero`). Layers that are added start by
    changing nothing: their output projections are zero, or their gate is where norms come last. The class is that of
    transformers where its configuration can say the sizes, else the student's version of it. The teacher stays as it
    is and shares no memory with the student. Raises ConfigError if the student cannot be cut from this teacher,
    ArchitectureError for a teacher that is quantised or of no family.
    """
    named_axes(teacher)  # a parameter that nobody knows is refused before anything is built
    plan, shape = blueprint(teacher, spec), teacher_shape(teacher)
    kept = kept_units(spec, shape, weight_scores(teacher) if scores is None else scores)
    with _seeded(seed):
        with no_init_weights():
            student = _build(teacher, plan, teacher.dtype)
        fresh = _copy_weights(teacher, student, spec, kept, shape.head_dim)
        _fill_fresh(student, spec, fresh)
    student.tie_weights()
    _copy_buffers(teacher, student)
    _set_generation(teacher, student, spec)
    return student.to(teacher.device).eval()


def blank_student(
    teacher: PreTrainedModel,
    spec: CandidateSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The same model with random weights, built on `device` without copying the teacher's: to measure its speed.

    dtype: the teacher's if None. Raises what `materialize` raises.
    """
    plan = blueprint(teacher, spec)
    with _seeded(seed), torch.device(device):
        return _build(teacher, plan, dtype or teacher.dtype).eval()


def _build(teacher: PreTrainedModel, plan: Blueprint, dtype: torch.dtype) -> PreTrainedModel:
    attention = {"": teacher.config._attn_implementation}  # of the model itself: a backbone has its own
    return plan.model_class._from_config(plan.config, dtype=dtype, attn_implementation=attention)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights are drawn from the global generators, which are given back as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _copy_weights(
    teacher: PreTrainedModel, student: PreTrainedModel, spec: CandidateSpec, kept: KeptUnits, head_dim: int
) -> set[str]:
    """Put cut copies of the teacher's weights into the student; names of the parameters that it has none for."""
    sources = {place: (weight, axes) for place, weight, axes in named_axes(teacher).values()}
    stacks, fresh = dict(spec.stacks()), set()
    narrower = len(kept.hidden) < teacher_shape(teacher).hidden_size
    gain = norm_gain(channel_energy(teacher), kept.hidden) if narrower else 1.0
    for name, (place, parameter, axes) in named_axes(student).items():
        layer = None if place.layer is None else stacks[place.stack][place.layer]
        source = sources.get(_source_place(place, layer)) if spec.head == "same" or place.in_base else None
        if source is None or (layer is not None and layer.kind == NEW_ZERO):
            fresh.add(name)
            continue
        value = _cut(*source, kept, place, head_dim)
        if value.shape != parameter.shape:
            raise ArchitectureError(f"`{name}` should be {tuple(parameter.shape)}, and its cut is {tuple(value.shape)}")
        # a norm over fewer channels divides by another mean square (see norm_gain); norms in heads read other things
        if narrower and place.in_base and axes == (HIDDEN,) and _is_gain(student, name):
            value = value * gain
        parameter.data = value
    return fresh


def _source_place(place: Place, layer: LayerSpec | None) -> Place:
    return place if layer is None else Place(place.name, place.stack, layer.source)


def _is_gain(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and type(model.get_submodule(owner)).__name__.endswith("Norm")


def _cut(weight: Tensor, axes: Axes, kept: KeptUnits, place: Place, head_dim: int) -> Tensor:
    """A copy of what stays of a parameter of the teacher; `place` is that in the student."""
    indices = {HIDDEN: kept.hidden, VOCAB: kept.vocabulary}
    if place.layer is not None:
        at = place.stack, place.layer
        channels = torch.arange(head_dim)
        for axis, units in ((QUERY, kept.heads), (KEY_VALUE, kept.kv_heads)):
            indices[axis] = (units[at[0]][at[1]][:, None] * head_dim + channels).flatten()
        indices[FFN] = kept.ffn[at[0]][at[1]]
    weight = weight.detach()
    for dim, axis in enumerate(axes):
        index = None if axis is None else indices[axis]
        if index is not None and len(index) != weight.shape[dim]:
            weight = weight.index_select(dim, index.to(weight.device))
    return weight.clone(memory_format=torch.contiguous_format)


def _fill_fresh(student: PreTrainedModel, spec: CandidateSpec, fresh: set[str]) -> None:
    """Draw what the teacher has no weights for, and make the layers that are added change nothing."""
    for name, module in student.named_modules():
        own = [f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)]
        if fresh.intersection(own):
            student._init_weights(module)
    layout = family_of(student).layout
    for stack, layers in spec.stacks():
        for layer, (_, module) in zip(layers, layers_of(student, stack), strict=True):
            if layer.kind == KEEP:
                continue
            if layout.normalised_after:
                module.gate.zero_()
                continue
            for writer in (layout.attention_out, layout.mlp_out):
                for parameter in _parameters(module, writer):
                    parameter.zero_()


def _parameters(layer: nn.Module, name: str) -> list[Tensor]:
    """Parameters of a submodule, none where it was left out."""
    return [p for full, p in layer.named_parameters() if full.startswith(f"{name}.")]


def _copy_buffers(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Copy what is saved with the weights, such as the running means of a backbone."""
    theirs, ours = (
        {name: b for name, b in m.named_buffers() if name in saved}
        for m, saved in ((m, m.state_dict().keys()) for m in (teacher, student))
    )
    sources = {place: theirs[name] for name, place in places(teacher, list(theirs)).items()}
    for name, place in places(student, list(ours)).items():
        if place in sources:
            ours[name].copy_(sources[place])


def _set_generation(teacher: PreTrainedModel, student: PreTrainedModel, spec: CandidateSpec) -> None:
    if not (student.can_generate() and teacher.can_generate()):
        return
    values = teacher.generation_config.to_dict()
    if spec.vocabulary is not None:
        values |= mapped_ids(values, spec.vocabulary)
    student.generation_config = GenerationConfig.from_dict(values)
