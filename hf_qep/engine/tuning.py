"""Tune a quantised block: its signs, scales, norms and biases are trained together, so that the model behind it answers
as the float model does.

The blocks behind are still float. The loss is taken at the end of the model (KL to the float model's outputs; relative
squared error where the outputs are no logits), or after `tune_lookahead` more blocks (squared error of the hidden
state, each token and channel weighted as the next norm weighs it).  The end of the model costs more and is worth it:
the error of one block's own output does not tell which part of it matters.

Some of the batches are never trained on.  The state with the lowest loss on them is kept, as it will be stored, and
that is the solved state if none is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_qep.algorithms.distillation import TopClasses, divergence, top_classes
from hf_qep.algorithms.straight_through import start_latents, trained_sign
from hf_qep.architectures.parts import Block, Structure
from hf_qep.architectures.skeleton import forward_block, forward_rest, run_block
from hf_qep.engine.report import BlockTuning
from hf_qep.engine.seeds import derived_seed
from hf_qep.modules import QepLinear, packed_modules, replace_module

if TYPE_CHECKING:
    from hf_qep.engine.block import Job

HELD_OUT = 8
"""One batch in so many is not trained on."""
SIGN_RATE, SCALE_RATE = 1e-2, 3e-3
"""Adam's steps, of latents in units of their scale, and of everything else relative to its size; both fall as a cosine
to 0. A factor of three in either changes the outcome by less than twice the epochs do."""
BETAS = (0.9, 0.95)
STEP_TOKENS = 256
"""Tokens per step, about: many small steps turn more signs for the better than few large ones, at the same cost, until
they are too noisy."""
NORM_EPS = 1e-6
TEACHER_BYTES, LEAST_CLASSES = 1 << 29, 64
"""Room for the outputs of the float model, and classes kept per token where that is not enough for all of them. What
the classes that are left out get is not trained: 64 of 2,048 kept a third less of the gain than all of them."""


@dataclass
class TuningData:
    """What tuning needs besides the two streams."""

    structure: Structure
    batches: list[dict[str, Tensor]]
    """Inputs of the model, as the streams are batched."""
    teacher: list[TopClasses | Tensor]
    """Output of the float model for each batch; empty with a lookahead."""
    latents: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Linear of the present block -> latents of its sign matrices."""


