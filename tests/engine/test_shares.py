"""Sums over calibration rows have the same bytes however many processes share the rows."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager
from queue import Queue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms import moments as moments_module
from hf_qep.algorithms.moments import Moments
from hf_qep.architectures.parts import Group, LinearRef
from hf_qep.config import QepConfig
from hf_qep.engine.calibration import Calibration
from hf_qep.engine.job import quantize_model
from hf_qep.engine.streams import StreamStore
from hf_qep.engine.together import shares as shares_module
from hf_qep.engine.together.processes import Processes
from hf_qep.engine.together.shares import SHARES, Shares, share_out, waiting_bytes
from hf_qep.engine.together.streams import restore_stream, save_stream
from hf_qep.errors import ConfigError
from tests.tiny_models import build_batch

REF = LinearRef("linear", None, "linear", 8, 24)


class Threads(Processes):
    """Processes that are threads of one, for as many of them as one likes."""

    def __init__(self, index, count, room):
        self.index, self.count, self._room = index, count, room

    def gather(self, value=None):
        self._room["values"][self.index] = value
        self._room["barrier"].wait()
        found = [self._room["values"][index] for index in range(self.count)]
        self._room["barrier"].wait()
        return found

    @contextmanager
    def moving(self, value=None):
        yield self.gather(value)

    def send(self, tensor, to):
        self._room["queues"][self.index, to].put(tensor.clone())

    def receive(self, tensor, sender):
        return tensor.copy_(self._room["queues"][sender, self.index].get(timeout=20))

    def spread(self, tensor, sender):
        for other in range(self.count):
            if self.index == sender and other != sender:
                self.send(tensor, other)
        if self.index != sender:
            self.receive(tensor, sender)


def together(count, work):
    """What `work` returns in each of some threads."""
    room = {"values": {}, "barrier": threading.Barrier(count, timeout=20), "queues": defaultdict(Queue)}
    found, errors = [None] * count, []

    def run(index):
        try:
            found[index] = work(Threads(index, count, room))
        except Exception as error:
            errors.append(error)
            room["barrier"].abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return found


def batches_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 24, generator=generator) for _ in range(count)]


def moments_by(count, data, everywhere=True):
    """Moments of all batches as each of some processes ends with them."""

    def work(processes):
        shares = Shares(processes, len(data))

        def empty(device):
            return {REF: Moments(24, True, device or "cpu", outputs=8)}

        def observe(batches, sums):
            for batch in batches:
                x = data[shares.own[batch]]
                weight = 1 / x.square().mean(-1)
                sums[REF].update(x, x + 0.1 * x.roll(1), gap=x[:, :8].sin(), token_weight=weight)

        with StreamStore(2000) as store:
            found = shares.add_up(empty, observe, store, everywhere=everywhere)
            assert store.used_bytes == 0
        return found

    return together(count, work)


def same(one, other):
    pairs = list(zip(one[REF].parts(), other[REF].parts(), strict=True))
    return one[REF].seen == other[REF].seen and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("number", [8, 9, 23, 64])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_any_number_of_processes_up_to_eight_gives_the_same_bytes(number, count, monkeypatch):
    monkeypatch.setattr(moments_module, "PART_BYTES", 1000)
    data = batches_of(number)
    (alone,) = moments_by(1, data)
    assert alone[REF].count == 3 * number
    assert all(same(found, alone) for found in moments_by(count, data))


def test_few_batches_are_shared_as_well():
    (alone,) = moments_by(1, batches_of(3))
    for count in (2, 3):
        assert all(same(found, alone) for found in moments_by(count, batches_of(3)))


def test_wide_moments_are_the_same_for_two_processes_and_nearly_for_more(monkeypatch):
    monkeypatch.setattr(shares_module, "WIDE_BYTES", 0)
    monkeypatch.setattr(moments_module, "PART_BYTES", 1000)
    data = batches_of(64)
    (alone,) = moments_by(1, data)
    assert all(same(found, alone) for found in moments_by(2, data))
    for count in (3, 16):
        for found in moments_by(count, data):
            for part, expected in zip(found[REF].parts(), alone[REF].parts(), strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)


def test_sums_are_those_of_one_run_over_all_batches():
    data, straight = batches_of(20), Moments(24)
    for x in data:
        straight.update(x, token_weight=1 / x.square().mean(-1))
    found = moments_by(1, data)[0][REF]
    torch.testing.assert_close(found.hessian(), straight.hessian())


def test_moments_that_one_process_needs_are_only_there():
    found = moments_by(4, batches_of(16), everywhere=False)
    assert [bool(each) for each in found] == [False, False, False, True]
    assert same(found[3], moments_by(1, batches_of(16))[0])


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, SHARES), number=st.integers(1, 200))
def test_every_batch_has_one_process_and_every_process_a_batch(count, number):
    room = {"values": {}}
    if count > number:
        with pytest.raises(ConfigError, match=f"share {number} batches"):
            Shares(Threads(0, count, room), number)
        return
    try:
        owned = [list(Shares(Threads(index, count, room), number).own) for index in range(count)]
    except ConfigError:
        assert number < SHARES  # so few that equal shares leave one process without any
        return
    assert sum(owned, []) == list(range(number)) and all(owned)


def test_more_processes_than_shares_are_refused():
    with pytest.raises(ConfigError, match="64 at most"):
        Shares(Threads(0, 65, {}), 1000)


@given(costs=st.dictionaries(st.integers(), st.floats(0, 1e6), max_size=20), count=st.integers(1, 5))
def test_work_is_shared_out_so_that_none_waits_for_more_than_one_piece(costs, count):
    found = share_out(costs, count)
    assert found.keys() == costs.keys()
    loads = [sum(costs[key] for key in costs if found[key] == share) for share in range(count)]
    assert max(loads) <= min(loads) + max(costs.values(), default=0) + 1e-3


def test_experts_are_solved_by_all_and_a_linear_alone_where_its_moments_are():
    experts = Group(tuple(LinearRef("experts", number, "expert", 8, 24) for number in range(6)))
    solved = [Shares(Threads(index, 3, {}), 9).solved_here(experts) for index in range(3)]
    assert sorted(map(len, solved)) == [2, 2, 2] and {ref for part in solved for ref in part} == set(experts.linears)
    assert [len(Shares(Threads(index, 3, {}), 9).solved_here(Group((REF,)))) for index in range(3)] == [0, 0, 1]


def test_fewer_sums_wait_where_they_are_large():
    assert (waiting_bytes(1000), waiting_bytes(8 << 30)) == (3000, 8 << 30)


@pytest.mark.parametrize(("saving", "reading"), [(1, 3), (3, 1), (2, 4)])
def test_streams_are_written_as_by_one_process_and_read_by_any_number(tmp_path, saving, reading):
    data = [x.to(torch.bfloat16) for x in batches_of(12)]

    def save(processes):
        shares = Shares(processes, len(data))
        with StreamStore(1 << 20) as store:
            stream = store.stream()
            for number in shares.own:
                stream.append(data[number])
            save_stream(shares, stream, tmp_path / f"{processes.count}" if processes.first else None)

    def read(processes):
        shares = Shares(processes, len(data))
        with StreamStore(0, tmp_path) as store:
            stream = store.stream()
            restore_stream(shares, stream, tmp_path / f"{saving}" if processes.first else None)
            return list(stream.all(torch.device("cpu")))

    for count in (1, saving):
        together(count, save)
    assert (tmp_path / f"{saving}").read_bytes() == (tmp_path / "1").read_bytes()
    found = sum(together(reading, read), [])
    assert len(found) == len(data) and all(map(torch.equal, found, data))


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "qwen3_moe"])
def test_a_model_in_memory_is_the_same_on_all(tiny_model, family):
    inputs = build_batch(family, batch_size=12)
    if family == "bert":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1::2, 9:] = 0
    rows, recipe = Calibration(inputs, {}, "", 12 * 16), QepConfig(method="gptq", batch_size=2)

    def work(processes):
        model = tiny_model(family)
        report = quantize_model(model, recipe, rows, processes=processes)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, report.layers

    (alone, layers), *_ = together(1, work)
    for found, reported in together(3, work):
        assert reported == layers
        assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)
