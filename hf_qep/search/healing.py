"""Closed-form healing: the writers of a pruned model are fitted anew, so that they also make up for what was cut.

The linears that write into the residual stream are visited in order of execution. Each is the least-squares fit of the
teacher's residual stream on what the student, healed so far, feeds it:

    W* = W + E[(y - ŷ) x̂ᵀ] (E[x̂ x̂ᵀ] + λI)⁻¹

x̂ is what the writer reads in the student, ŷ the student's residual stream after the addition, y the teacher's at the
place that follows: behind the layers that were dropped, which the writer so takes over as far as it can.  This is
quantization error propagation (arXiv 2504.09629) with cutting in the place of rounding, and it is the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.algorithms.moments import Moments, ridge
from hf_qep.algorithms.qep import correct_output
from hf_qep.architectures.observe import StopForward
from hf_qep.architectures.skeleton import forward_only
from hf_qep.distill.said import forward_inputs
from hf_qep.distill.samples import TaskData
from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Progress
from hf_qep.search.answers import token_weights
from hf_qep.search.watching import Seen, watched, writers_of
from hf_qep.students.family import family_of, layers_of
from hf_qep.students.modeling_student import Layout
from hf_qep.students.spec import ATTENTION, MLP, CandidateSpec
from hf_qep.students.units import KeptUnits

DAMPING = 0.01
"""Ridge besides that for the number of tokens, in units of the mean diagonal."""
CONSTANT = 1e-6
"""Share of the energy that varies below which a writer reads a constant, as that of the first attention of a detector's
decoder does, and only its bias can be fitted: what varies is noise."""
ROOM_BYTES = 1 << 30
"""For the teacher's residual stream; beyond it the teacher runs again for every writer."""


@dataclass
class TeacherStream:
    """The teacher's residual stream over the rows of one task, taken once where there is room.

    Shared by all candidates that are healed on the same rows.
    """

    teacher: PreTrainedModel
    data: TaskData
    batch_size: int = 8
    room: int = ROOM_BYTES
    _kept: dict[tuple[int, int, str], list[Tensor]] = field(default_factory=dict, repr=False)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Forward keyword arguments, in the order of the stream."""
        for batch in self.data.batches(self.batch_size, self.teacher.device):
            yield forward_inputs(batch)

    def after(self, stack: int, layer: int, part: str) -> list[Tensor]:
        """The stream behind `attention` or `mlp` of a layer, before any norm: (rows, tokens, hidden) per batch."""
        place = (stack, layer, part)
        if place in self._kept:
            return self._kept[place]
        layout = family_of(self.teacher).layout
        module = layers_of(self.teacher, stack)[layer][1]
        taken = [seen.after(part, layout).detach() for seen in passes(self.teacher, module, layout, self.batches())]
        size = sum(t.numel() * t.element_size() for t in taken)
        if size <= self.room:
            self.room -= size
            self._kept[place] = taken
        return taken


@torch.no_grad()
def passes(model: PreTrainedModel, layer: nn.Module, layout: Layout, batches: Any) -> Iterator[Seen]:
    """What passed through one layer for each batch; the model runs no further than that layer."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise StopForward

    with forward_only(model), watched(layer, layout) as seen:
        handle = layer.register_forward_hook(stop)  # after the hook that looks
        try:
            for batch in batches:
                try:
                    model(**batch)
                except StopForward:
                    yield seen
        finally:
            handle.remove()


@torch.no_grad()
def heal(
    student: PreTrainedModel,
    spec: CandidateSpec,
    kept: KeptUnits,
    stream: TeacherStream,
    *,
    only: frozenset[tuple[int, int]] | None = None,
    damping: float = DAMPING,
    progress: Progress = SILENT,
) -> PreTrainedModel:
    """Fit the writers of a student in place, in order of execution, and return it.

    student: as `materialize` made it of `spec` and the teacher of the stream. kept: which units it kept. only: (stack,
    number) of the layers to heal, all by default; layers that were added stay as they are in any case. Raises
    ConfigError for a trimmed vocabulary: the rows are in the teacher's.
    """
    if spec.vocabulary is not None:
        raise ConfigError("a student with a trimmed vocabulary cannot read the teacher's rows: heal it before trimming")
    layout, parallel = family_of(student).layout, family_of(student).parallel
    steps = [(stack, index) for stack, layers in spec.stacks() for index, _ in enumerate(layers)]
    steps = [step for step in steps if only is None or step in only]
    with progress.bar("healing", len(steps), "layer") as bar:
        for stack, index in steps:
            layer = dict(spec.stacks())[stack][index]
            if not layer.added:
                module = layers_of(student, stack)[index][1]
                parts = [part for part in (ATTENTION, MLP) if part not in layer.skip]
                for group in [parts] if parallel else [[part] for part in parts]:
                    goal = _goal(spec, stack, index, group[-1], parts[-1], layout, stream)
                    _fit(student, module, layout, group, goal, kept.hidden, stream, damping)
            bar.advance()
    return student


def _goal(
    spec: CandidateSpec, stack: int, index: int, part: str, last: str, layout: Layout, stream: TeacherStream
) -> list[Tensor]:
    """Where the teacher's stream should be after a sub-block of the student's layer.

    After the last one of a layer, behind the teacher's layers that do not come again, if additions are not normalised:
    a norm between two layers of the teacher has no place in the student to be fitted to.
    """
    layers = dict(spec.stacks())[stack]
    if part != last or layout.normalised_after:
        return stream.after(stack, layers[index].source, part)
    following = [layer.source for layer in layers[index + 1 :] if not layer.added]
    count = len(layers_of(stream.teacher, stack))
    return stream.after(stack, (following[0] if following else count) - 1, MLP)


def _fit(
    student: PreTrainedModel,
    layer: nn.Module,
    layout: Layout,
    parts: list[str],
    goal: list[Tensor],
    channels: Tensor,
    stream: TeacherStream,
    damping: float,
) -> None:
    """Fit the writers of `parts`, which are added to the stream together, to a goal."""
    writers = [writers_of(layer, layout)[part] for part in parts]
    width, outputs = sum(w.in_features for w in writers), writers[0].out_features
    moments = Moments(width, device=writers[0].weight.device, outputs=outputs)
    for seen, wanted, batch in zip(
        passes(student, layer, layout, stream.batches()), goal, stream.batches(), strict=True
    ):
        x = torch.cat([seen.read(part) for part in parts], -1)
        gap = wanted[..., channels.to(wanted.device)].to(x) - seen.after(parts[-1], layout)
        keep = token_weights(batch, stream.data, x) > 0
        moments.update(x[keep], gap=gap[keep])
    biased = writers[0].bias is not None
    weight = torch.cat([w.weight for w in writers], 1).float()
    hessian, fitted = moments.hessian(centered=biased), weight
    if not biased or hessian.trace() > CONSTANT * moments.hessian(centered=False).trace():
        amount = ridge(damping, width, moments.count)
        fitted = correct_output(weight, hessian, moments.take_output_gap(centered=biased), damping=amount)
    if biased:
        shift = moments.mean_gap().to(weight.device) - (fitted - weight) @ moments.mean_quantized().to(weight.device)
        writers[0].bias.add_(shift.to(writers[0].bias))
    for writer, part in zip(writers, fitted.split([w.in_features for w in writers], 1), strict=True):
        writer.weight.copy_(part)