def rows_per_step(inputs: dict[str, Tensor]) -> int:
    """Rows that have about STEP_TOKENS tokens. inputs: of the model; a row of token ids is as long as it is, one of
    anything else (an image) counts as half a step."""
    length = max((value.shape[1] for value in inputs.values() if value.ndim == 2), default=STEP_TOKENS // 2)
    return max(1, STEP_TOKENS // length)


@torch.no_grad()
def tuning_data(model: Any, structure: Structure, batches: list[dict[str, Tensor]], config: Any) -> TuningData:
    """Take the outputs of the float model, before any block is changed."""
    teacher: list[TopClasses | Tensor] = []
    for batch in batches if config.tune_lookahead is None else ():
        output = model(**{key: value.to(model.device) for key, value in batch.items()})
        logits = getattr(output, "logits", None)
        if logits is None:
            teacher.append(output[0].cpu())
            continue
        places = len(batches) * logits.shape[:-1].numel()
        kept = top_classes(logits, max(LEAST_CLASSES, TEACHER_BYTES // (8 * places)))
        teacher.append(TopClasses(kept.index.cpu(), kept.log_p.cpu()))
    return TuningData(structure, batches, teacher)


def latents_of(parts: dict[str, Tensor], assemble: Any, target: Tensor) -> dict[str, Tensor]:
    """Latents of every sign matrix of a solved linear.

    A method may give them itself, as `<name>_latent` among its parts; a single matrix called `signs` gets them from the
    weight (out, in) that was solved for.
    """
    given = {name: parts[f"{name}_latent"] for name in parts if f"{name}_latent" in parts}
    if given:
        return given
    floats = {name: torch.ones(p.shape) if p.dtype == torch.bool else p for name, p in parts.items()}
    size = assemble({name: p.to(target.device) for name, p in floats.items()})
    ratio = target / size.clamp_min(torch.finfo(size.dtype).tiny)
    return {"signs": start_latents(parts["signs"].to(target.device), ratio)}


class TunedLinear(nn.Module):
    """A packed linear while it is trained: float32 latents and logarithms of scales; x (..., in) -> (..., out)."""

    def __init__(self, packed: QepLinear, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._packed = [packed]  # in a list: its tensors are not parameters of this module
        parts = packed.format.unpack(packed.packed_state(), packed.spec, packed.out_features, packed.in_features)
        scales = {name: part for name, part in parts.items() if part.dtype != torch.bool}
        tiny = torch.finfo(torch.float16).tiny
        self.latents = nn.ParameterDict({name: latents[name].float().clone() for name in parts if name not in scales})
        self.scales = nn.ParameterDict({name: s.clamp_min(tiny).log() for name, s in scales.items()})
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Product in the dtype of x; the weight is put together in float32."""
        signs = {name: trained_sign(latent) for name, latent in self.latents.items()}
        weight = self._packed[0].format.assemble(signs | {name: s.exp() for name, s in self.scales.items()})
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def packed(self) -> QepLinear:
        """The packed linear with what was trained."""
        packed = self._packed[0]
        parts = {name: latent >= 0 for name, latent in self.latents.items()}
        parts |= {name: s.exp() for name, s in self.scales.items()}
        packed.load_packed(packed.format.pack(parts, packed.spec))
        if self.bias is not None:
            packed.bias.data.copy_(self.bias)
        return packed


class _Plain:
    """A float parameter of the block, trained in float32 whatever dtype the model has."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter.requires_grad_(True)
        self.master = nn.Parameter(parameter.detach().float().clone())
        size = self.master.detach().square().mean().sqrt().item()
        self.rate = SCALE_RATE * (size or 1.0)

    def take_gradient(self) -> None:
        gradient = self.parameter.grad
        self.master.grad = None if gradient is None else gradient.float()
        self.parameter.grad = None

    @torch.no_grad()
    def give(self) -> None:
        self.parameter.copy_(self.master)


class _Tuner:
    """Training of one block."""

    def __init__(self, job: Job, index: int, block: Block, linears: dict[str, QepLinear]) -> None:
        self.job, self.index, self.block, self.data = job, index, block, job.tuning
        self.device = next(job.model.get_submodule(block.name).parameters()).device
        count = len(job.quantized_stream)
        held = max(1, count // HELD_OUT)
        self.train, self.held = list(range(count - held)), list(range(count - held, count))
        self.linears = {name: TunedLinear(module, self.data.latents[name]) for name, module in linears.items()}
        self.plain = [_Plain(p) for p in _vectors(job.model.get_submodule(block.name))]
        self.weight = None if job.config.tune_lookahead is None else _next_norm(job.model, self.data, self._last())

    def _last(self) -> int:
        """Block after which the loss is taken."""
        return min(self.index + self.job.config.tune_lookahead, len(self.data.structure.blocks) - 1)

    def loss(self, batch: int) -> Tensor:
        """Mean over the tokens of a batch."""
        job, blocks = self.job, self.data.structure.blocks
        hidden = job.quantized_stream.get(batch, self.device)
        hidden = forward_block(job.model, self.block, hidden, job.inputs.call(self.index, batch, self.device))
        if self.weight is None:
            inputs = self.data.batches[batch]
            output = forward_rest(job.model, self.data.structure, self.index, hidden, inputs)
            return _output_loss(output, self.data.teacher[batch], inputs.get("attention_mask"))
        wanted = job.float_stream.get(batch, self.device)
        for later in range(self.index + 1, self._last() + 1):
            call = job.inputs.call(later, batch, self.device)
            hidden = forward_block(job.model, blocks[later], hidden, call)
            wanted = run_block(job.model, blocks[later], wanted, call)
        return _hidden_loss(hidden, wanted, self.weight)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over the batches that are not trained on."""
        return sum(self.loss(batch).item() for batch in self.held) / len(self.held)

    def install(self, linears: Mapping[str, nn.Module]) -> None:
        """Put these modules in the places of their names."""
        for name, module in linears.items():
            replace_module(self.job.model, name, module)

    def state(self) -> list[Tensor]:
        """Copies of all that is trained."""
        return [p.detach().clone() for p in self.parameters()]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Go back to a state."""
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.copy_(value)
        self._give()

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, in a fixed order."""
        own = [p for module in self.linears.values() for p in module.parameters()]
        return own + [plain.master for plain in self.plain]

    def run(self, epochs: int, before: float) -> int:
        """Train and return to the epoch with the lowest loss on the held-out batches: its number, 0 if all are above
        `before`."""
        optimizer = torch.optim.Adam(self._rates(), betas=BETAS)
        steps = epochs * len(self.train)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
        generator = torch.Generator().manual_seed(derived_seed("tune", self.job.config.seed, self.block.name))
        best, lowest, kept = 0, before, self.state()
        for epoch in range(1, epochs + 1):
            for position in torch.randperm(len(self.train), generator=generator).tolist():
                optimizer.zero_grad()
                with torch.enable_grad():
                    self.loss(self.train[position]).backward()
                for plain in self.plain:
                    plain.take_gradient()
                optimizer.step()
                schedule.step()
                self._give()
            loss = self.held_out_loss()
            if loss < lowest:
                best, lowest, kept = epoch, loss, self.state()
        self.restore(kept)
        return best

    def flips(self) -> float:
        """Share of the signs that differ from the solved ones."""
        pairs = [
            (latent >= 0, self.data.latents[name][key] >= 0)
            for name, module in self.linears.items()
            for key, latent in module.latents.items()
        ]
        return sum((now != then).sum().item() for now, then in pairs) / sum(now.numel() for now, _ in pairs)

    def _rates(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for module in self.linears.values():
            groups.append({"params": list(module.latents.values()), "lr": SIGN_RATE})
            groups.append({"params": list(module.scales.values()), "lr": SCALE_RATE})
            if module.bias is not None:
                size = module.bias.detach().square().mean().sqrt().item()
                groups.append({"params": [module.bias], "lr": SCALE_RATE * (size or 1.0)})
        return groups + [{"params": [plain.master], "lr": plain.rate} for plain in self.plain]

    def _give(self) -> None:
        for plain in self.plain:
            plain.give()


def tune_block(job: Job, index: int, block: Block) -> None:
    """Train a block whose linears are packed, in place, and report it. Experts keep their solved signs.

    With fewer than two batches nothing can be held out, and nothing is done.
    """
    linears = {
        name: module
        for name, module in packed_modules(job.model).items()
        if isinstance(module, QepLinear) and name.startswith(f"{block.name}.")
    }
    if not linears or len(job.quantized_stream) < 2:
        return
    solved = {name: {k: t.clone() for k, t in module.state_dict().items()} for name, module in linears.items()}
    vectors = [(p, p.detach().clone()) for p in _vectors(job.model.get_submodule(block.name))]
    with _nothing_else_trains(job.model):
        tuner = _Tuner(job, index, block, linears)
        before = tuner.held_out_loss()
        tuner.install(tuner.linears)
        epoch = tuner.run(job.config.tune_epochs, before)
        flips = tuner.flips()
        tuner.install({name: module.packed() for name, module in tuner.linears.items()})
        after = tuner.held_out_loss()
    if not epoch or not after < before:  # rounding of the scales can undo a small gain
        for name, module in linears.items():
            module.load_state_dict(solved[name])
        for parameter, value in vectors:
            parameter.data.copy_(value)
        epoch, after, flips = 0, before, 0.0
    counts = len(tuner.train), len(tuner.held)
    job.report.tuning.append(BlockTuning(block.name, *counts, before, after, epoch, flips))
    job.tuning.latents.clear()


@contextmanager
def _nothing_else_trains(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the body runs, but those that it sets; all are as before afterwards."""
    before = [p for p in model.parameters() if p.requires_grad]
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in before:
            parameter.requires_grad_(True)


def _vectors(block: nn.Module) -> list[nn.Parameter]:
    """Vectors of a block that belong to no quantised linear: weights and biases of norms, biases of float linears."""
    owners = [module for module in block.modules() if not isinstance(module, TunedLinear | QepLinear)]
    own = [p for module in owners for p in module.parameters(recurse=False)]
    return [p for p in own if p.ndim == 1 and p.is_floating_point()]


def _next_norm(model: nn.Module, data: TuningData, last: int) -> Tensor:
    """Squared weight (hidden,) of the norm that reads the hidden state behind block `last`; 1 if there is none.

    It is the first vector inside the next block, or the last one beside the chain of blocks.
    """
    blocks = data.structure.blocks
    if last + 1 < len(blocks):
        found = [m for m in model.get_submodule(blocks[last + 1].name).modules() if _is_norm(m)][:1]
    else:
        owner = model.get_submodule(blocks[last].name.rpartition(".")[0].rpartition(".")[0])
        found = [m for m in owner.children() if _is_norm(m)][-1:]
    return found[0].weight.detach().float().square() if found else torch.ones(())


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _hidden_loss(hidden: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    wanted = wanted.float()
    size = wanted.square().mean(-1, keepdim=True) + NORM_EPS
    return ((hidden.float() - wanted).square() / size * weight.to(wanted.device)).mean()


def _output_loss(output: Any, teacher: TopClasses | Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that the mask (rows, tokens) does not leave out."""
    if isinstance(teacher, TopClasses):
        moved = TopClasses(teacher.index.to(output.logits.device), teacher.log_p.to(output.logits.device))
        each = divergence(moved, output.logits)
    else:
        found, wanted = output[0].float(), teacher.to(output[0].device).float()
        each = (found - wanted).square().mean(-1) / (wanted.square().mean(-1) + NORM_EPS)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    kept = mask.to(each)
    return (each * kept).sum() / kept.sum().clamp_min(1)
