"""One pass over rows of the task: what each layer and each unit of the teacher does for it.

Influence of a layer: 1 - cos of what enters and what leaves it (ShortGPT, arXiv 2403.03853), at the tokens that answer
and at all. Score of a unit: how much it writes, E‖W_j a_j‖², and how much the task's loss minds if it goes, the Fisher
information of a mask on it, Σ_rows (Σ_tokens a_j ∂L/∂a_j)²; both as z-scores within the layer, added. The first alone
keeps what the teacher knows of everything, the second is what lets go of what the task does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.architectures.skeleton import HIDDEN as HIDDEN_STATES
from hf_qep.architectures.skeleton import forward_only
from hf_qep.distill.said import embedding_of, forward_inputs
from hf_qep.distill.samples import EMBEDDING, TaskData
from hf_qep.distill.trainable import nothing_else_trains
from hf_qep.errors import CheckpointError, NonFiniteError
from hf_qep.files import canonical_json, write_aside
from hf_qep.progress import SILENT, Progress
from hf_qep.search.answers import answer_labels_of, answer_logits_of, answer_weights, token_weights
from hf_qep.search.watching import Seen, all_watched, submodule
from hf_qep.students.family import Family, family_of, layers_of, teacher_shape
from hf_qep.students.modeling_student import HIDDEN
from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import ATTENTION, MLP, SUB_BLOCKS, TeacherShape

STATE, FACTS = "analysis.safetensors", "analysis.json"


@dataclass(frozen=True)
class Analysis:
    """What the pass found.

    influence: per stack, per layer: 1 - cos at the tokens that answer, and `influence_all` at all. part_influence: per
    stack, per layer, of attention and of the MLP: relative size of what is added to the residual stream. scores: of all
    units. rows, tokens: how many were seen. data: fingerprint of the rows.
    """

    scores: UnitScores
    influence: tuple[tuple[float, ...], ...]
    influence_all: tuple[tuple[float, ...], ...]
    part_influence: tuple[tuple[dict[str, float], ...], ...]
    rows: int
    tokens: int
    data: str

    def facts(self) -> dict[str, Any]:
        """JSON value: everything but the scores."""
        names = ("influence", "influence_all", "part_influence", "rows", "tokens", "data")
        return {name: getattr(self, name) for name in names}

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write a folder, whole or not at all. Raises OutputExistsError."""
        with write_aside(folder, overwrite=overwrite) as aside:
            save_file({name: t.contiguous() for name, t in self.scores.state().items()}, aside / STATE)
            (aside / FACTS).write_text(canonical_json(self.facts()), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, shape: TeacherShape) -> Analysis:
        """Read a folder. Raises CheckpointError where it is not the analysis of a teacher of this shape."""
        import json

        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            scores = UnitScores.from_state(load_file(folder / STATE), shape)
            lists = {k: tuple(tuple(layer) for layer in facts[k]) for k in ("influence", "influence_all")}
            parts = tuple(tuple(stack) for stack in facts["part_influence"])
            found = cls(scores, **lists, part_influence=parts, **{k: facts[k] for k in ("rows", "tokens", "data")})
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{str(folder)!r} holds no analysis of this teacher: {error}") from error
        sizes = [len(stack) for stack in found.influence]
        if sizes != [len(layers) for _, layers in shape.identity().stacks()]:
            raise CheckpointError(f"{str(folder)!r} is the analysis of a teacher with {sizes} layers; analyse this one")
        return found


@dataclass
class _LayerSums:
    """Running sums of one layer, float64 where they are scalars."""

    heads: int
    head_dim: int
    head_gram: Tensor | None = None
    """(heads, head_dim, head_dim): Σ o oᵀ of each head's output."""
    unit_energy: Tensor | None = None
    """(intermediate,): Σ a²"""
    fisher: dict[str, Tensor] = field(default_factory=dict)
    """Sub-block -> (units,), and `hidden`: Σ over rows of the squared gradient of a mask."""
    hidden_energy: Tensor | None = None
    """(hidden,): Σ h² of what leaves the layer."""
    cosines: list[float] = field(default_factory=lambda: [0.0, 0.0])
    added: dict[str, float] = field(default_factory=dict)
    weights: list[float] = field(default_factory=lambda: [0.0, 0.0])


