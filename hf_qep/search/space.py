"""Which students are considered, as parameters with fixed names and a fixed choice of values each.

Every parameter is always there, also where it decides nothing (the width of a layer that is dropped): a sampler that
recombines students needs all of them to have the same parameters. Several settings can so mean the same student;
`params_of` gives one that needs no repair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from hf_qep.errors import ConfigError
from hf_qep.search.costs import Choice
from hf_qep.students.spec import (
    ATTENTION,
    COPY_ZERO,
    KEEP,
    MLP,
    NEW_ZERO,
    CandidateSpec,
    LayerSpec,
    TeacherShape,
)

FULL = "full_attention"
NOTHING = "none"
SIZES = ("kv_heads", "q_per_kv", "intermediate_size")
STACKS = ("layer", "decoder_layer")
_TRIES = 100
_STEPS = 4
"""Widths of the feed-forward network by default, in equal steps up to the teacher's."""


@dataclass(frozen=True)
class SearchSpace:
    """Students that can be cut from one teacher.

    hidden_sizes, kv_heads, q_per_kv, intermediate_sizes: values to choose from, in rising order; a layer whose teacher
    has less takes the teacher's. min_layers: teacher's layers that stay in each stack. skip: whether a layer may leave
    out attention or feed-forward network. max_added: layers that may be added to the first stack. vocabularies: kept
    token ids, None for all. bits: bits per weight of the blocks, None for unquantised. homogeneous: all layers of a
    stack share their sizes and skip nothing, so that a stock class can hold the student. head, num_labels: of every
    student, as in CandidateSpec.
    """

    teacher: TeacherShape
    hidden_sizes: tuple[int, ...]
    kv_heads: tuple[int, ...]
    q_per_kv: tuple[int, ...]
    intermediate_sizes: tuple[int, ...]
    min_layers: int = 1
    skip: bool = True
    max_added: int = 0
    vocabularies: tuple[tuple[int, ...] | None, ...] = (None,)
    bits: tuple[float | None, ...] = (None,)
    homogeneous: bool = False
    head: str = "same"
    num_labels: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_sizes", "kv_heads", "q_per_kv", "intermediate_sizes"):
            values = tuple(sorted(set(getattr(self, name))))
            if not values or values[0] < 1:
                raise ConfigError(f"`{name}` of a search space needs whole numbers of at least 1, not {values}")
            object.__setattr__(self, name, values)
        _check(self)

    @classmethod
    def around(
        cls,
        teacher: TeacherShape,
        *,
        hidden_sizes: Iterable[int] | None = None,
        kv_heads: Iterable[int] | None = None,
        q_per_kv: Iterable[int] | None = None,
        ffn: int | Iterable[int] | None = None,
        skip: bool | None = None,
        homogeneous: bool = False,
        **others: Any,
    ) -> SearchSpace:
        """A space with what is not given taken from the teacher's shape.

        hidden_sizes, q_per_kv: by default the teacher's only. kv_heads: the teacher's, its half, quarter and so on.
        ffn: a list of widths, or the step between them; by default four equal steps. skip: by default where the shapes
        of layers may differ and the teacher has one stack. others: further fields of the space.
        """
        layers = teacher.layers + teacher.decoder_layers
        most = min if homogeneous else max
        heads, groups, width = (most(getattr(layer, name) for layer in layers) for name in SIZES)
        return cls(
            teacher,
            tuple(hidden_sizes or (teacher.hidden_size,)),
            tuple(kv_heads or {heads >> k for k in range(heads.bit_length())}),
            tuple(q_per_kv or (groups,)),
            _widths(ffn, width),
            skip=not homogeneous and not teacher.decoder_layers if skip is None else skip,
            homogeneous=homogeneous,
            **others,
        )

    def domains(self) -> dict[str, tuple[Any, ...]]:
        """Name of every parameter of a specification -> its values, in a fixed order."""
        found: dict[str, tuple[Any, ...]] = {
            "hidden_size": self.hidden_sizes,
            "vocabulary": tuple(range(len(self.vocabularies))),
        }
        for stack, layers in self._stacks():
            if self.homogeneous:
                found |= self._size_domains(stack)
            for number in range(len(layers)):
                found |= self._layer_domains(f"{stack}{number}")
        for number in range(self.max_added):
            name = f"added{number}"
            found[f"{name}.kind"] = (NOTHING, COPY_ZERO, NEW_ZERO)
            found[f"{name}.after"] = tuple(range(len(self.teacher.layers) + 1))
            found[f"{name}.source"] = tuple(range(len(self.teacher.layers)))
            found |= {} if self.homogeneous else self._size_domains(name)
        return found

    def suggest(self, trial: Any) -> CandidateSpec:
        """The student that an Optuna trial proposes; always one that exists in this space."""
        return self.decode({name: trial.suggest_categorical(name, values) for name, values in self.domains().items()})

    def suggest_choice(self, trial: Any) -> Choice:
        """The same with the bits of its blocks."""
        return Choice(self.suggest(trial), trial.suggest_categorical("bits", self.bits))

    def decode(self, params: Mapping[str, Any]) -> CandidateSpec:
        """The student of a value for every parameter.

        What would be no student is repaired: of too few layers the first dropped ones come back, and where no layer
        with full attention stays, the last one of the teacher does.
        """
        stacks = [self._kept(params, name, layers) for name, layers in self._stacks()]
        stacks[0] = self._with_added(params, stacks[0])
        return CandidateSpec(
            tuple(stacks[0]),
            params["hidden_size"],
            tuple(stacks[1]) if len(stacks) > 1 else (),
            self.vocabularies[params["vocabulary"]],
            self.head,
            self.num_labels,
        )

    def params_of(self, spec: CandidateSpec) -> dict[str, Any]:
        """A value for every parameter such that `decode` gives `spec`.

        Raises ConfigError if it is not in this space.
        """
        params: dict[str, Any] = {name: values[-1] for name, values in self.domains().items()}
        params["hidden_size"] = spec.hidden_size
        params["vocabulary"] = self.vocabularies.index(spec.vocabulary) if spec.vocabulary in self.vocabularies else -1
        for (name, theirs), (_, layers) in zip(self._stacks(), spec.stacks(), strict=False):
            for number in range(len(theirs)):
                params |= {f"{name}{number}.keep": False} | ({f"{name}{number}.skip": NOTHING} if self.skip else {})
            for layer in layers:
                if not layer.added:
                    params |= self._layer_params(name, layer)
        params |= self._added_params(spec)
        try:
            same = self.decode(params) == spec
        except (KeyError, IndexError, ConfigError):
            same = False
        allowed = self.domains()
        if (
            not same
            or any(params[name] not in values for name, values in allowed.items())
            or len(params) > len(allowed)
        ):
            raise ConfigError(f"the student {spec.key()} is not in this search space; widen the space to hold it")
        return params

    def params_of_choice(self, choice: Choice) -> dict[str, Any]:
        """The same with the bits. Raises ConfigError if the choice is not in this space."""
        if choice.bits not in self.bits:
            raise ConfigError(f"{choice.bits} bits are not in this search space, which has {self.bits}")
        return self.params_of(choice.spec) | {"bits": choice.bits}

    def random(self, generator: torch.Generator) -> CandidateSpec:
        """A student drawn with its share of dropped layers uniform, and then everything else."""
        share = torch.rand((), generator=generator).item()
        params = {name: _pick(values, generator) for name, values in self.domains().items()}
        for name in params:
            if name.endswith(".keep"):
                params[name] = torch.rand((), generator=generator).item() < share
        return self.decode(params)

    def mutate(self, spec: CandidateSpec, generator: torch.Generator) -> CandidateSpec:
        """A student that differs from `spec` by another value of one parameter; itself if the space has no other."""
        params, domains = self.params_of(spec), self.domains()
        free = [name for name, values in domains.items() if len(values) > 1]
        for _ in range(_TRIES if free else 0):
            name = _pick(free, generator)
            others = tuple(value for value in domains[name] if value != params[name])
            if (changed := self.decode(params | {name: _pick(others, generator)})) != spec:
                return changed
        return spec

    def layer_options(self, layer: LayerSpec) -> tuple[LayerSpec, ...]:
        """Every form in which a layer of the teacher can stay, each once."""
        skips = [frozenset(), *([frozenset({ATTENTION}), frozenset({MLP})] if self.skip else [])]
        found = {
            LayerSpec(layer.source, *self._sizes(layer, (kv, q, width)), KEEP, skip): None
            for kv in self.kv_heads
            for q in self.q_per_kv
            for width in self.intermediate_sizes
            for skip in skips
        }
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON value; `from_dict` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        teacher = asdict(self.teacher)
        for name in ("layers", "decoder_layers"):
            teacher[name] = [layer.to_dict() for layer in getattr(self.teacher, name)]
        listed = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        listed["vocabularies"] = [None if ids is None else list(ids) for ids in self.vocabularies]
        return values | listed | {"teacher": teacher}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchSpace:
        """Inverse of `to_dict`. Raises ConfigError for missing or unknown values."""
        try:
            teacher = dict(values["teacher"])
            for name in ("layers", "decoder_layers"):
                teacher[name] = tuple(LayerSpec(**layer) for layer in teacher[name])
            if teacher.get("layer_types") is not None:
                teacher["layer_types"] = tuple(teacher["layer_types"])
            own = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            own["vocabularies"] = tuple(None if ids is None else tuple(ids) for ids in values["vocabularies"])
            return cls(**own | {"teacher": TeacherShape(**teacher)})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"this is no search space: {error}") from error

    def _stacks(self) -> list[tuple[str, tuple[LayerSpec, ...]]]:
        return [
            pair for pair in zip(STACKS, (self.teacher.layers, self.teacher.decoder_layers), strict=True) if pair[1]
        ]

    def _size_domains(self, name: str) -> dict[str, tuple[Any, ...]]:
        values = (self.kv_heads, self.q_per_kv, self.intermediate_sizes)
        return {f"{name}.{size}": options for size, options in zip(SIZES, values, strict=True)}

    def _layer_domains(self, name: str) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {f"{name}.keep": (False, True)}
        if not self.homogeneous:
            found |= self._size_domains(name)
        if self.skip:
            found[f"{name}.skip"] = (NOTHING, ATTENTION, MLP)
        return found

    @staticmethod
    def _sizes(source: LayerSpec, sizes: Iterable[int]) -> list[int]:
        """No size above what the source has."""
        return [min(size, getattr(source, name)) for name, size in zip(SIZES, sizes, strict=True)]

    def _layer(self, params: Mapping[str, Any], name: str, source: LayerSpec, kind: str, skip: str) -> LayerSpec:
        sizes = self._sizes(source, [params[f"{name}.{size}"] for size in SIZES])
        return LayerSpec(source.source, *sizes, kind, frozenset() if skip == NOTHING else frozenset({skip}))

    def _kept(self, params: Mapping[str, Any], stack: str, theirs: tuple[LayerSpec, ...]) -> list[LayerSpec]:
        """The teacher's layers that stay in one stack."""
        keep = [params[f"{stack}{number}.keep"] for number in range(len(theirs))]
        skip = [params.get(f"{stack}{number}.skip", NOTHING) for number in range(len(theirs))]
        types = self.teacher.layer_types
        full = [n for n, kind in enumerate(types or ()) if kind == FULL] if stack == STACKS[0] else []
        if full and not any(keep[n] and skip[n] != ATTENTION for n in full):
            last = max((n for n in full if keep[n]), default=full[-1])
            keep[last], skip[last] = True, NOTHING
        for number in range(len(theirs)):
            if sum(keep) >= min(self.min_layers, len(theirs)):
                break
            keep[number] = True
        return [
            self._layer(params, stack if self.homogeneous else f"{stack}{n}", source, KEEP, skip[n])
            for n, source in enumerate(theirs)
            if keep[n]
        ]

    def _with_added(self, params: Mapping[str, Any], kept: list[LayerSpec]) -> list[LayerSpec]:
        """The layers that stay with those that are added, each behind all that stay of the teacher's first `after`."""
        added: dict[int, list[LayerSpec]] = {}
        for number in range(self.max_added):
            name = f"added{number}"
            if (kind := params[f"{name}.kind"]) != NOTHING:
                source = self.teacher.layers[params[f"{name}.source"]]
                place = sum(layer.source < params[f"{name}.after"] for layer in kept)
                sizes = STACKS[0] if self.homogeneous else name
                added.setdefault(place, []).append(self._layer(params, sizes, source, kind, NOTHING))
        return [layer for n in range(len(kept) + 1) for layer in [*kept[n - 1 : n], *added.get(n, [])]]

    def _layer_params(self, stack: str, layer: LayerSpec) -> dict[str, Any]:
        name = f"{stack}{layer.source}"
        found = {f"{name}.keep": True} | self._size_params(stack if self.homogeneous else name, layer)
        return found | ({f"{name}.skip": next(iter(layer.skip), NOTHING)} if self.skip else {})

    def _size_params(self, name: str, layer: LayerSpec) -> dict[str, Any]:
        """Values that give a layer its sizes: the least that are not below them, which its teacher's then cut down."""
        sizes = zip(self._size_domains(name).items(), SIZES, strict=True)
        return {
            option: next((v for v in values if v >= getattr(layer, size)), values[-1])
            for (option, values), size in sizes
        }

    def _added_params(self, spec: CandidateSpec) -> dict[str, Any]:
        found: dict[str, Any] = {f"added{number}.kind": NOTHING for number in range(self.max_added)}
        number, after = 0, 0
        for layer in spec.layers:
            if not layer.added:
                after = layer.source + 1
                continue
            name = f"added{number}"
            found |= {f"{name}.kind": layer.kind, f"{name}.after": after, f"{name}.source": layer.source}
            found |= {} if self.homogeneous else self._size_params(name, layer)
            number += 1
        return found


