"""What a layer that is added would be worth, and the weights it should start with.

A layer with zero outputs changes nothing, so no proxy that looks at outputs can see it.  One step of functional
gradient boosting can: R = -∂L/∂h is what the loss would like to be added to the residual stream, H is what the writers
of the candidate read, and

    W = Rᵀ H (Hᵀ H + λI)⁻¹        on one half of the rows,
    gain = max over t of L(0) - L(t W)    on the other half, measured,

is the gain of the best first step.  It ranks places and sources, and t W is a better start than zero.  Layers with a
gate (families that normalise after the addition) have one number to fit, the gate.  The loss is that of the task where
the teacher itself is to grow, and the distance to the teacher where a layer shall make up for what a student lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.algorithms.distillation import divergence, relative_error
from hf_qep.algorithms.moments import cholesky_damped, ridge
from hf_qep.architectures.skeleton import forward_only
from hf_qep.distill.said import Said, embedding_of, forward_inputs
from hf_qep.distill.samples import EMBEDDING, TaskData
from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Progress
from hf_qep.search.analysis import only_activations_train, task_loss
from hf_qep.search.answers import answer_logits_of, token_weights
from hf_qep.search.healing import DAMPING
from hf_qep.search.watching import watched, writers_of
from hf_qep.students.family import family_of, layers_of
from hf_qep.students.materialize import materialize
from hf_qep.students.modeling_student import Layout
from hf_qep.students.spec import ATTENTION, COPY_ZERO, MLP, CandidateSpec, LayerSpec

STEPS = tuple(2.0**k for k in range(-3, 10))
"""Lengths t, tried in this order until one is worse than the one before: what the curvature of a loss is differs by
orders of magnitude between models."""
GATES = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Aim:
    """Rows, and what is to become small on them.

    said: what the teacher said about the rows; the aim is then to answer as it does (KL(teacher ‖ model), of an
    embedding the relative squared error). None: the task's own loss. seed: of labels that must be drawn.
    """

    data: TaskData
    said: Said | None = None
    seed: int = 0

    def halves(self) -> tuple[Aim, Aim]:
        """Rows to fit and rows to judge by. Raises ConfigError for fewer than two."""
        if len(self.data) < 2:
            raise ConfigError("an addition needs rows to fit and rows to judge by: at least two")
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.seed))
        parts = [part.sort().values for part in order.tensor_split(2)]
        said = [None if self.said is None else self.said.rows(part) for part in parts]
        first, second = (replace(self, data=self.data.rows(p), said=s) for p, s in zip(parts, said, strict=True))
        return first, second

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[dict[str, Any], Any]]:
        """Batches, and for each a function of the model's output that gives the sum of the loss over its rows."""
        generator, start = torch.Generator().manual_seed(self.seed), 0
        for batch in self.data.batches(size, device):
            rows = torch.arange(start, start + len(next(iter(batch.values()))))
            start += len(rows)
            yield batch, self._loss(batch, rows, generator)

    def _loss(self, batch: dict[str, Any], rows: Tensor, generator: torch.Generator) -> Any:
        if self.said is None:
            return lambda output: task_loss(output, batch, self.data, generator)
        said = self.said.rows(rows)
        return lambda output: distances(output, batch, self.data, said).sum()

    @torch.no_grad()
    def mean(self, model: PreTrainedModel, batch_size: int) -> float:
        """Loss of a model, mean over rows."""
        total = 0.0
        with forward_only(model):
            for batch, loss in self.batches(batch_size, model.device):
                total += loss(model(**forward_inputs(batch))).item()
        return total / len(self.data)


def distances(output: Any, batch: dict[str, Any], data: TaskData, said: Said) -> Tensor:
    """Distance of every answer of a batch from what the teacher said about the same rows, float32."""
    if data.task == EMBEDDING:
        found = embedding_of(output)
        return relative_error(found, said.embedding.to(found.device))
    logits = answer_logits_of(output, batch, data)
    return divergence(said.classes.to(logits.device), logits)


@dataclass(frozen=True)
class Addition:
    """A layer that could be added.

    position: number of the layer that it would be put before. source: layer it copies. gain: fall of the loss per row
    on rows it was not fitted to, 0 if no step helps. start: weights that make this step, by name within the layer.
    """

    position: int
    source: int
    gain: float
    start: dict[str, Tensor]


