"""The usual ways of pruning, as students that a search begins with: it can then only do better.

For every number of layers those with the most influence stay (ShortGPT, arXiv 2403.03853), and all of them get the same
width, the largest that the limits allow (as in Minitron, arXiv 2407.14679). All layers is width pruning alone, the
teacher's width is depth pruning alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_qep.search.costs import Choice, Cost
from hf_qep.search.limits import Limits
from hf_qep.search.space import FULL, SIZES, SearchSpace
from hf_qep.students.spec import CandidateSpec, LayerSpec


def recipes(
    space: SearchSpace, influence: Sequence[float], cost: Callable[[Choice], Cost], limits: Limits
) -> list[Choice]:
    """Students of the space within the limits, deepest first; of each depth, those that no wider one replaces.

    influence: of the teacher's layers in the first stack, higher is worth more.
    """
    found = []
    whole = CandidateSpec(
        space.teacher.layers, max(space.hidden_sizes), space.teacher.decoder_layers, space.vocabularies[0],
        space.head, space.num_labels,
    )  # fmt: skip
    for count in range(len(whole.layers), space.min_layers - 1, -1):
        kept = by_influence(space, influence, count)
        fitting: list[tuple[int, ...]] = []
        for sizes in _uniform(space):
            layers = tuple(_narrowed(whole.layers[n], sizes) for n in kept)
            choice = Choice(replace(whole, layers=layers), space.bits[0])
            replaced = any(all(a <= b for a, b in zip(sizes, wider, strict=True)) for wider in fitting)
            if not replaced and not limits.violations(cost(choice)):
                fitting.append(sizes)
                found.append(choice)
    return list(dict.fromkeys(found))


def by_influence(space: SearchSpace, influence: Sequence[float], count: int) -> list[int]:
    """Numbers of the `count` layers with the most influence, rising, at least one of them with full attention."""
    ranked = sorted(range(len(influence)), key=lambda n: -influence[n])
    types = space.teacher.layer_types or ()
    kept = ranked[:count]
    if FULL in types and not any(types[n] == FULL for n in kept):
        kept[-1] = next(n for n in ranked if types[n] == FULL)
    return sorted(kept)


def _uniform(space: SearchSpace) -> list[tuple[int, ...]]:
    """(kv_heads, q_per_kv, units) that all layers could have, widest first."""
    options = [(kv, q, units) for kv in space.kv_heads for q in space.q_per_kv for units in space.intermediate_sizes]
    return sorted(options, key=lambda sizes: (-sizes[0] * sizes[1] * sizes[2], sizes))


def _narrowed(layer: LayerSpec, sizes: tuple[int, ...]) -> LayerSpec:
    return replace(layer, **{n: min(getattr(layer, n), size) for n, size in zip(SIZES, sizes, strict=True)})
