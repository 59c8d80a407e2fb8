"""Where the weights of blocks are while a model is quantised, and what becomes of a block that is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_qep.architectures.parts import Block, Structure
from hf_qep.architectures.skeleton import forward_rest
from hf_qep.architectures.structure import describe
from hf_qep.config import AUTO, QepConfig
from hf_qep.distill.teacher import Teacher, count_rows, keep_teacher

if TYPE_CHECKING:
    from hf_qep.engine.block import Job

CACHE_LINE = 64
"""Bytes; torch's own tensors begin at a multiple of it."""


def why_in_memory(config: QepConfig, weights: int) -> str | None:
    """What in a recipe needs all weights at once, None if nothing does. weights: quantised ones of the model."""
    if config.trains_signs(weights):
        return f"distill_epochs {config.distill_epochs} trains all signs together (--no-distill-signs only scales)"
    if config.tune_epochs:
        return f"tune_epochs {config.tune_epochs} trains through the blocks behind"
    if config.method == AUTO:
        return f"method `{AUTO}` compares all layers first"
    if config.method == "factored" and config.output_curvature:
        return "method `factored` measures how the whole model's output depends on each layer"
    return None


class Residence:
    """All in memory, before and after. `engine.streaming` has the other kind, which holds one block at a time."""

    rereads = False
    """Whether what lies outside the blocks can be had as it was, after the tables have been rounded."""

    def describe(self, model: Any, sample: dict[str, Tensor], skip_modules: Sequence[str]) -> Structure:
        """See `architectures.structure.describe`."""
        return describe(model, sample, skip_modules)

    def resume(self, job: Job, structure: Structure) -> int:
        """Number of blocks that were done before, with streams and report as they were left; called before the first
        block."""
        return 0

    @contextmanager
    def holding(self, model: nn.Module, block: Block) -> Iterator[None]:
        """The weights of a block are in memory while the body runs, at addresses that `align` allows."""
        align(model.get_submodule(block.name).modules())
        yield

    def finished(self, job: Job, index: int, block: Block) -> None:
        """A block is packed and both streams are behind it; called inside `holding`."""

    def teacher(self, job: Job, structure: Structure, batches: Sequence[dict[str, Tensor]]) -> Teacher:
        """What the float model says of all rows, by its stream behind the last block."""
        return keep_teacher(_outputs(self.float_rest(job), job, structure, batches), count_rows(batches))

    def float_rest(self, job: Job) -> Any:
        """The model with what lies outside the blocks as it was."""
        return job.model

    def gather(self, model: Any) -> None:
        """All blocks are done, and are to be in memory, packed, from now on."""

    def end(self, model: nn.Module) -> None:
        """All blocks are done, and the model is marked as quantised."""


def _outputs(model: Any, job: Job, structure: Structure, batches: Sequence[dict[str, Tensor]]) -> Iterator[Any]:
    last = len(structure.blocks) - 1
    for number, batch in enumerate(batches):
        yield forward_rest(model, structure, last, job.float_stream.get(number, model.device), batch)


def align_outside(model: nn.Module, structure: Structure) -> None:
    """`align` what lies outside the blocks."""
    inside = {id(m) for block in structure.blocks for m in model.get_submodule(block.name).modules()}
    align(module for module in model.modules() if id(module) not in inside)


def align(modules: Iterable[nn.Module]) -> None:
    """Move weights to where torch would have put them.

    Weights that are mapped from a file begin wherever its header ends, and products and sums round differently for
    other alignments: the result would depend on the length of a header.
    """
    moved: dict[tuple, Tensor] = {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or tensor.device.type != "cpu" or not tensor.data_ptr() % CACHE_LINE:
                continue
            place = tensor.data_ptr(), tensor.shape, tensor.stride()
            tensor.data = moved.setdefault(place, tensor.data.clone())
