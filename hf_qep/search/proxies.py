"""Cheap stand-ins for what a candidate is worth after a long distillation; lower is better.

    parameters   minus the number of weights
    synflow      minus Σ |θ ∂R/∂θ| of the network with |θ| on an input of ones (arXiv 2006.05467)
    influence    minus the influence of the layers that stay, as in pruning depth by it
    units        what the units and sub-blocks that go are worth, summed: free once the teacher is analysed
    one_shot     divergence from the teacher at the answers, as cut
    healed       the same after closed-form healing
    healed_all   the same at all tokens, not at the answers alone
    short        the task's loss after a short distillation; `short@60` has 60 steps
    short_kl     divergence after a short distillation

The distances are KL(teacher ‖ student) in nats per answer over the classes that can be an answer, on rows that neither
healing nor distillation sees (an embedding: relative squared error).  One shot, the distance to the teacher says more
than the loss on the labels: what cutting does to the bias of the answers is soon mended and not worth ranking by. Once
a student has learned a little, the loss on the labels says more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.architectures.skeleton import forward_only
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.said import Said, embedding_of, forward_inputs, take_said
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, TaskData
from hf_qep.errors import UnknownNameError
from hf_qep.search.additions import Aim, distances, start_additions
from hf_qep.search.analysis import Analysis
from hf_qep.search.healing import TeacherStream, heal
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import count_parameters, materialize
from hf_qep.students.spec import ATTENTION, SUB_BLOCKS, CandidateSpec
from hf_qep.students.units import kept_units

STEPS = 60
"""Steps of a short distillation."""
TAUGHT = ("short", "short_kl")
"""Proxies that have steps."""
HEALING_ROWS = 256
"""Most rows that healing looks at."""


@dataclass
class ProxyContext:
    """What proxies of one teacher and task share.

    fit: rows for healing and short distillation. judge: rows that candidates are judged by. learning_rate, loss: of the
    short distillation.
    """

    teacher: PreTrainedModel
    analysis: Analysis
    fit: TaskData
    judge: TaskData
    learning_rate: float | None = None
    loss: DistillLoss = field(default_factory=DistillLoss)
    batch_size: int = 8
    seed: int = 0
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stream(self) -> TeacherStream:
        """The teacher's residual stream on the rows to fit."""
        if "stream" not in self._shared:
            self._shared["stream"] = TeacherStream(self.teacher, self.fit.rows(slice(HEALING_ROWS)), self.batch_size)
        return self._shared["stream"]

    @property
    def aim(self) -> Aim:
        """To answer as the teacher does on the rows that healing looks at."""
        if "aim" not in self._shared:
            rows = self.stream.data  # not all rows to fit: most students have no use for what is said about those
            said = take_said(self.teacher, rows, batch_size=self.batch_size)
            self._shared["aim"] = Aim(rows, said, self.seed)
        return self._shared["aim"]

    def said(self, which: str) -> Said:
        """What the teacher says about the rows to `fit` or to `judge`, at the answers."""
        if which not in self._shared:
            self._shared[which] = take_said(self.teacher, getattr(self, which), batch_size=self.batch_size)
        return self._shared[which]

    def said_everywhere(self) -> tuple[TaskData, Said]:
        """The rows to judge by without labels, where every token is an answer, and what the teacher says there."""
        if "everywhere" not in self._shared:
            data = replace(self.judge, labels=None, answers=None)
            self._shared["everywhere"] = data, take_said(self.teacher, data, batch_size=self.batch_size)
        return self._shared["everywhere"]

    def student(
        self, spec: CandidateSpec, *, healed: bool = True, only: frozenset[tuple[int, int]] | None = None
    ) -> PreTrainedModel:
        """A candidate as its distillation starts: cut, healed, added layers on their first step.

        Its vocabulary is the teacher's, so that it reads the same rows; what trimming takes away is no answer. only:
        layers to heal, as in `heal`.
        """
        whole = replace(spec, vocabulary=None)
        shape = teacher_shape(self.teacher)
        student = materialize(self.teacher, whole, self.analysis.scores, seed=self.seed)
        if healed:
            heal(student, whole, kept_units(whole, shape, self.analysis.scores), self.stream, only=only)
            if any(layer.added for layer in whole.layers):
                start_additions(student, whole, self.aim, self.batch_size)
        return student


@torch.no_grad()
def distance(model: PreTrainedModel, data: TaskData, said: Said, batch_size: int) -> float:
    """Distance of a model's answers from what the teacher said about the same rows, mean over answers."""
    total, count, start = 0.0, 0, 0
    with forward_only(model):
        for batch in data.batches(batch_size, model.device):
            rows = torch.arange(start, start + len(next(iter(batch.values()))))
            each = distances(model(**forward_inputs(batch)), batch, data, said.rows(rows))
            total, count, start = total + each.sum().item(), count + each.numel(), start + len(rows)
    return total / max(count, 1)


def parameters(context: ProxyContext, spec: CandidateSpec) -> float:
    """Minus the number of weights."""
    return -float(sum(count_parameters(context.teacher, spec).values()))


