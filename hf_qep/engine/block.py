"""One block: observe -> correct -> solve -> pack, group by group, then tune (if asked) and advance.

The float stream runs through the block once, while its weights are still float, and leaves the inputs of every group
behind.  The quantised stream then runs up to each group in turn, so a group sees the error of all groups before it,
and once more to the end: at most groups + 1 passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from hf_qep.algorithms.distillation import NORM_EPS
from hf_qep.algorithms.moments import Moments, ridge
from hf_qep.algorithms.qep import correct_output, correct_target
from hf_qep.algorithms.scales import energy, weighted_error
from hf_qep.architectures.access import get_bias, get_weight
from hf_qep.architectures.observe import LinearObserver, StopForward
from hf_qep.architectures.skeleton import BlockInputs, run_block
from hf_qep.architectures.structure import Block, Group, LinearRef
from hf_qep.config import QepConfig
from hf_qep.distill.teacher import Teacher
from hf_qep.distill.tuned_linear import latents_of
from hf_qep.engine.curvature import OutputCurvature
from hf_qep.engine.equalizing import equalize
from hf_qep.engine.masks import without_padding
from hf_qep.engine.recipes import Recipe
from hf_qep.engine.report import LayerReport, QuantizationReport
from hf_qep.engine.seeds import layer_seed
from hf_qep.engine.streams import Stream, StreamStore
from hf_qep.engine.together.shares import Shares, Sums
from hf_qep.engine.tuning import TuningData, tune_block
from hf_qep.errors import ArchitectureError, NonFiniteError
from hf_qep.heaps import trim_heaps
from hf_qep.methods.problem import LayerProblem
from hf_qep.modules import PackedTensors, QepExpertWeight, packed_like, replace_module
from hf_qep.registry import FORMATS, METHODS

ERROR_ROWS = 256
"""Rows of a linear whose error is reported: all, or at least so many at equal distances."""


@dataclass
class Job:
    """What all blocks of a run share."""

    model: nn.Module
    config: QepConfig
    inputs: BlockInputs
    float_stream: Stream
    quantized_stream: Stream
    store: StreamStore
    report: QuantizationReport
    masks: Sequence[Tensor | None]
    """Padding of every batch, see `engine.masks`."""
    recipes: Mapping[LinearRef, Recipe]
    """Method and spec of every linear."""
    tuning: TuningData | None = None
    """Present if blocks are to be tuned."""
    teacher: Teacher | None = None
    """Outputs of the float model, for training at the end of the model."""
    curvature: OutputCurvature | None = None
    """Present if errors are to be measured in the metric of the model's output."""
    latents: dict[str, dict[str, Tensor]] | None = None
    """Linear -> latents of its sign matrices, for signs that will train."""
    shares: Shares = field(default_factory=Shares)
    """Part of this process; streams, masks and inputs are those of its own batches."""

    @property
    def distills_signs(self) -> bool:
        """Whether signs train in the last step."""
        return self.config.trains_signs(sum(ref.out_features * ref.in_features for ref in self.recipes))

    def strength(self, group: Group) -> float:
        """Propagation alpha of a group."""
        return 0.0 if group.exempt else self.config.propagation * group.strength

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Add the wall time of the body to a phase."""
        return self.report.timed(phase)


@torch.no_grad()
def quantize_block(job: Job, index: int, block: Block) -> None:
    """Quantise all groups of a block in place and move both streams behind it."""
    if job.curvature is not None:
        with job.timed("curvature"):
            job.curvature.reach(job, index)
    with job.timed("float pass"):
        float_sides = _float_pass(job, index, block)
    if job.config.export is not None:
        _equalize(job, block, float_sides)
    passes = 0
    for group, side in zip(block.groups, float_sides, strict=True):
        trim_heaps()  # what was freed is in pieces of other sizes than the next group needs
        with job.timed("observe"):
            moments = _observe(job, index, block, group, side)
            passes += 1
        side.stream.clear()
        solve_group(job, group, moments)
    if job.tuning is not None:
        with job.timed("tune"):
            tune_block(job, index, block)
    with job.timed("advance"):
        device = _device(job.model, block)
        for batch in range(len(job.quantized_stream)):
            _step(job, index, block, job.quantized_stream, batch, device, advance=True)
        passes += 1
    job.report.passes.append((1, passes))


def _device(model: nn.Module, block: Block) -> torch.device:
    return next(model.get_submodule(block.name).parameters()).device


def _step(
    job: Job, index: int, block: Block, stream: Stream, batch: int, device: torch.device, *, advance: bool
) -> None:
    hidden = run_block(job.model, block, stream.get(batch, device), job.inputs.call(index, batch, device))
    if advance:
        stream.replace(batch, hidden)


@dataclass
class FloatSide:
    """What the float stream leaves behind for one group."""

    stream: Stream
    """The group's input or, if `summed`, the sum that its output is a term of; empty without propagation."""
    summed: bool = False
    factor: Tensor | None = None
    """(in,): what the group's input has been multiplied by since."""

    def input(self, batch: int, device: torch.device) -> Tensor:
        """The group's input as its linears would read it now."""
        kept = self.stream.get(batch, device)
        return kept if self.factor is None else (kept * self.factor.to(device)).to(kept.dtype)


