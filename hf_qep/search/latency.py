"""How long any student of a space takes, from the times of its parts on the machine that counts.

A part (the attention of a layer, its feed-forward network) takes what n more of it add to a model, over n. The sum of
the parts and of what is left of a model without them is then fitted to a few whole students. Parameters are no measure:
at equal numbers of them one student can take twice as long as another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Progress
from hf_qep.search.space import SearchSpace
from hf_qep.students.spec import ATTENTION, COPY_ZERO, KEEP, MLP, CandidateSpec, LayerSpec

BASE = "base"
_SPREAD = 0.05
"""Spread of the predictions, relative to their mean, below which whole models tell a factor but no offset."""


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One step of a workload that is a forward pass."""
    model(**inputs)


@dataclass(frozen=True)
class Bench:
    """How a model is timed.

    build: a student with random weights on the device that counts. inputs: what one step of it is given. step: the
    step; for decoding, the inputs hold a cache and the step takes off what it added. repeats: rounds, after one that is
    not timed. threads: of the processor, None for torch's own number. timer: clock in seconds.
    """

    build: Callable[[CandidateSpec], nn.Module]
    inputs: Callable[[CandidateSpec], Mapping[str, Any]]
    step: Callable[[nn.Module, Mapping[str, Any]], None] = forward
    repeats: int = 7
    threads: int | None = None
    timer: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"a model must be timed at least once, not {self.repeats} times")

    def times(self, specs: Sequence[CandidateSpec]) -> np.ndarray:
        """Milliseconds of every step, (repeats, specs) float64.

        The models are timed in turn, so that a change of the machine's load hits all alike; all are in memory at once.
        """
        works = [(self.build(spec).eval(), self.inputs(spec)) for spec in specs]
        with _threads(self.threads), torch.inference_mode():
            rounds = [[self._once(*work) for work in works] for _ in range(self.repeats + 1)]
        return np.array(rounds[1:]) * 1000

    def medians(self, specs: Sequence[CandidateSpec]) -> list[float]:
        """Median milliseconds of a step of each student."""
        return np.median(self.times(specs), axis=0).tolist()

    def _once(self, model: nn.Module, inputs: Mapping[str, Any]) -> float:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._wait(device)
        start = self.timer()
        self.step(model, inputs)
        self._wait(device)
        return self.timer() - start

    @staticmethod
    def _wait(device: torch.device) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Entry:
    """Milliseconds of one part at one width of the residual stream.

    part: `attention` with sizes (kv_heads, q_per_kv), `mlp` with (units,), or `base` with (tokens of the vocabulary,),
    which is a model without layers. group: stack, and kind of attention where layers differ.
    """

    part: str
    hidden: int
    group: str
    sizes: tuple[int, ...]
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """Times of parts, and the straight line from their sum to the time of a whole model.

    entries: every part that was timed. layer_types, vocab_size: of the teacher. scale, offset: milliseconds of a model
    are scale · sum + offset.
    """

    entries: tuple[Entry, ...]
    layer_types: tuple[str, ...] | None = None
    vocab_size: int | None = None
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def measure(
        cls,
        space: SearchSpace,
        bench: Bench,
        *,
        copies: int = 4,
        whole: int = 4,
        separate: bool | None = None,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> LatencyTable:
        """Time every part of the students of `space`.

        copies: how many more of a part a model gets. whole: students, drawn with `seed`, to which the sum is fitted; 0
        leaves it. separate: whether attention and feed-forward network are timed apart, in layers that skip the other;
        by default where the space skips. Else whole layers are timed, and a wider network by what it adds.
        """
        separate = space.skip if separate is None else separate
        plan = [job for hidden in space.hidden_sizes for job in _plan(space, hidden, copies, separate)]
        entries: list[Entry] = []
        with progress.bar("timing parts", len(plan) + 1, unit="part") as bar:
            for part, hidden, group, sizes, (small, large) in plan:
                times = bench.times([small, large])
                # Noise can make a part that takes next to nothing look faster than nothing.
                ms = max(float(np.median(times[:, 1] - times[:, 0])) / copies, 0.0)
                ms = float(np.median(times[:, 0])) if part == BASE else ms
                entries.append(Entry(part, hidden, group, sizes, ms))
                bar.advance(detail=f"{part} {sizes}: {ms:.3g} ms")
            table = cls(tuple(_relative(entries, separate)), space.teacher.layer_types, space.teacher.vocab_size)
            if specs := _whole(space, whole, seed):
                table = table.fitted(specs, bench.medians(specs))
            bar.advance()
        return table

    def predict(self, spec: CandidateSpec) -> float:
        """Milliseconds of one step of a student.

        Between the sizes that were timed the time is straight, also along the width of the residual stream; beyond them
        it stays that of the last. Raises ConfigError for a part of a kind that was not timed.
        """
        return max(self.scale * self._sum(spec) + self.offset, 0.0)

    def fitted(self, specs: Sequence[CandidateSpec], measured: Sequence[float]) -> LatencyTable:
        """The same table with the line that fits whole students best, by least squares of the relative errors.

        specs, measured: students and their milliseconds. A factor alone where they are too much alike for a line, or
        where the line would fall. Raises ConfigError for students that take no time.
        """
        sums, times = np.array([self._sum(spec) for spec in specs]), np.asarray(measured, dtype=float)
        if not sums.any() or not (times > 0).all():
            raise ConfigError("some students take no time at all; time more repeats or a larger workload")
        columns = np.stack([sums / times, 1 / times], axis=1)
        line = np.zeros(2)
        if np.ptp(sums) > _SPREAD * sums.mean():
            line = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
        if line[0] <= 0:
            line = np.array([columns[:, 0].sum() / (columns[:, 0] @ columns[:, 0]), 0.0])
        return replace(self, scale=float(line[0]), offset=float(line[1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """Inverse of `to_dict`. Raises ConfigError for what is no table."""
        try:
            entries = tuple(Entry(**entry | {"sizes": tuple(entry["sizes"])}) for entry in values["entries"])
            types = values["layer_types"]
            return cls(**dict(values) | {"entries": entries, "layer_types": None if types is None else tuple(types)})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"this is no table of latencies: {error}") from error

    def _sum(self, spec: CandidateSpec) -> float:
        widths = sorted({entry.hidden for entry in self.entries})
        vocabulary = self.vocab_size or 0 if spec.vocabulary is None else len(spec.vocabulary)
        sums = []
        for hidden in widths:
            total = self._part(BASE, hidden, "", (vocabulary,))
            for stack, layers in spec.stacks():
                for layer in layers:
                    total += self._layer(stack, layer, hidden)
            sums.append(total)
        return float(np.interp(spec.hidden_size, widths, sums))

    def _layer(self, stack: int, layer: LayerSpec, hidden: int) -> float:
        total = 0.0
        if ATTENTION not in layer.skip:
            group = _group(stack, layer.source, self.layer_types)
            total += self._part(ATTENTION, hidden, group, (layer.kv_heads, layer.q_per_kv))
        if MLP not in layer.skip:
            total += self._part(MLP, hidden, str(stack), (layer.intermediate_size,))
        return total

    @cached_property
    def _known(self) -> dict[tuple[str, int, str], dict[tuple[int, ...], float]]:
        """Sizes -> milliseconds, by part, width and group: a search asks for every layer of every student."""
        found: dict[tuple[str, int, str], dict[tuple[int, ...], float]] = {}
        for entry in self.entries:
            found.setdefault((entry.part, entry.hidden, entry.group), {})[entry.sizes] = entry.ms
        return found

    def _part(self, part: str, hidden: int, group: str, sizes: tuple[int, ...]) -> float:
        known = self._known.get((part, hidden, group))
        if known is None:
            raise ConfigError(f"the table of latencies has no {part} of kind {group!r}; measure it for this teacher")
        return known[sizes] if sizes in known else _interpolate(known, sizes)


def _interpolate(known: Mapping[tuple[int, ...], float], sizes: tuple[int, ...]) -> float:
    """Straight along the last size between the values that are straight along those before it."""
    places = sorted({key[-1] for key in known})
    if len(sizes) == 1:
        return float(np.interp(sizes[0], places, [known[(place,)] for place in places]))
    values = [_interpolate({key[:-1]: ms for key, ms in known.items() if key[-1] == p}, sizes[:-1]) for p in places]
    return float(np.interp(sizes[-1], places, values))


Pair = tuple[CandidateSpec, CandidateSpec]
Job = tuple[str, int, str, tuple[int, ...], Pair]
"""Part, width, group, sizes, and the students without and with `copies` of it."""


def _plan(space: SearchSpace, hidden: int, copies: int, separate: bool) -> Iterator[Job]:
    """What is timed at one width of the residual stream; the base of every vocabulary is the same student twice."""
    if copies < 1:
        raise ConfigError(f"a part must be timed in at least 1 copy, not {copies}")
    teacher = space.teacher
    stacks = [layers for layers in (teacher.layers, teacher.decoder_layers) if layers]
    least = [space.layer_options(layers[0])[0] for layers in stacks]

    def student(stack: int, layers: Sequence[LayerSpec], vocabulary: tuple[int, ...] | None = None) -> CandidateSpec:
        every = [[layer] for layer in least]
        every[stack] = list(layers)
        decoder = tuple(every[1]) if len(every) > 1 else ()
        return CandidateSpec(tuple(every[0]), hidden, decoder, vocabulary, space.head, space.num_labels)

    for ids in space.vocabularies:
        base = student(0, least[:1], ids)
        yield BASE, hidden, "", (teacher.vocab_size or 0 if ids is None else len(ids),), (base, base)
    for stack, layers in enumerate(stacks):
        for part, group, form in _forms(space, stack, layers, separate):
            first = least[stack] if separate else replace(form, kind=KEEP)
            more = [first] + [replace(form, kind=COPY_ZERO)] * copies
            sizes = (form.kv_heads, form.q_per_kv) if part == ATTENTION else (form.intermediate_size,)
            yield part, hidden, group, sizes, (student(stack, [first]), student(stack, more))


def _forms(
    space: SearchSpace, stack: int, layers: Sequence[LayerSpec], separate: bool
) -> Iterator[tuple[str, str, LayerSpec]]:
    """Part, group and layer of everything that one stack can have: all pairs of head counts, all widths."""
    groups: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        groups.setdefault(_group(stack, layer.source, space.teacher.layer_types), []).append(layer)
    widest = [max(members, key=lambda s: (s.intermediate_size, s.heads)) for members in groups.values()]
    for group, source in zip(groups, widest, strict=True):
        options = [form for form in space.layer_options(source) if not form.skip]
        narrow = options[0].intermediate_size
        for form in options:
            if form.intermediate_size == narrow:
                yield ATTENTION, group, replace(form, skip=frozenset({MLP} if separate else ()))
    source = max(widest, key=lambda s: s.intermediate_size)
    options = [form for form in space.layer_options(source) if not form.skip]
    for form in options:
        if (form.kv_heads, form.q_per_kv) == (options[0].kv_heads, options[0].q_per_kv):
            yield MLP, str(stack), replace(form, skip=frozenset({ATTENTION} if separate else ()))


def _relative(entries: list[Entry], separate: bool) -> Iterator[Entry]:
    """Entries whose sum is a model: networks without the attention timed with them, bases without their layers."""
    for hidden in dict.fromkeys(entry.hidden for entry in entries):
        here = [entry for entry in entries if entry.hidden == hidden]
        parts = {part: [entry for entry in here if entry.part == part] for part in (ATTENTION, MLP, BASE)}
        least = {group: min(e.ms for e in parts[MLP] if e.group == group) for group in {e.group for e in parts[MLP]}}
        networks = [e if separate else replace(e, ms=e.ms - least[e.group]) for e in parts[MLP]]
        # The first of each stack is the smallest, of which the base has one.
        layers = sum(_first(parts[ATTENTION], stack) + _first(networks, stack) for stack in least)
        yield from parts[ATTENTION] + networks
        for entry in parts[BASE]:
            yield replace(entry, ms=max(entry.ms - layers, 0.0))


def _first(entries: Sequence[Entry], stack: str) -> float:
    return next(entry.ms for entry in entries if entry.group.partition(":")[0] == stack)


def _group(stack: int, source: int, layer_types: Sequence[str] | None) -> str:
    """Stack, and the kind of attention where the layers of the first one differ."""
    return f"{stack}:{layer_types[source]}" if stack == 0 and layer_types else f"{stack}:"


def _whole(space: SearchSpace, count: int, seed: int) -> list[CandidateSpec]:
    """Different students of the space, as many as there are easily."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [space.random(generator) for _ in range(4 * count)]
    return list(dict.fromkeys(drawn))[:count]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