def influence(context: ProxyContext, spec: CandidateSpec) -> float:
    """Minus the influence of the teacher's layers that stay whole, half for a sub-block."""
    kept = 0.0
    for stack, layers in spec.stacks():
        for layer in layers:
            share = 1 - len(layer.skip) / len(SUB_BLOCKS)
            kept += 0.0 if layer.added else share * context.analysis.influence[stack][layer.source]
    return -kept


def units(context: ProxyContext, spec: CandidateSpec) -> float:
    """Share of each layer's worth that goes, weighted by the layer's influence."""
    scores, lost = context.analysis.scores, 0.0
    kept = kept_units(spec, teacher_shape(context.teacher), scores)
    for stack, layers in spec.stacks():
        weight = context.analysis.influence[stack]
        lost += sum(weight)
        for number, layer in enumerate(layers):
            if layer.added:
                continue
            for part in set(SUB_BLOCKS) - layer.skip:
                worth = (scores.heads if part == ATTENTION else scores.ffn)[stack][layer.source]
                which = (kept.heads if part == ATTENTION else kept.ffn)[stack][number]
                worth = worth - worth.min() + 1e-3  # z-scores have no zero; the least unit is worth next to nothing
                lost -= weight[layer.source] / len(SUB_BLOCKS) * (worth[which].sum() / worth.sum()).item()
    return lost


def one_shot(context: ProxyContext, spec: CandidateSpec) -> float:
    """Divergence as cut."""
    return _judged(context, context.student(spec, healed=False))


def healed(context: ProxyContext, spec: CandidateSpec) -> float:
    """Divergence after healing."""
    return _judged(context, context.student(spec))


def healed_all(context: ProxyContext, spec: CandidateSpec) -> float:
    """Divergence after healing, at all tokens of a language model."""
    if context.judge.task != CAUSAL_LM:
        return healed(context, spec)
    data, said = context.said_everywhere()
    return distance(context.student(spec), data, said, context.batch_size)


def short(context: ProxyContext, spec: CandidateSpec, steps: int = STEPS) -> float:
    """The loss that counts after a short distillation: the task's own, without labels the divergence."""
    student = briefly_taught(context, spec, steps)
    if context.judge.labels is None or context.judge.task == DETECTION:
        return _judged(context, student)
    return Aim(context.judge, seed=context.seed).mean(student, context.batch_size)


def short_kl(context: ProxyContext, spec: CandidateSpec, steps: int = STEPS) -> float:
    """Divergence after a short distillation."""
    return _judged(context, briefly_taught(context, spec, steps))


def briefly_taught(context: ProxyContext, spec: CandidateSpec, steps: int) -> PreTrainedModel:
    """A candidate after some steps of distillation, whose rate falls to zero as that of a long one does."""
    from hf_qep.distill.student_trainer import train_student

    student = context.student(spec)
    train_student(
        student,
        context.fit,
        teacher=context.said("fit"),
        loss=context.loss,
        steps=steps,
        learning_rate=context.learning_rate or default_rate(spec.hidden_size),
        batch_size=context.batch_size,
        seed=context.seed,
    )
    return student


def default_rate(hidden_size: int) -> float:
    """Adam's step for a student of this width: 1e-3 at width 64, falling with the root of the width."""
    return 1e-3 * (64 / hidden_size) ** 0.5


def synflow(context: ProxyContext, spec: CandidateSpec) -> float:
    """Minus the synaptic flow of the candidate."""
    student = context.student(spec, healed=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.abs_()
    with torch.enable_grad(), forward_only(student):
        output = student(**_ones(student, context.judge))
        flow: Tensor = embedding_of(output).sum() if context.judge.task == EMBEDDING else output.logits.sum()
        trained = [p for p in student.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(flow, trained, allow_unused=True)
    return -sum((p * g).abs().sum().item() for p, g in zip(trained, gradients, strict=True) if g is not None)


def _ones(student: PreTrainedModel, data: TaskData) -> dict[str, Tensor]:
    row = data.rows(slice(0, 1)).inputs
    if "pixel_values" in row:
        return {"pixel_values": torch.ones_like(row["pixel_values"]).to(student.device)}
    size = (*row["input_ids"].shape, student.config.hidden_size)
    return {"inputs_embeds": torch.ones(size, device=student.device, dtype=student.dtype)}


def _judged(context: ProxyContext, student: PreTrainedModel) -> float:
    return distance(student, context.judge, context.said("judge"), context.batch_size)


PROXIES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (parameters, synflow, influence, units, one_shot, healed, healed_all, short, short_kl)
}


def proxy(name: str) -> Callable[[ProxyContext, CandidateSpec], float]:
    """A proxy by name, with a number of steps behind an @ if it has any. Raises UnknownNameError."""
    kind, _, steps = name.partition("@")
    if kind not in PROXIES or (steps and (kind not in TAUGHT or not steps.isdecimal() or not int(steps))):
        raise UnknownNameError(
            f"unknown proxy `{name}`; known: {', '.join(PROXIES)}, and with steps such as `short@60`"
        )
    return partial(PROXIES[kind], steps=int(steps)) if steps else PROXIES[kind]
