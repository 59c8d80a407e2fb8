"""What every change of a single sub-block costs, measured one by one: the library that first guesses are made of.

A change of one layer of the teacher, healed, moves its answers by so much. Of several changes the sum is only a guess
(it fails where many layers go), but it is known for every combination at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_qep.errors import CheckpointError
from hf_qep.files import canonical_json, write_text_aside
from hf_qep.progress import SILENT, Progress
from hf_qep.search.proxies import ProxyContext, distance
from hf_qep.search.space import SearchSpace
from hf_qep.students.family import teacher_shape
from hf_qep.students.spec import ATTENTION, SUB_BLOCKS, CandidateSpec, LayerSpec

DROPPED = "dropped"


@dataclass
class Library:
    """Damage by change: nats per answer (an embedding: relative squared error) over what the whole teacher has.

    known: name of a change (`change_name`) -> damage.
    """

    known: dict[str, float] = field(default_factory=dict)

    def score(self, stack: int, layer: LayerSpec, form: LayerSpec | None) -> float:
        """Damage of a teacher's layer in another form, or dropped (None): the sum over its sub-blocks.

        Raises KeyError for a change that was not measured.
        """
        return sum(self.known[name] for name in _changes(stack, layer, form))

    def save(self, path: Path, fingerprint: str) -> None:
        """Write one JSON file. fingerprint: of the teacher, the rows and the settings."""
        write_text_aside(path, canonical_json({"fingerprint": fingerprint, "known": self.known}))

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Library:
        """Read a file; an empty library if there is none. Raises CheckpointError for one of another fingerprint."""
        if not path.exists():
            return cls()
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fingerprint"] != fingerprint:
            raise CheckpointError(f"{str(path)!r} was measured with another teacher, other rows or settings; remove it")
        return cls(found["known"])


def change_name(stack: int, source: int, what: str, sizes: tuple[int, ...] = ()) -> str:
    """Key of one change. what: a sub-block, `dropped`, or `no attention`, `no mlp`."""
    return "/".join(map(str, (stack, source, what, *sizes)))


def _changes(stack: int, layer: LayerSpec, form: LayerSpec | None) -> Iterator[str]:
    """Names of the changes between a teacher's layer and its form in a student."""
    if form is None:
        yield change_name(stack, layer.source, DROPPED)
        return
    for part in SUB_BLOCKS:
        if part in layer.skip:
            continue
        if part in form.skip:
            yield change_name(stack, layer.source, f"no {part}")
        elif _part_sizes(form, part) != _part_sizes(layer, part):
            yield change_name(stack, layer.source, part, _part_sizes(form, part))


def _part_sizes(layer: LayerSpec, part: str) -> tuple[int, ...]:
    return (layer.kv_heads, layer.q_per_kv) if part == ATTENTION else (layer.intermediate_size,)


def measure_library(
    context: ProxyContext,
    space: SearchSpace,
    library: Library,
    *,
    keep: Callable[[Library], None] | None = None,
    progress: Progress = SILENT,
) -> Library:
    """Add every change that a student of the space can have and that is not known yet.

    keep: called after each change, so that what is known outlives an interruption.
    """
    missing = {n: s for n, s in _single_changes(context, space).items() if n not in library.known}
    with progress.bar("measuring single changes", len(missing), "change") as bar:
        for name, (spec, healed) in missing.items():
            student = context.student(spec, only=frozenset(healed))
            found = distance(student, context.judge, context.said("judge"), context.batch_size)
            library.known[name] = max(found, 0.0)
            if keep is not None:
                keep(library)
            bar.advance(detail=f"{name}: {found:.3g}")
    return library


def _single_changes(context: ProxyContext, space: SearchSpace) -> dict[str, tuple[CandidateSpec, set]]:
    """Name of each change -> (the teacher with it, layers to heal)."""
    whole = replace(teacher_shape(context.teacher).identity(), head=space.head, num_labels=space.num_labels)
    found = {}
    for stack, layers in whole.stacks():
        for number, layer in enumerate(layers):
            if len(layers) > 1:
                shorter = (*layers[:number], *layers[number + 1 :])
                healed = {(stack, number - 1)} if number else set()
                found[change_name(stack, number, DROPPED)] = _with(whole, stack, shorter), healed
            for form in space.layer_options(layer):
                for part in SUB_BLOCKS:
                    for name in _changes(stack, layer, _only(layer, form, part)):
                        changed = (*layers[:number], _only(layer, form, part), *layers[number + 1 :])
                        found.setdefault(name, (_with(whole, stack, changed), {(stack, number)}))
    return found


def _only(layer: LayerSpec, form: LayerSpec, part: str) -> LayerSpec:
    """The teacher's layer with one sub-block as in another form."""
    if part in form.skip:
        return replace(layer, skip=layer.skip | {part})
    sizes = ("kv_heads", "q_per_kv") if part == ATTENTION else ("intermediate_size",)
    return replace(layer, **{name: getattr(form, name) for name in sizes})


def _with(spec: CandidateSpec, stack: int, layers: tuple[LayerSpec, ...]) -> CandidateSpec:
    return replace(spec, **{"decoder_layers" if stack else "layers": layers})
