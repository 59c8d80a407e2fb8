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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_qep.algorithms.distillation import NORM_EPS
from hf_qep.architectures.parts import Block, Structure
from hf_qep.architectures.skeleton import forward_block, forward_rest, run_block
from hf_qep.distill.trainable import BETAS, HELD_OUT, SCALE_RATE, nothing_else_trains, typical_size, vectors
from hf_qep.distill.tuned_linear import TunedLinear, share_of_flips
from hf_qep.engine.report import BlockTuning
from hf_qep.engine.seeds import derived_seed
from hf_qep.modules import QepLinear, packed_modules, replace_module

if TYPE_CHECKING:
    from hf_qep.engine.block import Job

SIGN_RATE = 1e-2
"""Adam's steps of latents, in units of their scale."""
STEP_TOKENS = 256
"""Tokens per step, about: many small steps turn more signs for the better than few large ones, at the same cost, until
they are too noisy."""


@dataclass
class TuningData:
    """What tuning needs besides the two streams."""

    structure: Structure
    batches: list[dict[str, Tensor]]
    """Inputs of the model, as the streams are batched."""


def rows_per_step(inputs: dict[str, Tensor]) -> int:
    """Rows that have about STEP_TOKENS tokens. inputs: of the model; a row of token ids is as long as it is, one of
    anything else (an image) counts as half a step."""
    length = max((value.shape[1] for value in inputs.values() if value.ndim == 2), default=STEP_TOKENS // 2)
    return max(1, STEP_TOKENS // length)


class _Plain:
    """A float parameter of the block, trained in float32 whatever dtype the model has."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter.requires_grad_(True)
        self.master = nn.Parameter(parameter.detach().float().clone())
        self.rate = SCALE_RATE * typical_size(self.master)

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
        self.linears = {name: TunedLinear(module, job.latents[name]) for name, module in linears.items()}
        self.plain = [_Plain(p) for p in vectors(job.model.get_submodule(block.name))]
        self.weight = None if job.config.tune_lookahead is None else _next_norm(job.model, self.data, self._last())

    def _rows(self, batch: int) -> slice:
        """Rows of the calibration data that make up a batch: all batches but the last are as large as the first."""
        size = len(self.data.batches[0][next(iter(self.data.batches[0]))])
        return slice(batch * size, (batch + 1) * size)

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
            return job.teacher.loss(output, self._rows(batch), inputs.get("attention_mask"))
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
        optimizer = torch.optim.Adam(self._rates(), betas=BETAS, fused=True)
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
        return share_of_flips(self.linears, self.job.latents)

    def _rates(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for module in self.linears.values():
            groups.append({"params": list(module.latents.values()), "lr": SIGN_RATE})
            groups.append({"params": list(module.scales.values()), "lr": SCALE_RATE})
            if module.bias is not None:
                groups.append({"params": [module.bias], "lr": SCALE_RATE * typical_size(module.bias)})
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
    floats = [(p, p.detach().clone()) for p in vectors(job.model.get_submodule(block.name))]
    with nothing_else_trains(job.model):
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
        for parameter, value in floats:
            parameter.data.copy_(value)
        epoch, after, flips = 0, before, 0.0
    counts = len(tuner.train), len(tuner.held)
    job.report.tuning.append(BlockTuning(*counts, before, after, epoch, flips, block=block.name))
    if epoch:
        job.latents.update({n: {k: u.detach() for k, u in t.latents.items()} for n, t in tuner.linears.items()})


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