def analyse(
    teacher: PreTrainedModel,
    data: TaskData,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Analysis:
    """Run the teacher over all rows once, forward and backward to the activations; no weight gets a gradient.

    data: rows of the task. Without labels the gradient is that of labels drawn from the teacher's own answers, which
    makes the scores its Fisher information. Raises NonFiniteError where the teacher overflows, ArchitectureError for a
    family that is not known, ConfigError for labels that do not fit.
    """
    family, shape = family_of(teacher), teacher_shape(teacher)
    stacks = [layers_of(teacher, stack) for stack, _ in shape.identity().stacks()]
    layers = [module for stack in stacks for _, module in stack]
    specs = [layer for _, stack in shape.identity().stacks() for layer in stack]
    sums = [_LayerSums(spec.heads, shape.head_dim) for spec in specs]
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    batches = -(-len(data) // batch_size)
    with (
        forward_only(teacher),
        only_activations_train(teacher, [stack[0][1] for stack in stacks]),
        all_watched(layers, family.layout) as seen,
        progress.bar("analysing", batches, "batch") as bar,
    ):
        for batch in data.batches(batch_size, teacher.device):
            output = teacher(**forward_inputs(batch))
            tokens += _add_batch(sums, seen, batch, data, task_loss(output, batch, data, generator))
            bar.advance()
    return _finished(family, stacks, sums, data, tokens)


def task_loss(output: Any, batch: dict[str, Any], data: TaskData, generator: torch.Generator) -> Tensor:
    """Sum over the rows of the negative log-likelihood of their labels, or of labels drawn from the model's answers.

    Of an embedding: of a draw from the normal distribution around it, whose width is the size of the embedding.
    """
    if data.task == EMBEDDING:
        found = embedding_of(output)
        noise = torch.randn(found.shape, generator=generator).to(found) * found.detach().square().mean().sqrt()
        return ((found - found.detach() - noise).square() / (2 * found.detach().square().mean())).sum()
    logits = answer_logits_of(output, batch, data).float()
    log_p = logits.flatten(0, -2).log_softmax(-1)
    if (labels := answer_labels_of(batch, data)) is None:
        labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)[:, 0].to(log_p.device)
    return F.nll_loss(log_p, labels, reduction="sum")


@contextmanager
def only_activations_train(model: nn.Module, first: Sequence[nn.Module]) -> Iterator[None]:
    """Gradients start at what enters the first layers; weights get none while the body runs."""

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs[HIDDEN_STATES]
        if not hidden.requires_grad:
            hidden.requires_grad_(True)

    with nothing_else_trains(model), torch.enable_grad(), ExitStack() as undo:
        for layer in first:
            undo.callback(layer.register_forward_pre_hook(start, with_kwargs=True, prepend=True).remove)
        yield


def _add_batch(
    sums: list[_LayerSums],
    seen: list[Seen],
    batch: dict[str, Any],
    data: TaskData,
    loss: Tensor,
) -> int:
    """Add one batch to all sums and return its tokens."""
    if not torch.isfinite(loss):
        raise NonFiniteError("the teacher's loss on the task is NaN or Inf; it overflows on these rows")
    where = [(layer, name) for layer in seen for name in ("attention_read", "mlp_read", "leave")]
    where = [(layer, name) for layer, name in where if getattr(layer, name) is not None]
    gradients = torch.autograd.grad(loss, [getattr(layer, name) for layer, name in where], allow_unused=True)
    found = {(id(layer), name): g for (layer, name), g in zip(where, gradients, strict=True)}
    tokens = 0
    with torch.no_grad():
        for layer, total in zip(seen, sums, strict=True):
            weights = token_weights(batch, data, layer.enter)
            tokens = max(tokens, int(weights.sum().item()))
            _add_influence(total, layer, weights, answer_weights(batch, data, layer.enter))
            for part in SUB_BLOCKS:
                if layer.read(part) is not None:
                    _add_units(total, part, layer.read(part), found[id(layer), f"{part}_read"], weights)
            _add_channels(total, layer.leave, found[id(layer), "leave"], weights)
    return tokens


def _add_influence(total: _LayerSums, layer: Seen, weights: Tensor, answers: Tensor) -> None:
    cosine = F.cosine_similarity(layer.enter.float(), layer.leave.float(), dim=-1)
    for index, weight in enumerate((answers, weights)):
        total.cosines[index] += (weight * (1 - cosine)).sum().item()
        total.weights[index] += weight.sum().item()
    for part, wrote in ((ATTENTION, layer.attention_wrote), (MLP, layer.mlp_wrote)):
        if wrote is not None:
            size = wrote.float().norm(dim=-1) / layer.enter.float().norm(dim=-1).clamp_min(1e-12)
            total.added[part] = total.added.get(part, 0.0) + (answers * size).sum().item()


def _add_units(total: _LayerSums, part: str, read: Tensor, gradient: Tensor | None, weights: Tensor) -> None:
    kept = read.float() * weights.unsqueeze(-1)
    if part == ATTENTION:
        heads = kept.unflatten(-1, (total.heads, total.head_dim)).flatten(0, 1)
        gram = torch.einsum("nhi,nhj->hij", heads, heads).cpu()
        total.head_gram = gram if total.head_gram is None else total.head_gram + gram
    else:
        energy = kept.square().flatten(0, -2).sum(0).cpu()
        total.unit_energy = energy if total.unit_energy is None else total.unit_energy + energy
    if gradient is not None:
        masked = (kept * gradient.float()).sum(1)  # (rows, units): gradient of a mask on each unit of each row
        if part == ATTENTION:
            masked = masked.unflatten(-1, (total.heads, total.head_dim)).sum(-1)
        _add_fisher(total, part, masked)


def _add_channels(total: _LayerSums, leave: Tensor, gradient: Tensor | None, weights: Tensor) -> None:
    kept = leave.float() * weights.unsqueeze(-1)
    energy = kept.square().flatten(0, -2).sum(0).cpu()
    total.hidden_energy = energy if total.hidden_energy is None else total.hidden_energy + energy
    if gradient is not None:
        _add_fisher(total, HIDDEN, (kept * gradient.float()).sum(1))


def _add_fisher(total: _LayerSums, what: str, masked: Tensor) -> None:
    squared = masked.square().sum(0).cpu()
    total.fisher[what] = total.fisher.get(what, torch.zeros_like(squared)) + squared


def _finished(
    family: Family,
    stacks: list[list[tuple[str, nn.Module]]],
    sums: list[_LayerSums],
    data: TaskData,
    tokens: int,
) -> Analysis:
    heads, ffn, influence, everywhere, parts = [], [], [], [], []
    remaining = iter(sums)
    for stack in stacks:
        pairs = [(module, next(remaining)) for _, module in stack]
        heads.append(tuple(_head_scores(module, family, total) for module, total in pairs))
        ffn.append(tuple(_unit_scores(module, family, total) for module, total in pairs))
        influence.append(tuple(t.cosines[0] / max(t.weights[0], 1) for _, t in pairs))
        everywhere.append(tuple(t.cosines[1] / max(t.weights[1], 1) for _, t in pairs))
        parts.append(tuple({p: v / max(t.weights[0], 1) for p, v in t.added.items()} for _, t in pairs))
    # Each layer counts the same in the energy, however large its stream; in the loss they count as they do.
    energy = sum(t.hidden_energy / t.hidden_energy.sum().clamp_min(1e-12) for t in sums)
    fisher = sum(t.fisher.get(HIDDEN, torch.zeros_like(energy)) for t in sums)
    scores = UnitScores(tuple(heads), tuple(ffn), _standard(energy) + _standard(fisher))
    values = (tuple(influence), tuple(everywhere), tuple(parts))
    return Analysis(scores, *values, rows=len(data), tokens=tokens, data=data.fingerprint())


def _head_scores(layer: nn.Module, family: Family, total: _LayerSums) -> Tensor:
    """E‖W_h o_h‖² = tr(W_h G_h W_hᵀ) of each head, and its Fisher information, (heads,)."""
    if total.head_gram is None:
        return torch.zeros(total.heads)
    weight = submodule(layer, family.layout.attention_out).weight.detach().float().cpu()
    blocks = weight.unflatten(1, (total.heads, total.head_dim)).permute(1, 0, 2)
    written = torch.einsum("hoi,hij,hoj->h", blocks, total.head_gram, blocks)
    return _standard(written) + _standard(total.fisher.get(ATTENTION))


def _unit_scores(layer: nn.Module, family: Family, total: _LayerSums) -> Tensor:
    """E a_j² ‖W_j‖² of each unit of the MLP, and its Fisher information, (units,)."""
    writer = submodule(layer, family.layout.mlp_out)
    if total.unit_energy is None:
        return torch.zeros(0)
    written = total.unit_energy * writer.weight.detach().float().cpu().square().sum(0)
    return _standard(written) + _standard(total.fisher.get(MLP))


def _standard(values: Tensor | None) -> Tensor:
    """z-scores of the square roots: energies of units spread over orders of magnitude."""
    if values is None:
        return torch.zeros(())
    size = values.clamp_min(0).sqrt()
    return (size - size.mean()) / size.std(correction=0).clamp_min(1e-12)
