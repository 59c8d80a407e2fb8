"""Quantise a model larger than memory: one block of weights at a time, each finished block on the disk at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qep.architectures.families import is_expert
from hf_qep.architectures.parts import Block, Structure
from hf_qep.architectures.skeleton import block_inputs, forward_rest, run_block
from hf_qep.conversion import as_stored, finish_loading
from hf_qep.engine.block import Job
from hf_qep.engine.on_demand import BlockWeights, forget_weights
from hf_qep.engine.report import BlockTuning, LayerReport
from hf_qep.engine.residence import Residence, align
from hf_qep.engine.together.streams import restore_stream, save_stream
from hf_qep.engine.unfinished import Unfinished
from hf_qep.errors import ArchitectureError
from hf_qep.modules import cast_weights, packed_like, replace_module
from hf_qep.registry import FORMATS

STREAMS = {"float": "float_stream", "quantized": "quantized_stream"}
"""File -> attribute of a job."""


class Streaming(Residence):
    """Weights of blocks are read when it is their turn, and written to the unfinished job when they are packed.

    trains: the packed model trains as a whole at the end; its blocks are in memory then, and stay there.
    stored_as: dtype in the files of what stays float, if the model computes in another one.
    probe: a few tokens as inputs of the model. What the finished model answers to them is in `answer` at the end.

    Of several processes the first one writes; the others hand it their part of the streams.
    """

    rereads = True

    def __init__(
        self,
        blocks: BlockWeights,
        job: Unfinished,
        probe: dict[str, Tensor],
        stored_as: torch.dtype | None = None,
        *,
        trains: bool = False,
    ) -> None:
        self._blocks, self._unfinished, self._probe, self._trains = blocks, job, probe, trains
        self._stored_as = None if trains else stored_as
        self._writes = True
        self.answer: Tensor | None = None
        """(rows, ...) float32: the first output, unless the model trains."""

    @property
    def files(self) -> list[Path]:
        """Of the finished blocks, in order."""
        return self._unfinished.blocks(len(self._structure.blocks))

    def describe(self, model: Any, sample: dict[str, Tensor], skip_modules: Sequence[str]) -> Structure:
        """See `Residence.describe`. Which linears run in which order is seen with made-up weights, so that each block
        is read once in a job; only where routing decides it, or they do not do, by reading the blocks."""
        if not _routed(model):
            try:
                with self._blocks.made_up():
                    return super().describe(model, sample, skip_modules)
            except ArchitectureError:
                pass
        return super().describe(model, sample, skip_modules)

    def resume(self, job: Job, structure: Structure) -> int:
        """See `Residence.resume`."""
        self._structure, shares = structure, job.shares
        self._writes = shares.processes.first
        self._calls = block_inputs(job.model, structure, [self._probe])
        self._hidden = self._calls.first_hidden.pop()
        sizes = _sizes(job)
        found = shares.processes.from_first(lambda: self._found(*sizes))
        if found is None:
            return 0
        done, folder, state = found
        for name, attribute in STREAMS.items():
            restore_stream(shares, getattr(job, attribute), folder / f"{name}.safetensors")
        if self._writes:
            self._hidden = load_file(folder / "probe.safetensors")["hidden"].to(job.model.device)
        report = state["report"]
        job.report.layers += [LayerReport(**layer) for layer in report["layers"]]
        job.report.tuning += [BlockTuning(**block) for block in report["tuning"]]
        job.report.passes += [tuple(passes) for passes in report["passes"]]
        job.report.seconds.update(report["seconds"])
        _place_packed(job)
        for block in structure.blocks[:done]:
            forget_weights(job.model.get_submodule(block.name))
        return done

    def _found(self, packed: int, state: int) -> tuple[int, Path, dict[str, Any]] | None:
        written, shards = self._unfinished.check_room(packed, state), self._blocks.shards
        one_disk = self._unfinished.folder.stat().st_dev == shards.folder.stat().st_dev
        found = self._unfinished.latest()
        shards.begin(0 if found is None else found[0], written if one_disk else 0)
        return found

    @contextmanager
    def holding(self, model: nn.Module, block: Block) -> Iterator[None]:
        """See `Residence.holding`."""
        with self._blocks.holding(block.name), super().holding(model, block):
            yield

    def finished(self, job: Job, index: int, block: Block) -> None:
        """See `Residence.finished`."""
        if not self._writes:
            self._save_streams(job, None)
            return
        with job.timed("store"):
            module = job.model.get_submodule(block.name)
            if self._stored_as is not None:  # what the files cannot hold is dropped before it is used
                computed = job.model.dtype
                cast_weights(module, self._stored_as)
            state = module.state_dict(prefix=f"{block.name}.")
            self._unfinished.keep_block(index, state if self._trains else as_stored(job.model, state))
            if self._stored_as is not None:
                cast_weights(module, computed)
            finish_loading(module, job.config)
            call = self._calls.call(index, 0, self._hidden.device)
            self._hidden = run_block(job.model, block, self._hidden, call)
        with self._unfinished.keep_state(index + 1, {"report": job.report.to_dict()}) as folder:
            self._save_streams(job, folder)
            save_file({"hidden": self._hidden.cpu().contiguous()}, folder / "probe.safetensors")
        self._blocks.shards.durable(index + 1)

    def _save_streams(self, job: Job, folder: Path | None) -> None:
        for name, attribute in STREAMS.items():
            save_stream(job.shares, getattr(job, attribute), folder and folder / f"{name}.safetensors")

    def float_rest(self, job: Job) -> Any:
        """See `Residence.float_rest`; only rounded tables are not as they were."""
        return self._blocks.reopened() if job.report.tables else job.model

    def gather(self, model: Any) -> None:
        """See `Residence.gather`."""
        for block, path in zip(self._structure.blocks, self.files, strict=True):
            module, device = model.get_submodule(block.name), model.device
            state = {name.removeprefix(f"{block.name}."): t.to(device) for name, t in load_file(path).items()}
            module.load_state_dict(state, assign=True)
            align(module.modules())
            self._blocks.settle(block.name)

    @torch.no_grad()
    def end(self, model: Any) -> None:
        """See `Residence.end`."""
        if self._trains:
            return
        last = len(self._structure.blocks) - 1
        if self._writes:
            self.answer = forward_rest(model, self._structure, last, self._hidden, self._probe)[0].float()


def _sizes(job: Job) -> tuple[int, int]:
    """Bytes of all packed linears, and of what is kept of the streams behind a block."""
    packed = sum(recipe.stored_bits(*ref.shape) for ref, recipe in job.recipes.items()) // 8
    return packed, job.shares.total(sum(getattr(job, attribute).bytes for attribute in STREAMS.values()))


def _routed(model: nn.Module) -> bool:
    """Whether there are experts that are modules of their own: which of them are seen first depends on the weights."""
    return any(isinstance(m, nn.Linear | Conv1D) and is_expert(name) for name, m in model.named_modules())


def _place_packed(job: Job) -> None:
    """Packed modules on meta where the blocks are that were done before."""
    for layer in {layer.name: layer for layer in job.report.layers}.values():
        spec = FORMATS.get(layer.spec["format"]).Spec(**layer.spec)
        replace_module(job.model, layer.name, packed_like(job.model, layer.name, spec, device="meta"))
