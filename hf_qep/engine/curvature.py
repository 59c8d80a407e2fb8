"""The metric in which an error in the output of a linear costs the model: the output side of its Fisher information.

    L = E[g gᵀ (xᵀ A⁻¹ x) / in],   A = E[x xᵀ]

x is what the linear reads and g the gradient, at its output, of the log-likelihood of labels that are drawn from the
float model's own prediction.  For errors E of the weight the model's divergence is about tr[L E H Eᵀ] / 2; weighing
each token by its leverage is one step of the alternation that fits a Kronecker product L ⊗ A to the Fisher information
in the Kullback-Leibler sense, as KL-Shampoo does.

A method in which every row stands for itself has no use for L: the minimiser of tr[L E H Eᵀ] is then found row by row
if L is diagonal, and nothing else of L could be kept to.  Where rows share something, as the middle of a factored
weight, L decides whose error the shared part goes to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_qep.algorithms.moments import damped, ridge
from hf_qep.architectures.access import get_weight
from hf_qep.architectures.observe import LinearObserver, collect_outputs
from hf_qep.architectures.parts import LinearRef, Structure
from hf_qep.architectures.skeleton import forward_block, forward_rest
from hf_qep.engine.seeds import derived_seed
from hf_qep.engine.sensitivity import drawn_loss

if TYPE_CHECKING:
    from hf_qep.engine.block import Job

ROOM_BYTES = 4 << 30
"""For the matrices of one estimate. Where all linears take more, blocks are estimated in turns, each turn with one pass
from its first block to the end of the model."""


@dataclass
class _Sums:
    """Running sums of one linear."""

    reads: Tensor
    """(in, in): Σ x xᵀ"""
    gradients: Tensor
    """(out, out): Σ g gᵀ (xᵀ A⁻¹ x) / in"""
    tokens: int = 0


@dataclass
class OutputCurvature:
    """Output metrics of the linears of a few blocks at a time, estimated from the blocks that are still float."""

    structure: Structure
    batches: list[dict[str, Tensor]]
    """Inputs of the model, as the streams are batched."""
    damping: float
    found: dict[LinearRef, Tensor] = field(default_factory=dict)
    """(out, out) float32, damped, mean diagonal 1; a linear that no gradient reached is missing."""
    ready: int = 0
    """Blocks before this one have been estimated."""

    def reach(self, job: Job, index: int) -> None:
        """Estimate block `index` and as many behind it as there is room for, unless it is done.

        Call it before the float stream is moved behind that block. Experts are left out: few tokens reach each.
        """
        if index < self.ready:
            return
        self.found.clear()
        refs: list[LinearRef] = []
        for block in self.structure.blocks[index:]:
            more = [ref for group in block.groups for ref in group.linears if _wanted(job, ref)]
            if self.ready > index and _bytes(refs + more) > ROOM_BYTES:
                break
            refs += more
            self.ready = max(self.ready, index) + 1
        if refs:
            self.found = self._estimate(job, index, refs)

    def _estimate(self, job: Job, index: int, refs: list[LinearRef]) -> dict[LinearRef, Tensor]:
        sums = {
            ref: _Sums(torch.zeros(ref.in_features, ref.in_features), torch.zeros(ref.out_features, ref.out_features))
            for ref in refs
        }
        weights = {ref: get_weight(job.model, ref) for ref in refs}
        for number in range(len(job.float_stream)):
            reads: dict[LinearRef, Tensor] = {}
            outputs: dict[LinearRef, Tensor] = {}
            with torch.enable_grad(), LinearObserver(weights, reads.__setitem__, on_output=collect_outputs(outputs)):
                loss = self._loss(job, index, number)
                gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
            for ref, gradient in zip(outputs, gradients, strict=True):
                if gradient is not None:
                    _add(sums[ref], reads[ref].detach(), gradient, self.damping)
        return {ref: _finished(one, self.damping) for ref, one in sums.items() if one.gradients.diagonal().sum() > 0}

    def _loss(self, job: Job, index: int, number: int) -> Tensor:
        block, inputs = self.structure.blocks[index], self.batches[number]
        device = next(job.model.get_submodule(block.name).parameters()).device
        hidden = job.float_stream.get(number, device)
        hidden = forward_block(job.model, block, hidden, job.inputs.call(index, number, device))
        output: Any = forward_rest(job.model, self.structure, index, hidden, inputs)
        generator = torch.Generator().manual_seed(derived_seed("curvature", job.config.seed, number))
        return drawn_loss(output, inputs.get("attention_mask"), generator)[0]


def _wanted(job: Job, ref: LinearRef) -> bool:
    return ref.expert is None and job.recipes[ref].method == "factored"


def _bytes(refs: list[LinearRef]) -> int:
    return sum(4 * (ref.out_features**2 + ref.in_features**2) for ref in refs)


def _add(sums: _Sums, reads: Tensor, gradient: Tensor, damping: float) -> None:
    """Add the tokens of a batch; those without a gradient, such as padding, are left out."""
    x, g = (t.reshape(-1, t.shape[-1]).to(sums.reads) for t in (reads, gradient))
    live = g.any(1)
    x, g = x[live], g[live]
    sums.tokens += len(x)
    sums.reads.addmm_(x.T, x)
    A = damped(sums.reads / max(sums.tokens, 1), ridge(damping, x.shape[1], sums.tokens))
    leverage = torch.linalg.solve_triangular(torch.linalg.cholesky(A), x.T, upper=False).square().sum(0) / len(A)
    sums.gradients.addmm_(g.T * leverage, g)


def _finished(sums: _Sums, damping: float) -> Tensor:
    L = damped(sums.gradients, ridge(damping, len(sums.gradients), sums.tokens))
    return L / L.diagonal().mean()