def _float_pass(job: Job, index: int, block: Block) -> list[FloatSide]:
    """Advance the float stream and keep its side of every group that propagates errors."""
    kept = [FloatSide(job.store.stream()) for _ in block.groups]
    wanted = {g.linears[0]: s for g, s in zip(block.groups, kept, strict=True) if job.strength(g) > 0}
    device = _device(job.model, block)
    writers = _residual_writers(job, block) if job.config.residual else set()

    def see_sum(ref: LinearRef, total: Tensor) -> None:
        if ref in writers:
            wanted[ref].stream.replace(-1, total)
            wanted[ref].summed = True

    weights = {ref: get_weight(job.model, ref) for ref in wanted}
    with LinearObserver(weights, lambda ref, x: wanted[ref].stream.append(x), see_sum):
        for batch in range(len(job.float_stream)):
            _step(job, index, block, job.float_stream, batch, device, advance=True)
    return kept


def _equalize(job: Job, block: Block, sides: Sequence[FloatSide]) -> None:
    factors = equalize(job.model, block, job.model.config.model_type)
    for group, side in zip(block.groups, sides, strict=True):
        side.factor = factors.get(group.linears[0])


def _residual_writers(job: Job, block: Block) -> set[LinearRef]:
    """Linears that may write to the residual stream: alone in their group, and as wide as the stream.

    The width tells them from projections into an activation that holds a sum of its own, such as GPT-2's gelu.
    """
    width = job.float_stream.get(0, torch.device("cpu")).shape[-1]
    return {g.linears[0] for g in block.groups if len(g.linears) == 1 and g.linears[0].out_features == width}


def _observe(job: Job, index: int, block: Block, group: Group, side: FloatSide) -> Sums:
    """Moments of the quantised stream at a group: one for linears that share their input, one per expert. Where none of
    them will be solved there may be none."""
    experts = group.linears[0].expert is not None
    watched = group.linears if experts else group.linears[:1]
    own = _device(job.model, block)
    cross = len(side.stream) > 0 and not side.summed

    def empty(device: torch.device | str | None) -> Sums:
        gaps = {ref: ref.out_features if side.summed else 0 for ref in watched}
        return {ref: Moments(ref.in_features, cross, device or own, outputs=gap) for ref, gap in gaps.items()}

    def observe(batches: range, moments: Sums) -> None:
        _observe_batches(job, index, block, side, batches, moments)

    return job.shares.add_up(empty, observe, job.store, everywhere=len(group.linears) > 1)


