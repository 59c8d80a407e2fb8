"""Where a search begins: the best students under the limits if the damage of every layer only added up.

It does not add up where many layers go or change (the search is for that), but it is known for every layer after one
pass, and an integer programme then finds the best of all combinations at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hf_qep.algorithms.choices import choose
from hf_qep.search.costs import Choice, Cost
from hf_qep.search.limits import Limits
from hf_qep.search.space import FULL, SIZES, SearchSpace
from hf_qep.students.spec import ATTENTION, COPY_ZERO, CandidateSpec, LayerSpec

Score = Callable[[int, LayerSpec, LayerSpec | None], float]
"""(stack, teacher's layer, its form in the student or None for dropped) -> damage, less is better."""
_ROUNDS = 4
"""Times that the limits are tightened by what the sum of the parts turned out to miss, before a frame is given up."""


@dataclass(frozen=True)
class _Frame:
    """What is the same for all layers of a group of seeds."""

    hidden: int
    vocabulary: tuple[int, ...] | None
    bits: float | None
    sizes: tuple[int, ...] | None
    """Of every layer of a homogeneous student."""


def seed_choices(
    space: SearchSpace,
    score: Score,
    cost: Callable[[Choice], Cost],
    limits: Limits,
    *,
    count: int = 8,
    distance: int = 1,
) -> list[Choice]:
    """Students of the space within the limits, `count` at most, best first by the sum of the scores.

    For every width of the residual stream, vocabulary and number of bits (and, in a homogeneous space, for all sizes
    of a layer) the best few are found, which differ in `distance` layers at least; of these, each frame's best come
    before any frame's second. Nothing is added to them. The price of a layer is what leaving it out of a large student
    saves. An empty list where nothing meets the limits.
    """
    found: list[tuple[int, float, Choice]] = []
    for frame in _frames(space):
        for rank, choice in enumerate(_solve(space, frame, score, cost, limits, count, distance)):
            found.append((rank, _damage(space, choice.spec, score), choice))
    ordered = sorted(found, key=lambda item: item[:2])
    return [choice for _, _, choice in ordered][:count]


def _frames(space: SearchSpace) -> Iterator[_Frame]:
    shared: list[tuple[int, ...] | None] = [None]
    if space.homogeneous:
        options = space.layer_options(space.teacher.layers[0])
        shared = list(dict.fromkeys((o.kv_heads, o.q_per_kv, o.intermediate_size) for o in options))
    for hidden in space.hidden_sizes:
        for vocabulary in space.vocabularies:
            for bits in space.bits:
                for sizes in shared:
                    yield _Frame(hidden, vocabulary, bits, sizes)


Layers = list[tuple[int, LayerSpec]]
"""(stack, layer) of every layer of the teacher."""


def _solve(
    space: SearchSpace,
    frame: _Frame,
    score: Score,
    cost: Callable[[Choice], Cost],
    limits: Limits,
    count: int,
    distance: int,
) -> list[Choice]:
    """The best students of one frame whose true cost meets the limits."""
    teacher = space.teacher
    layers: Layers = [(0, layer) for layer in teacher.layers] + [(1, layer) for layer in teacher.decoder_layers]
    options = [[None, *_options(space, layer, frame)] for _, layer in layers]
    scores = [[score(s, layer, form) for form in forms] for (s, layer), forms in zip(layers, options, strict=True)]
    fixed, tables = _prices(space, frame, layers, options, cost, limits)
    needs, least = _needs(space, layers, options)
    for _ in range(_ROUNDS):
        room = {name: most - fixed[name] for name, most in limits.given().items()}
        picks = choose(scores, tables | needs, room, lower_limits=least, count=count, distance=distance)
        students = [_student(space, frame, layers, options, pick) for pick in picks]
        costs = [cost(student) for student in students]
        fitting = [student for student, true in zip(students, costs, strict=True) if not limits.violations(true)]
        if fitting or not students:
            return fitting
        for name in room:  # what does not add up, such as the peak of the activations
            sums = [sum(row[k] for row, k in zip(tables[name], pick, strict=True)) for pick in picks]
            fixed[name] = max(getattr(true, name) - total for true, total in zip(costs, sums, strict=True))
    return []


def _options(space: SearchSpace, layer: LayerSpec, frame: _Frame) -> list[LayerSpec]:
    if frame.sizes is None:
        return list(space.layer_options(layer))
    return [replace(layer, **dict(zip(SIZES, frame.sizes, strict=True)))]


def _prices(
    space: SearchSpace,
    frame: _Frame,
    layers: Layers,
    options: Sequence[Sequence[LayerSpec | None]],
    cost: Callable[[Choice], Cost],
    limits: Limits,
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """What a student without layers takes of each limited resource, and what every form of every layer adds.

    Layers of one stack and kind of attention have the same prices, so each is asked for once.
    """
    names = list(limits.given())
    known: dict[object, dict[str, float]] = {}
    large = _Large(space, frame, layers)
    tables: dict[str, list[list[float]]] = {name: [] for name in names}
    for place, ((stack, layer), forms) in enumerate(zip(layers, options, strict=True)):
        kind = space.teacher.layer_types[layer.source] if space.teacher.layer_types and not stack else ""
        for form in forms:
            key = (stack, kind, layer.sizes(), form and form.sizes())
            if key not in known:
                with_it, without = (cost(large.choice(place, f)) for f in (form, None))
                known[key] = {name: getattr(with_it, name) - getattr(without, name) for name in names}
            for name in names:
                tables[name] += [[]] if form is None else []
                tables[name][place].append(known[key][name])
    starts = [place for place, (_, layer) in enumerate(layers) if layer.source == 0]
    smallest = cost(_student(space, frame, layers, options, [int(place in starts) for place in range(len(layers))]))
    fixed = {name: getattr(smallest, name) - sum(tables[name][place][1] for place in starts) for name in names}
    return fixed, tables


@dataclass(frozen=True)
class _Large:
    """The teacher in a frame with every layer twice, so that what one adds does not change the widest."""

    space: SearchSpace
    frame: _Frame
    layers: Layers

    def choice(self, place: int, form: LayerSpec | None) -> Choice:
        """With the layer at one place in another form, or left out; its copy stays."""
        stacks: list[list[LayerSpec]] = [[], []]
        for other, (stack, layer) in enumerate(self.layers):
            here = form if other == place else layer
            stacks[stack] += [here] if here is not None else []
            stacks[stack] += [replace(layer, kind=COPY_ZERO)]
        return _choice(self.space, self.frame, stacks)


def _needs(
    space: SearchSpace, layers: Layers, options: Sequence[Sequence[LayerSpec | None]]
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Layers that must stay, as resources with a least amount."""
    needs: dict[str, list[list[float]]] = {}
    least: dict[str, float] = {}
    for stack in dict.fromkeys(stack for stack, _ in layers):
        depth = sum(s == stack for s, _ in layers)
        least[f"layers of stack {stack}"] = min(space.min_layers, depth)
        needs[f"layers of stack {stack}"] = [
            [float(s == stack and form is not None) for form in forms]
            for (s, _), forms in zip(layers, options, strict=True)
        ]
    types = space.teacher.layer_types or ()
    if FULL in types:
        least[FULL] = 1
        needs[FULL] = [
            [float(form is not None and types[layer.source] == FULL and ATTENTION not in form.skip) for form in forms]
            for (_, layer), forms in zip(layers, options, strict=True)
        ]
    return needs, least


def _student(
    space: SearchSpace,
    frame: _Frame,
    layers: Layers,
    options: Sequence[Sequence[LayerSpec | None]],
    picked: Sequence[int],
) -> Choice:
    stacks: list[list[LayerSpec]] = [[], []]
    for (stack, _), forms, option in zip(layers, options, picked, strict=True):
        if (form := forms[option]) is not None:
            stacks[stack].append(form)
    return _choice(space, frame, stacks)


def _choice(space: SearchSpace, frame: _Frame, stacks: Sequence[Sequence[LayerSpec]]) -> Choice:
    first, second = (tuple(stack) for stack in stacks)
    spec = CandidateSpec(first, frame.hidden, second, frame.vocabulary, space.head, space.num_labels)
    return Choice(spec, frame.bits)


def _damage(space: SearchSpace, spec: CandidateSpec, score: Score) -> float:
    total = 0.0
    for stack, theirs in ((0, space.teacher.layers), (1, space.teacher.decoder_layers)):
        kept = {layer.source: layer for layer in (spec.decoder_layers if stack else spec.layers)}
        total += sum(score(stack, layer, kept.get(layer.source)) for layer in theirs)
    return total
