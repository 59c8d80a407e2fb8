"""Peak memory and disk of a job: of one that reads block by block, and of one that has the whole model in memory.

The sums follow the engine. While a block is done there are: what lies outside the blocks, the block (float, and what
is packed of it already), the activations of both streams and those that the float pass left behind, the moments of the
widest group, and what solving one of its linears takes. The last is measured, see `costs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_qep.config import AUTO, QepConfig
from hf_qep.distill.teacher import ROOM_BYTES as TEACHER_BYTES
from hf_qep.engine.extent import training_memory
from hf_qep.engine.planning.output import OutputPlan
from hf_qep.engine.planning.sketch import BlockSketch, GroupSketch, Sketch
from hf_qep.engine.residence import why_in_memory
from hf_qep.engine.streams import ROOM_BYTES, room_bytes
from hf_qep.engine.tables import PANEL_WEIGHTS
from hf_qep.engine.together.shares import waiting_bytes
from hf_qep.engine.tuning import STEP_TOKENS
from hf_qep.engine.unfinished import KEPT

FLOAT32 = 4
STATES = KEPT + 1
"""States of an unfinished job on the disk: those that are kept, and one that is being written."""
ROUNDING_COPIES = 7
"""float32 copies of a panel while a table is rounded."""
PASS_TENSORS = 6
"""Tensors as wide as the stream, besides the outputs of the linears, that a block holds while it runs."""
DENSE_COPIES, LOGIT_COPIES = 1.25, 6.5
"""float32 copies of the weights of a block, and of the logits of a step, at the peak of training scales; measured on
models of width 256 to 1024 with 512 to 16,384 classes."""
OBSERVED_COPIES = 3
"""float32 copies of a group's input while its moments are taken."""

Workspace = Callable[[str, int, int], float]
"""(method, out, in) -> bytes that correcting and solving a linear takes besides its moments."""


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
    streams, left = stream_bytes(sketch, recipe), left_behind_bytes(sketch, recipe)
    room = stream_room
    if room is None:
        room = ROOM_BYTES if free is None or not streaming else room_bytes(free)
    kept = streams + left + _waiting(sketch, recipe)
    spilled = max(0, kept - room)
    host = {"interpreter and libraries": process, "activations": min(kept, room)}
    moments = _moments(sketch, output, recipe, workspace, streaming)
    if on_gpu:
        vram = _largest(moments)
        loading = sketch.outside_bytes if streaming else sketch.float_bytes
        block = max(block.float_bytes for block in sketch.blocks)
        ram = _largest(
            {
                "loading": {"interpreter and libraries": process, "weights on their way": loading},
                "a block": host | {"a block on its way": block if streaming else 0},
            }
        )
    else:
        vram, ram = None, _largest({name: host | parts for name, parts in moments.items()})
    return JobMemory(
        streaming=streaming,
        why=(reason or "all weights are asked for at once") if not streaming else "no option needs all weights at once",
        ram=ram,
        vram=vram,
        disk=_disk(sketch, output, streams, spilled, streaming),
        spilled=spilled,
    )


def stream_bytes(sketch: Sketch, recipe: QepConfig) -> int:
    """Activations of all calibration tokens at one place of the model, in both streams."""
    return 2 * recipe.num_samples * recipe.seq_len * sketch.hidden * sketch.dtype.itemsize


def left_behind_bytes(sketch: Sketch, recipe: QepConfig) -> int:
    """What the float pass leaves behind in a block: an activation per group that propagates errors."""
    if not recipe.propagation:
        return 0
    widths = [
        sum(
            sketch.hidden if _summed(group, recipe) else group.in_features for group in block.groups if not group.exempt
        )
        for block in sketch.blocks
    ]
    return recipe.num_samples * recipe.seq_len * max(widths) * sketch.dtype.itemsize


def group_bytes(group: GroupSketch, recipe: QepConfig, workspace: Workspace, observing: float) -> float:
    """Moments of a group, and what is held beside them: what observing takes, or then the workspace of a linear."""
    method = "sign" if recipe.method == AUTO else recipe.method
    space = max(workspace(method, ref.out_features, ref.in_features) for ref in group.linears)
    if group.linears[0].expert is not None:
        space += 2 * FLOAT32 * group.in_features**2  # the mean of all moments, and the mix of an expert
    return moment_bytes(group, recipe) + max(observing, space)


