"""What is held while a block is done, moment by moment, as the engine does it.

Group by group, first its moments grow while the tokens pass the block, in parts that are added up, then its linears
are corrected and solved one after the other. The float weights of groups that are done have gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from hf_qep.algorithms.scales import ROW_CHUNK
from hf_qep.config import AUTO, QepConfig
from hf_qep.engine.planning.sketch import BlockSketch, GroupSketch, Sketch
from hf_qep.engine.together.shares import waiting_bytes

FLOAT32 = 4
PASS_TENSORS = 6
"""Tensors as wide as the stream, besides the outputs of the linears, that a block holds while it runs."""
OBSERVED_COPIES = 3
"""float32 copies of a group's input while its moments are taken."""
CHUNKS = 3
"""Rows at a time of which gap, half and whole solution are held while a linear is corrected."""

Workspace = Callable[[str, int, int], float]
"""(method, out, in) -> bytes that correcting and solving a linear takes besides its moments."""
Parts = dict[str, float]
"""Name of a part -> bytes."""
WAITING = "sums that wait"
"""The part that is in RAM, or on the disk, wherever the others are."""


def block_moments(
    sketch: Sketch, block: BlockSketch, packed: int, recipe: QepConfig, workspace: Workspace
) -> Iterator[tuple[str, Parts]]:
    """(what is done, bytes by part). packed: bytes of the packed block. Without groups a pass over the block alone."""
    passing = pass_bytes(sketch, block, min(recipe.batch_size, recipe.num_samples) * recipe.seq_len)
    weights = sum(math.prod(ref.shape) for ref in block.linears)
    done = 0
    for number, group in enumerate(block.groups):
        left = left_behind(sketch, block.groups[number:], recipe)
        held: Parts = {
            "a block of float weights": block.float_bytes - done * sketch.dtype.itemsize,
            "packed weights of the block": packed * done / weights,
        }
        moments = moment_bytes(group, recipe)
        growing: Parts = {"moments of a group": moments, "tokens that pass the block": passing}
        yield "observing a group", held | growing | {"activations": left, WAITING: waiting_bytes(moments)}
        left = left_behind(sketch, block.groups[number + 1 :], recipe)
        yield "solving a linear", held | solving_parts(group, recipe, workspace) | {"activations": left}
        done += sum(math.prod(ref.shape) for ref in group.linears)
    if not block.groups:
        yield "a pass", {"a block of float weights": block.float_bytes, "tokens that pass the block": passing}


def solving_parts(group: GroupSketch, recipe: QepConfig, workspace: Workspace) -> Parts:
    """Moments of a group, and the most that one of its linears takes besides."""
    method = "sign" if recipe.method == AUTO else recipe.method
    space = max(workspace(method, ref.out_features, ref.in_features) for ref in group.linears)
    square = FLOAT32 * group.in_features**2
    if group.linears[0].expert is not None:
        space += 2 * square  # the mean of all moments, and the mix of an expert
    if not _summed(group, recipe) or not recipe.propagation:
        return {"moments of a group": moment_bytes(group, recipe), "correcting and solving": space}
    out, width = group.linears[0].shape
    correcting = square + FLOAT32 * width * (out + CHUNKS * ROW_CHUNK)  # the factor, the target, some rows
    gap = moment_bytes(group, recipe) - square  # which is dropped when the target is corrected
    return {"moments of a group": square, "correcting and solving": max(gap + correcting, space)}


def moment_bytes(group: GroupSketch, recipe: QepConfig) -> int:
    """Moments of a group; experts have one each."""
    square = FLOAT32 * group.in_features**2
    if group.linears[0].expert is not None:
        return square * len(group.linears)
    if group.exempt or not recipe.propagation:
        return square
    return square + (FLOAT32 * group.linears[0].out_features * group.in_features if _summed(group, recipe) else square)


def left_behind(sketch: Sketch, groups: tuple[GroupSketch, ...], recipe: QepConfig) -> int:
    """What the float pass has left behind for these groups: an activation for each that propagates errors."""
    if not recipe.propagation:
        return 0
    widths = (sketch.hidden if _summed(group, recipe) else group.in_features for group in groups if not group.exempt)
    return recipe.num_samples * recipe.seq_len * sum(widths) * sketch.dtype.itemsize


def pass_bytes(sketch: Sketch, block: BlockSketch, tokens: int) -> int:
    """What some tokens take while they pass a block and are observed."""
    size, widest = sketch.dtype.itemsize, max((group.in_features for group in block.groups), default=0)
    return tokens * (size * block_width(sketch, block) + OBSERVED_COPIES * FLOAT32 * widest)


def block_width(sketch: Sketch, block: BlockSketch) -> int:
    """Values that a block holds for each token while it runs: outputs of linears, and some of the stream's width."""
    dense = sum(ref.out_features for ref in block.linears if ref.expert is None)
    experts = {g.linears[0].name: g.linears[0].out_features for g in block.groups if g.linears[0].expert is not None}
    return dense + sketch.active_experts * sum(experts.values()) + PASS_TENSORS * sketch.hidden


def _summed(group: GroupSketch, recipe: QepConfig) -> bool:
    return bool(recipe.residual and group.writes)
