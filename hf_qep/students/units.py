"""Which units of the teacher a student keeps: those with the highest scores, in the teacher's order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_qep.errors import ConfigError, NonFiniteError
from hf_qep.students.family import FAMILIES
from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import ATTENTION, MLP, CandidateSpec, LayerSpec, TeacherShape, check_against


@dataclass(frozen=True)
class KeptUnits:
    """Numbers of the teacher's units that stay, int64 on the CPU, rising; keeping all of them gives 0, 1, 2, ...

    heads, kv_heads, ffn: per stack and layer of the student: (query heads,), (key-value heads,), (units of the MLP,).
    hidden: (hidden_size,), channels of the residual stream. vocabulary: token ids, None for all.
    """

    heads: tuple[tuple[Tensor, ...], ...]
    kv_heads: tuple[tuple[Tensor, ...], ...]
    ffn: tuple[tuple[Tensor, ...], ...]
    hidden: Tensor
    vocabulary: Tensor | None


def kept_units(spec: CandidateSpec, shape: TeacherShape, scores: UnitScores) -> KeptUnits:
    """The best key-value heads by the sum over their query heads, of each the best `q_per_kv`; the best FFN units.

    Equal scores keep the first. Raises ConfigError unless the student can be cut from the teacher, NonFiniteError for
    scores that are no numbers.
    """
    check_student(spec, shape)
    theirs = dict(shape.identity().stacks())
    heads, kv_heads, ffn = [], [], []
    for stack, layers in spec.stacks():
        sources = list(zip(theirs[stack], scores.heads[stack], scores.ffn[stack], strict=True))
        found = [_kept_in_layer(layer, *sources[layer.source]) for layer in layers]
        for kind, column in zip((heads, kv_heads, ffn), zip(*found, strict=True), strict=True):
            kind.append(column)
    vocabulary = None if spec.vocabulary is None else torch.tensor(spec.vocabulary)
    hidden = best(scores.hidden, shape.hidden_size, spec.hidden_size)
    return KeptUnits(tuple(heads), tuple(kv_heads), tuple(ffn), hidden, vocabulary)


def check_student(spec: CandidateSpec, shape: TeacherShape) -> None:
    """Raise ConfigError for a student that asks for more than its teacher, or for what its family cannot give."""
    check_against(spec, shape)
    family = FAMILIES[shape.model_type]
    if family.fixed_hidden and spec.hidden_size != shape.hidden_size:
        raise ConfigError(
            f"hidden_size of a {family.model_type} student must be the teacher's {shape.hidden_size}, not "
            f"{spec.hidden_size}: {family.fixed_hidden}"
        )
    if spec.head == "classifier" and not family.classifier:
        raise ConfigError(f'a {family.model_type} student cannot have head "classifier"; use "same" or "none"')
    theirs = dict(shape.identity().stacks())
    for stack, layers in spec.stacks():
        for number, layer in enumerate(layers):
            if missing := theirs[stack][layer.source].skip - layer.skip:
                raise ConfigError(
                    f"layer {number} has {' and '.join(sorted(missing))}, and layer {layer.source} of the teacher has "
                    "none; add it to `skip`"
                )


def best(scores: Tensor, total: int, count: int) -> Tensor:
    """Indices of the `count` highest of `total` scores, rising; no score is read where all stay."""
    if count == total:
        return torch.arange(total)
    if scores.shape != (total,):
        raise ConfigError(f"there must be one score for each of {total} units, not {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise NonFiniteError("scores of units hold NaN or Inf; the model overflows on the data that they come from")
    return scores.cpu().sort(descending=True, stable=True).indices[:count].sort().values


def _kept_in_layer(
    layer: LayerSpec, source: LayerSpec, head_scores: Tensor, ffn_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(query heads, key-value heads, units) of one layer; a sub-block that is skipped keeps its first ones by name."""
    units = (
        torch.arange(layer.intermediate_size)
        if MLP in layer.skip
        else best(ffn_scores, source.intermediate_size, layer.intermediate_size)
    )
    if ATTENTION in layer.skip or (layer.kv_heads, layer.q_per_kv) == (source.kv_heads, source.q_per_kv):
        return torch.arange(layer.heads), torch.arange(layer.kv_heads), units
    if head_scores.shape != (source.heads,):
        raise ConfigError(f"there must be one score for each of {source.heads} heads, not {tuple(head_scores.shape)}")
    groups = head_scores.view(source.kv_heads, source.q_per_kv)
    kv = best(groups.sum(1), source.kv_heads, layer.kv_heads)
    queries = torch.stack([best(groups[k], source.q_per_kv, layer.q_per_kv) + k * source.q_per_kv for k in kv])
    return queries.flatten(), kv, units