def _widths(ffn: int | Iterable[int] | None, most: int) -> tuple[int, ...]:
    """Widths of the feed-forward network: those given, or the multiples of a step and the teacher's own."""
    if ffn is not None and not isinstance(ffn, int):
        return tuple(ffn)
    step = -(-most // _STEPS) if ffn is None else ffn
    if step < 1:
        raise ConfigError(f"the step between widths must be at least 1, not {step}")
    return (*range(step, most, step), most)


def _pick(values: Any, generator: torch.Generator) -> Any:
    return values[int(torch.randint(len(values), (), generator=generator))]


def _check(space: SearchSpace) -> None:
    if space.hidden_sizes[-1] > space.teacher.hidden_size:
        raise ConfigError(
            f"hidden_size {space.hidden_sizes[-1]} is more than the teacher's {space.teacher.hidden_size}"
        )
    for name in ("vocabularies", "bits"):
        if not getattr(space, name):
            raise ConfigError(f"`{name}` of a search space needs at least one value; None stands for the teacher's own")
    if space.min_layers < 1 or space.min_layers > len(space.teacher.layers):
        raise ConfigError(f"min_layers must be from 1 to {len(space.teacher.layers)}, not {space.min_layers}")
    if space.max_added < 0:
        raise ConfigError(f"max_added must be at least 0, not {space.max_added}")
    if not space.homogeneous:
        return
    if space.skip:
        raise ConfigError("layers that share their shape skip nothing: give skip=False or homogeneous=False")
    layers = space.teacher.layers + space.teacher.decoder_layers
    for name, values in zip(SIZES, (space.kv_heads, space.q_per_kv, space.intermediate_sizes), strict=True):
        if values[-1] > (least := min(getattr(layer, name) for layer in layers)):
            raise ConfigError(f"{name} {values[-1]} cannot be shared by all layers: one of the teacher's has {least}")
