from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hf_qep.errors import ConfigError
from hf_qep.search.latency import Bench, Entry, LatencyTable
from hf_qep.search.space import SearchSpace
from hf_qep.students.spec import ATTENTION, MLP, CandidateSpec, LayerSpec
from tests.search.shapes import teacher

HYBRID = ("sliding_attention", "full_attention") * 2


class Clock:
    """A clock that only the models move; between two readings the machine may slow down."""

    def __init__(self, drift=0.0):
        self.now, self.readings, self.drift = 0.0, 0, drift

    def __call__(self):
        self.readings += 1
        return self.now

    def run(self, seconds):
        self.now += seconds * (1 + self.drift * np.sin(self.readings / 400))


def seconds(spec: CandidateSpec, types=None) -> float:
    """A machine on which units come in steps, and a layer that is not alone has a price of its own."""
    vocabulary = 100 if spec.vocabulary is None else len(spec.vocabulary)
    total = 0.2 + 0.004 * spec.hidden_size + 0.002 * vocabulary
    for stack, layers in spec.stacks():
        for layer in layers:
            if ATTENTION not in layer.skip:
                full = types is not None and types[layer.source] == "full_attention"
                total += (0.3 + 0.05 * layer.heads + 0.1 * layer.kv_heads) * (1 + full) * (1 + stack)
            if MLP not in layer.skip:
                total += 0.1 + 0.0005 * spec.hidden_size * -(-layer.intermediate_size // 8)
    return total / 1000


class Fake(nn.Module):
    def __init__(self, clock, duration):
        super().__init__()
        self.clock, self.duration = clock, duration

    def forward(self, tokens):
        self.clock.run(self.duration * tokens)


def bench(clock, types=None, overhead=(1.0, 0.0), **options):
    def build(spec):
        return Fake(clock, overhead[0] * seconds(spec, types) + overhead[1])

    return Bench(build, lambda spec: {"tokens": 1}, timer=clock, **options)


ROOMS = {
    "skipping": SearchSpace.around(teacher(hidden=64), hidden_sizes=(16, 64), q_per_kv=(1, 2), ffn=16),
    "stock": SearchSpace.around(teacher(), homogeneous=True, ffn=16),
    "hybrid": SearchSpace.around(teacher(types=HYBRID), ffn=16),
    "detector": SearchSpace.around(teacher(decoder=2), ffn=16),
    "vocabularies": SearchSpace.around(teacher(), vocabularies=(None, tuple(range(10)))),
}


def errors(room, table, types=None, count=40):
    generator = torch.Generator().manual_seed(5)
    specs = [room.random(generator) for _ in range(count)]
    return [abs(table.predict(s) / (1000 * seconds(s, types)) - 1) for s in specs]


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_students_that_were_not_timed_are_predicted(room, drift):
    types = room.teacher.layer_types
    table = LatencyTable.measure(room, bench(Clock(drift), types))
    wrong = errors(room, table, types)
    assert max(wrong) < (0.001 if not drift else 0.1)


def test_sizes_between_those_that_were_timed_are_interpolated():
    room = ROOMS["skipping"]
    table = LatencyTable.measure(room, bench(Clock()))
    for kv, width, hidden in ((3, 40, 32), (1, 24, 48), (4, 60, 16)):
        spec = CandidateSpec((LayerSpec(0, kv, 2, width), LayerSpec(2, kv, 1, width)), hidden)
        assert table.predict(spec) == pytest.approx(1000 * seconds(spec), rel=0.1)


def test_whole_students_correct_what_the_parts_do_not_know():
    room = ROOMS["skipping"]
    stated = bench(Clock())
    parts = LatencyTable.measure(room, stated, whole=0)
    assert (parts.scale, parts.offset) == (1, 0)
    other = bench(Clock(), overhead=(1.3, 0.0005))
    specs = [room.random(torch.Generator().manual_seed(n)) for n in range(5)]
    table = parts.fitted(specs, other.medians(specs))
    assert (table.scale, table.offset) == (pytest.approx(1.3), pytest.approx(0.5))


def test_students_that_are_alike_give_a_factor_only():
    room = ROOMS["skipping"]
    table = LatencyTable.measure(room, bench(Clock()), whole=0)
    spec = room.teacher.identity()
    fitted = table.fitted([spec, spec], [2 * table.predict(spec)] * 2)
    assert (fitted.scale, fitted.offset) == (pytest.approx(2), 0)


def test_a_table_comes_back_from_json():
    table = LatencyTable.measure(ROOMS["hybrid"], bench(Clock(), HYBRID))
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_a_kind_that_was_not_timed_is_refused():
    table = LatencyTable((Entry("base", 32, "", (100,), 1.0),))
    with pytest.raises(ConfigError, match="no attention of kind"):
        table.predict(teacher().identity())


def test_the_number_of_threads_is_that_of_before_also_after_an_error():
    before = torch.get_num_threads()
    seen = []

    def step(model, inputs):
        seen.append(torch.get_num_threads())
        raise RuntimeError("broken")

    work = replace(bench(Clock(), threads=before + 1), step=step)
    with pytest.raises(RuntimeError, match="broken"):
        work.medians([teacher().identity()])
    assert seen == [before + 1] and torch.get_num_threads() == before


@pytest.mark.parametrize("options", [{"repeats": 0}])
def test_a_bench_that_times_nothing_is_refused(options):
    with pytest.raises(ConfigError, match="at least once"):
        bench(Clock(), **options)


def test_no_copies_are_refused():
    with pytest.raises(ConfigError, match="at least 1 copy"):
        LatencyTable.measure(ROOMS["stock"], bench(Clock()), copies=0)


class Layers(nn.Module):
    """Real matrix products in the shape of a student."""

    def __init__(self, spec):
        super().__init__()
        width = spec.hidden_size
        steps = []
        for layer in spec.layers:
            inner = [layer.heads * 8] if ATTENTION not in layer.skip else []
            inner += [layer.intermediate_size] if MLP not in layer.skip else []
            steps += [nn.Sequential(nn.Linear(width, n), nn.Linear(n, width)) for n in inner]
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        for step in self.steps:
            x = x + step(x)


def test_real_modules_are_timed_and_more_of_them_are_not_predicted_to_take_less():
    room = SearchSpace.around(teacher(hidden=64, width=256), kv_heads=(4,), ffn=(32, 256))
    stated = Bench(Layers, lambda spec: {"x": torch.zeros(64, spec.hidden_size)}, repeats=5)
    table = LatencyTable.measure(room, stated, copies=8)
    assert all(entry.ms >= 0 for entry in table.entries) and any(entry.ms > 0 for entry in table.entries)
    full = room.teacher.identity()
    assert table.predict(full) >= table.predict(CandidateSpec(full.layers[:1], 64)) >= 0


def test_students_that_take_no_time_are_refused():
    table = LatencyTable.measure(ROOMS["stock"], bench(Clock()), whole=0)
    with pytest.raises(ConfigError, match="no time at all"):
        table.fitted([teacher().identity()], [0.0])