def _observe_batches(job: Job, index: int, block: Block, side: FloatSide, batches: range, moments: Sums) -> None:
    """Add some batches to the moments of a group."""
    experts = next(iter(moments)).expert is not None
    device = _device(job.model, block)
    batch, inputs = 0, {}

    def kept(x: Tensor) -> Tensor:
        return without_padding(x, job.masks[batch])

    def see(ref: LinearRef, x: Tensor) -> None:
        if side.summed:
            inputs[ref] = x
            return
        moments[ref].update(kept(x), kept(side.input(batch, device)) if len(side.stream) else None)
        if not experts:
            raise StopForward

    def see_sum(ref: LinearRef, total: Tensor) -> None:
        if side.summed:
            total = total.float()
            gap = side.stream.get(batch, device).float() - total
            moments[ref].update(kept(inputs.pop(ref)), gap=kept(gap), token_weight=_norm_weight(kept(total)))
            raise StopForward

    with LinearObserver({ref: get_weight(job.model, ref) for ref in moments}, see, see_sum):
        for batch in batches:
            try:
                _step(job, index, block, job.quantized_stream, batch, device, advance=False)
            except StopForward:
                continue


def _norm_weight(total: Tensor) -> Tensor:
    """Weight of each token's error in the residual stream, (...): the next norm divides the token by its size.

    Without it the few tokens with massive activations decide the fit, though the norm makes them as small as others.
    """
    return 1 / (total.square().mean(-1) + NORM_EPS)


def solve_group(job: Job, group: Group, moments: Sums) -> None:
    """Correct, solve and pack the linears of a group and put the packed modules into the model.

    moments: those of the quantised stream, for the first linear or, of experts, for each. Raises ArchitectureError if
    no token was seen, NonFiniteError, IllConditionedError.
    """
    if moments and not group.exempt and not moments[group.linears[0]].count:
        raise ArchitectureError(f"no calibration token reaches `{group.linears[0].name}`; name it in skip_modules")
    pool, solved = _pool(moments), {}
    for ref in job.shares.solved_here(group):
        try:
            solved[ref] = _solve_linear(job, group, ref, moments[ref if ref in moments else group.linears[0]], pool)
        except NonFiniteError as error:
            raise NonFiniteError(f"`{ref.name}`: {error}") from error
    _put_in(job, group, job.shares.exchange(solved))


def _pool(moments: Sums) -> Tensor | None:
    """Hessian over the tokens of all experts."""
    if len(moments) < 2:
        return None
    total = max(1, sum(m.count for m in moments.values()))
    return sum(m.hessian() * (m.count / total) for m in moments.values())


def _hessian(own: Moments, pool: Tensor | None, *, centered: bool) -> Tensor:
    """An expert that saw few tokens borrows the statistics of all: as many tokens' worth as its input is wide."""
    if pool is None:
        return own.hessian(centered=centered)
    share = own.count / (own.count + pool.shape[0])
    return own.hessian() * share + pool * (1 - share)


