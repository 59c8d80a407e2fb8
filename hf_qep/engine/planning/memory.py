"""Peak memory and disk of a job: of one that reads block by block, and of one that has the whole model in memory.

The sums follow the engine. While a block is done there are: what lies outside the blocks, the block (float, and what
is packed of it already), the activations of both streams and those that the float pass left behind, the moments of the
widest group, and what solving one of its linears takes. The last is measured, see `costs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hf_qep.config import QepConfig
from hf_qep.distill.teacher import ROOM_BYTES as TEACHER_BYTES
from hf_qep.engine.planning.block_memory import FLOAT32, WAITING, Parts, Workspace, block_moments, block_width
from hf_qep.engine.planning.output import OutputPlan
from hf_qep.engine.planning.sketch import Sketch
from hf_qep.engine.residence import why_in_memory
from hf_qep.engine.streams import ROOM_BYTES, room_bytes
from hf_qep.engine.tables import PANEL_WEIGHTS
from hf_qep.engine.tuning import STEP_TOKENS
from hf_qep.engine.unfinished import KEPT

ACTIVATIONS = "activations"
STATES = KEPT + 1
"""States of an unfinished job on the disk: those that are kept, and one that is being written."""
ROUNDING_COPIES = 7
"""float32 copies of a panel while a table is rounded."""
BYTES_PER_SIGN = 24
"""float32 numbers that training holds for each sign: latent, gradient, two moments, the best latent, the weight."""
DENSE_COPIES, LOGIT_COPIES = 1.25, 6.5
"""float32 copies of the weights of a block, and of the logits of a step, at the peak of training scales; measured on
models of width 256 to 1024 with 512 to 16,384 classes."""


@dataclass(frozen=True)
class Peak:
    """Bytes by part at the moment when most is held, and which moment that is."""

    moment: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return {"bytes": self.bytes, "moment": self.moment, "parts": self.parts}


@dataclass(frozen=True)
class JobMemory:
    """What a job takes at its peak. vram: None if it runs on the processor."""

    streaming: bool
    why: str
    """Why the weights are read block by block, or why they are not."""
    ram: Peak
    vram: Peak | None
    disk: Peak
    spilled: int
    """Activations that go to the disk."""


def job_memory(
    sketch: Sketch,
    output: OutputPlan,
    recipe: QepConfig,
    workspace: Workspace,
    *,
    on_gpu: bool = False,
    whole: bool | None = None,
    stream_room: int | None = None,
    process: int = 0,
    free: int | None = None,
) -> JobMemory:
    """Peaks of quantising. on_gpu: weights and solving there, activations in RAM. whole: have the whole model in memory
    although the recipe does not need it. stream_room: bytes of activations in memory; None: what the engine takes of
    `free` bytes. process: bytes that the interpreter and its libraries take.
    """
    reason = why_in_memory(recipe, output.linear_weights)
    streaming = reason is None if whole is None else not whole
    streams = stream_bytes(sketch, recipe)
    room = stream_room
    if room is None:
        room = ROOM_BYTES if free is None or not streaming else room_bytes(free)
    moments = _moments(sketch, output, recipe, workspace, streaming)
    kept = max(streams + _kept(parts) for _, parts in moments)
    ram, vram = _peaks(sketch, moments, streams, room, process, streaming=streaming, on_gpu=on_gpu)
    return JobMemory(
        streaming=streaming,
        why=(reason or "all weights are asked for at once") if not streaming else "no option needs all weights at once",
        ram=ram,
        vram=vram,
        disk=_disk(sketch, output, streams, max(0, kept - room), streaming),
        spilled=max(0, kept - room),
    )


def stream_bytes(sketch: Sketch, recipe: QepConfig) -> int:
    """Activations of all calibration tokens at one place of the model, in both streams."""
    return 2 * recipe.num_samples * recipe.seq_len * sketch.hidden * sketch.dtype.itemsize


def _moments(
    sketch: Sketch, output: OutputPlan, recipe: QepConfig, workspace: Workspace, streaming: bool
) -> list[tuple[str, Parts]]:
    """(moment, what is held by part); activations are those besides both streams."""
    outside = output.tensors - sum(output.packed_blocks) if streaming else sketch.outside_bytes
    found = []
    for block, packed in zip(sketch.blocks, output.packed_blocks, strict=True):
        held = {"weights outside the blocks": outside}
        if not streaming:
            held["weights of other blocks"] = sketch.float_bytes - sketch.outside_bytes - block.float_bytes
        found += [(name, held | parts) for name, parts in block_moments(sketch, block, packed, recipe, workspace)]
    if output.table_bytes:
        tables = {"weights outside the blocks": sketch.outside_bytes, "rounded tables": output.table_bytes}
        tables["work of rounding"] = ROUNDING_COPIES * FLOAT32 * PANEL_WEIGHTS
        if not streaming:
            tables["weights of all blocks"] = sketch.float_bytes - sketch.outside_bytes
        found.append(("rounding embedding and head", tables))
    return found + _training(sketch, output, recipe)


def _kept(parts: Parts) -> int:
    """Bytes that may go to the disk."""
    return int(parts.get(ACTIVATIONS, 0) + parts.get(WAITING, 0))


def _peaks(
    sketch: Sketch,
    moments: list[tuple[str, Parts]],
    streams: int,
    room: int,
    process: int,
    *,
    streaming: bool,
    on_gpu: bool,
) -> tuple[Peak, Peak | None]:
    """RAM, and memory of the GPU if there is one."""
    of_process, arriving = {"interpreter and libraries": process}, {}
    if on_gpu and streaming:
        arriving["a block on its way"] = max(block.float_bytes for block in sketch.blocks)
    there, here = [], []
    for name, parts in moments:
        weights = {part: size for part, size in parts.items() if part not in (ACTIVATIONS, WAITING)}
        activations = streams + parts.get(ACTIVATIONS, 0)
        kept = {ACTIVATIONS: min(activations, room), WAITING: min(parts.get(WAITING, 0), max(0, room - activations))}
        there.append((name, weights))
        here.append((name, of_process | kept | (arriving if on_gpu else weights)))
    if not on_gpu:
        return _largest(here), None
    loaded = sketch.outside_bytes if streaming else sketch.float_bytes
    here.append(("loading", of_process | {"weights on their way": loaded}))
    return _largest(here), _largest(there)


def _training(sketch: Sketch, output: OutputPlan, recipe: QepConfig) -> list[tuple[str, Parts]]:
    """The moment of training at the end, if there is one."""
    if not recipe.distill_epochs:
        return []
    if recipe.trains_signs(output.linear_weights):
        training = sketch.float_bytes + BYTES_PER_SIGN * output.linear_weights
    else:
        training = scale_training_bytes(sketch, output, recipe)
    return [("training of the whole model", {"packed model": output.tensors, "training": training})]


def scale_training_bytes(sketch: Sketch, output: OutputPlan, recipe: QepConfig) -> int:
    """Bytes that training all scales takes besides the packed model: float32 copies of what stays float, what each
    block hands to the next, then either one block made dense or what the loss makes of the logits, and the teacher."""
    tokens = max(1, STEP_TOKENS // recipe.seq_len) * recipe.seq_len
    floats = FLOAT32 * (output.tensors - sum(output.packed_blocks) - output.table_bytes) // sketch.dtype.itemsize
    handed = FLOAT32 * tokens * sketch.hidden * len(sketch.blocks)
    dense = max(FLOAT32 * sum(math.prod(ref.shape) for ref in block.linears) for block in sketch.blocks)
    passing = max(FLOAT32 * tokens * block_width(sketch, block) for block in sketch.blocks)
    places, classes = recipe.num_samples * recipe.seq_len, sketch.vocabulary or 0
    logits = FLOAT32 * tokens * classes
    teacher = min(TEACHER_BYTES, 2 * places * classes)
    return int(floats + handed + max(DENSE_COPIES * dense + passing, LOGIT_COPIES * logits) + teacher)


def _disk(sketch: Sketch, output: OutputPlan, streams: int, spilled: int, streaming: bool) -> Peak:
    parts = {"float model": sketch.float_bytes, "output": output.file_bytes, "activations": spilled}
    if streaming:
        parts |= {"finished blocks": sum(output.packed_blocks), "states to go on from": STATES * streams}
    return Peak("the end", parts)


def _largest(moments: list[tuple[str, Parts]]) -> Peak:
    peaks = [Peak(name, {part: int(size) for part, size in parts.items() if size >= 1}) for name, parts in moments]
    return max(peaks, key=lambda peak: peak.bytes)