def moment_bytes(group: GroupSketch, recipe: QepConfig) -> int:
    """Moments of a group; experts have one each."""
    square = FLOAT32 * group.in_features**2
    if group.linears[0].expert is not None:
        return square * len(group.linears)
    if group.exempt or not recipe.propagation:
        return square
    return square + (FLOAT32 * group.linears[0].out_features * group.in_features if _summed(group, recipe) else square)


def _waiting(sketch: Sketch, recipe: QepConfig) -> int:
    """Sums of some rows that wait with the activations while others grow."""
    groups = (group for block in sketch.blocks for group in block.groups)
    return max((waiting_bytes(moment_bytes(group, recipe)) for group in groups), default=0)


def _summed(group: GroupSketch, recipe: QepConfig) -> bool:
    return bool(recipe.residual and group.writes)


def _moments(
    sketch: Sketch, output: OutputPlan, recipe: QepConfig, workspace: Workspace, streaming: bool
) -> dict[str, dict[str, int]]:
    """Name of a moment -> what is held where the weights are."""
    tables = {"weights outside the blocks": sketch.outside_bytes, "rounded tables": output.table_bytes}
    tables["work of rounding"] = ROUNDING_COPIES * FLOAT32 * PANEL_WEIGHTS if output.table_bytes else 0
    outside = output.tensors - sum(output.packed_blocks)
    blocks = [
        _block(sketch, block, packed, recipe, workspace)
        for block, packed in zip(sketch.blocks, output.packed_blocks, strict=True)
    ]
    block = max(blocks, key=lambda parts: sum(parts.values()))
    training = _training(sketch, output, recipe)
    if streaming:
        found = {"a block": {"weights outside the blocks": outside} | block} | training
        if output.table_bytes:
            found["embedding and head"] = tables
        return found
    block |= {"a block of float weights": 0, "weights of all blocks": sketch.float_bytes - sketch.outside_bytes}
    return {"a block": {"weights outside the blocks": sketch.outside_bytes} | block} | training


def _training(sketch: Sketch, output: OutputPlan, recipe: QepConfig) -> dict[str, dict[str, int]]:
    """The moment of training at the end, if there is one."""
    if not recipe.distill_epochs:
        return {}
    if recipe.trains_signs(output.linear_weights):
        training = training_memory(output.linear_weights, sketch.float_bytes, recipe)
    else:
        training = scale_training_bytes(sketch, output, recipe)
    return {"training of the whole model": {"packed model": output.tensors, "training": training}}


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


def _block(sketch: Sketch, block: BlockSketch, packed: int, recipe: QepConfig, workspace: Workspace) -> dict[str, int]:
    tokens = min(recipe.batch_size, recipe.num_samples) * recipe.seq_len
    passing = pass_bytes(sketch, block, tokens)
    widest = max((group_bytes(group, recipe, workspace, passing) for group in block.groups), default=passing)
    return {
        "a block of float weights": block.float_bytes,
        "packed weights of the block": packed,
        "observing and solving the widest group": int(widest),
    }


def pass_bytes(sketch: Sketch, block: BlockSketch, tokens: int) -> int:
    """What some tokens take while they pass a block and are observed."""
    size, widest = sketch.dtype.itemsize, max((group.in_features for group in block.groups), default=0)
    return tokens * (size * block_width(sketch, block) + OBSERVED_COPIES * FLOAT32 * widest)


def block_width(sketch: Sketch, block: BlockSketch) -> int:
    """Values that a block holds for each token while it runs: outputs of linears, and some of the stream's width."""
    dense = sum(ref.out_features for ref in block.linears if ref.expert is None)
    experts = {g.linears[0].name: g.linears[0].out_features for g in block.groups if g.linears[0].expert is not None}
    return dense + sketch.active_experts * sum(experts.values()) + PASS_TENSORS * sketch.hidden


def _disk(sketch: Sketch, output: OutputPlan, streams: int, spilled: int, streaming: bool) -> Peak:
    parts = {"float model": sketch.float_bytes, "output": output.file_bytes, "activations": spilled}
    if streaming:
        parts |= {"finished blocks": sum(output.packed_blocks), "states to go on from": STATES * streams}
    return Peak("the end", parts)


def _largest(moments: dict[str, dict[str, int]]) -> Peak:
    peaks = [Peak(name, {part: int(size) for part, size in parts.items() if size}) for name, parts in moments.items()]
    return max(peaks, key=lambda peak: peak.bytes)