@dataclass(frozen=True)
class Solved:
    """A linear in its packed form."""

    tensors: dict[str, Tensor]
    bias: Tensor | None
    report: LayerReport

    def cpu(self) -> Solved:
        """The same on the CPU."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        return Solved(tensors, None if self.bias is None else self.bias.cpu(), self.report)


def _solve_linear(job: Job, group: Group, ref: LinearRef, moments: Moments, pool: Tensor | None) -> Solved:
    config, recipe = job.config, job.recipes[ref]
    method, spec = METHODS.get(recipe.method), recipe.spec
    strength = job.strength(group)
    hessian = _hessian(moments, pool, centered=_takes_up_mean(job, ref))
    damping = ridge(config.damping, ref.in_features, moments.count if pool is None else moments.count + len(pool))
    with job.timed("correct"):
        target = _target(job, ref, moments, hessian, strength=strength, damping=damping)
    with job.timed("solve"):
        generator = torch.Generator().manual_seed(layer_seed(config.seed, ref))
        metric = None if job.curvature is None else job.curvature.found.get(ref)
        parts = method.solve(LayerProblem(target, hessian, spec, damping, generator, metric))
    kind = FORMATS.get(spec.format)
    if job.latents is not None and ref.expert is None:
        job.latents[ref.name] = latents_of(parts, kind.assemble, target)
    with job.timed("pack"):
        tensors = {k: v.to(target.device) for k, v in kind.pack(parts, spec).items()}
        shipped = kind.dequantize(tensors, spec, ref.out_features, ref.in_features, torch.float32)
    with job.timed("error"):
        error = _relative_error(shipped, target, hessian)
    report = LayerReport(
        name=ref.name,
        expert=ref.expert,
        out_features=ref.out_features,
        in_features=ref.in_features,
        spec=asdict(spec),
        stored_bits=kind.stored_bits(spec, ref.out_features, ref.in_features),
        error=error,
        tokens=moments.count,
        propagation=strength,
        exempt=group.exempt,
    )
    bias = None if ref.expert is not None else _bias(job, ref, shipped, moments, corrected=strength > 0)
    return Solved(tensors, bias, report)


def _relative_error(shipped: Tensor, target: Tensor, hessian: Tensor) -> float:
    """Of rows at equal distances: of all rows of a wide linear it takes a quarter as long as solving."""
    rows = error_rows(len(target))
    shipped, target = shipped[rows], target[rows]
    return weighted_error(shipped, target, hessian).item() / max(energy(target, hessian).item(), 1e-30)


def error_rows(out_features: int) -> slice:
    """Rows of a linear whose error is reported."""
    return slice(None, None, max(1, out_features // ERROR_ROWS))


def _put_in(job: Job, group: Group, solved: Mapping[LinearRef, Solved]) -> None:
    """Put packed linears into the model in the place of the float ones."""
    packed: dict[str, PackedTensors] = {}
    for ref in group.linears:
        if ref.name not in packed:
            packed[ref.name] = packed_like(job.model, ref.name, job.recipes[ref].spec)
        module, found = packed[ref.name], solved[ref]
        if isinstance(module, QepExpertWeight):
            module.load_packed_expert(ref.expert, found.tensors)
        else:
            module.load_packed(found.tensors)
        if found.bias is not None:
            module.bias.data.copy_(found.bias)
        job.report.layers.append(found.report)
    for name, module in packed.items():
        replace_module(job.model, name, module)


def _target(job: Job, ref: LinearRef, moments: Moments, hessian: Tensor, *, strength: float, damping: float) -> Tensor:
    """What to solve for: the float weight, corrected for the error upstream; float32."""
    weight, centered = get_weight(job.model, ref), _takes_up_mean(job, ref)
    if strength == 0:
        return weight.float()
    if moments.has_output_gap:
        gap = moments.take_output_gap(centered=centered)
        return correct_output(weight, hessian, gap, strength=strength, damping=damping)
    return correct_target(weight, hessian, moments.cross(centered=centered), strength=strength, damping=damping)


def _takes_up_mean(job: Job, ref: LinearRef) -> bool:
    """Whether the bias of a linear will take up the mean error of its output, so that only the rest is to be solved."""
    return job.config.bias_correction and ref.expert is None and get_bias(job.model, ref) is not None


def _bias(job: Job, ref: LinearRef, shipped: Tensor, moments: Moments, *, corrected: bool) -> Tensor | None:
    """The bias; with bias correction the mean output error is moved into it."""
    bias = get_bias(job.model, ref)
    if bias is None:
        return None
    new = bias.float()
    if _takes_up_mean(job, ref):
        mean, weight = moments.mean_quantized(), get_weight(job.model, ref).float()
        new = new + (weight - shipped) @ mean
        if corrected:
            summed = moments.has_output_gap
            new = new + (moments.mean_gap() if summed else weight @ (moments.mean_float() - mean))
    return new