def score_additions(
    model: PreTrainedModel,
    spec: CandidateSpec,
    aim: Aim,
    *,
    positions: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> list[Addition]:
    """Every place where a copy of a neighbouring layer could be added to a model, best first.

    spec: the model's own shape, as `teacher_shape(model).identity()` gives it. positions: places to look at, all by
    default. Raises ConfigError for fewer than two rows.
    """
    halves = aim.halves()
    positions = range(len(spec.layers) + 1) if positions is None else positions
    found = []
    with progress.bar("scoring additions", len(positions), "place") as bar:
        for position in positions:
            for source in sorted({max(position - 1, 0), min(position, len(spec.layers) - 1)}):
                student = materialize(model, with_copy(spec, position, source), seed=aim.seed)
                start, gain = _first_step(student, position, halves, batch_size)
                found.append(Addition(position, source, gain, start))
            bar.advance()
    return sorted(found, key=lambda addition: (-addition.gain, addition.position, addition.source))


def with_copy(spec: CandidateSpec, position: int, source: int) -> CandidateSpec:
    """The spec with a copy of its layer `source` put before layer `position`."""
    copied: LayerSpec = replace(spec.layers[source], kind=COPY_ZERO)
    return replace(spec, layers=(*spec.layers[:position], copied, *spec.layers[position:]))


def start_additions(student: PreTrainedModel, spec: CandidateSpec, aim: Aim, batch_size: int = 8) -> None:
    """Give the layers that were added to a student the weights of their first step, one after the other."""
    added = [number for number, layer in enumerate(spec.layers) if layer.added]
    halves = aim.halves() if added else None
    for number in added:
        _first_step(student, number, halves, batch_size)


def _first_step(
    student: PreTrainedModel, number: int, halves: tuple[Aim, Aim], batch_size: int
) -> tuple[dict[str, Tensor], float]:
    """Put the best first step into an added layer; its weights by name, and its gain. Nothing changes if none helps."""
    layer, layout = layers_of(student, 0)[number][1], family_of(student).layout
    fit, judge = halves
    if hasattr(layer, "gate"):
        nothing = {"gate": torch.tensor(0.0)}
        directions = [[{"gate": torch.tensor(sign * t)} for t in GATES] for sign in (1, -1)]
    else:
        whole = _fitted(student, layer, layout, fit, batch_size)
        nothing = {name: torch.zeros_like(w) for name, w in whole.items()}
        directions = [[{name: t * w for name, w in whole.items()} for t in STEPS]]
    before = judge.mean(student, batch_size)
    best, most = nothing, 0.0
    for tries in directions:
        last = 0.0
        for start in tries:
            _put(layer, start)
            gain = before - judge.mean(student, batch_size)
            best, most = (start, gain) if gain > most else (best, most)
            if gain < last:
                break
            last = gain
    _put(layer, best)
    return ({} if best is nothing else best), most


@torch.no_grad()
def _put(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(layer.named_parameters())
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)


def _fitted(student: PreTrainedModel, layer: nn.Module, layout: Layout, aim: Aim, batch_size: int) -> dict[str, Tensor]:
    """Weights of the added layer's writers that follow the functional gradient, by name within the layer."""
    names = {ATTENTION: layout.attention_out, MLP: layout.mlp_out}
    parts = writers_of(layer, layout)
    widths = [linear.in_features for linear in parts.values()]
    square: Any = 0.0
    wanted: Any = 0.0
    tokens = 0
    with forward_only(student), only_activations_train(student, [layer]), watched(layer, layout) as seen:
        for batch, loss in aim.batches(batch_size, student.device):
            gradient = torch.autograd.grad(loss(student(**forward_inputs(batch))), seen.leave)[0]
            with torch.no_grad():
                x = torch.cat([seen.read(part) for part in parts], -1).float()
                keep = token_weights(batch, aim.data, x) > 0
                x, r = x[keep], -gradient[keep].float()
                square, wanted, tokens = square + x.T @ x, wanted + r.T @ x, tokens + len(x)
    factor, _ = cholesky_damped(square / tokens, ridge(DAMPING, sum(widths), tokens))
    weight = torch.cholesky_solve(wanted.T / tokens, factor).T
    return {f"{names[p]}.weight": w for p, w in zip(parts, weight.split(widths, 1), strict=True)}
