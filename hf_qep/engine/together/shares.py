"""Which process has which calibration rows, in which order their sums are added up, and who solves which linear.

A sum of floats depends on its order, so the order must not depend on the number of processes. The batches lie in SHARES
shares, as leaves of a tree of halves. Each eighth is summed by itself, two eighths are added to a quarter, two quarters
to a half, two halves to the whole, whoever has them: up to eight processes give the same bytes. Where moments are large
only halves are summed by themselves: two processes give the bytes of one, and more of them the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_qep.algorithms.moments import Moments
from hf_qep.architectures.parts import Group, LinearRef
from hf_qep.config import QepConfig
from hf_qep.engine.residence import why_in_memory
from hf_qep.engine.streams import StreamStore
from hf_qep.engine.together.processes import Processes
from hf_qep.errors import ConfigError

SHARES = 64
"""Most processes."""
LEAVES = 8
"""Sums that are made by themselves. Up to three of them wait at a time, with the activations: on the disk if there is
no room."""
WIDE_LEAVES = 2
"""The same where moments are large: one waits."""
WIDE_BYTES = 256 << 20
"""Bytes of a group's moments from which on they are large: 5,800 inputs with two moments."""

Sums = dict[LinearRef, Moments]
Node = tuple[int, int]
"""First share, and that behind the last."""
Empty = Callable[[torch.device | str | None], Sums]
Key = TypeVar("Key")


def why_alone(config: QepConfig) -> str | None:
    """What in a recipe keeps several processes from sharing the work, None if nothing does."""
    if config.distill_epochs:
        return f"distill_epochs {config.distill_epochs} trains all layers together"
    return why_in_memory(config, 0)


def check_shared(processes: Processes, reason: str | None) -> None:
    """Raise ConfigError if there are several processes and a reason why only one can do the job."""
    if processes.count > 1 and reason:
        raise ConfigError(
            f"{processes.count} processes cannot share this job: {reason}; use --effort fast and method sign, onebit, "
            "gptq, rtn or qqa, or one process"
        )


def waiting_bytes(moments: int) -> int:
    """Most bytes of sums that wait while others grow. moments: bytes of a group."""
    return moments * (_leaves(moments).bit_length() - 1)


def _leaves(moments: int) -> int:
    return LEAVES if moments < WIDE_BYTES else WIDE_LEAVES


class Shares:
    """The part that each of some processes has in a job. batches: of all of them together.

    Raises ConfigError if there are more processes than can have a part.
    """

    def __init__(self, processes: Processes | None = None, batches: int = 0) -> None:
        self.processes = processes or Processes()
        self.batches = batches
        bounds = [self._bounds(index) for index in range(self.processes.count)]
        self.own = range(*(self._batch(share) for share in bounds[self.processes.index]))
        """Numbers of the batches of this process."""
        if self.processes.count > 1 and any(self._batch(start) == self._batch(stop) for start, stop in bounds):
            raise ConfigError(
                f"{self.processes.count} processes cannot share {batches} batches of calibration rows; start fewer ("
                f"{SHARES} at most), or lower the batch size"
            )

    def total(self, value: int) -> int:
        """Sum of a number over all processes."""
        return sum(self.processes.gather(value))

    def owner(self, number: int) -> int:
        """Process that has the batch of a number."""
        bounds = (self._bounds(index) for index in range(self.processes.count))
        return next(i for i, (start, stop) in enumerate(bounds) if self._batch(start) <= number < self._batch(stop))

    def add_up(
        self, empty: Empty, observe: Callable[[range, Sums], None], store: StreamStore, *, everywhere: bool
    ) -> Sums:
        """Moments over all batches: on all processes, or only where the last batch is; the others get none.

        empty: moments before the first token, the same on all, on a device (None: where they are to live). observe:
        adds some of the own batches, counted from 0. store: room for sums that wait.
        """
        width = SHARES // _leaves(sum(moments.bytes for moments in empty("meta").values()))

        def leaf(batches: range) -> Sums:
            sums = empty(None)
            observe(batches, sums)
            return sums

        mine: dict[Node, Sums] = {}
        for node in self._whole((0, SHARES)):
            if self._holder(node) == self.processes.index:
                mine[node] = self._sum(node, width, leaf, store)
        if self.processes.count == 1:
            return mine.popitem()[1]
        with self.processes.moving():
            found = self._merge((0, SHARES), mine)
            if everywhere:
                found = found or empty(None)
                self._spread(found)
        return found or {}

    def _sum(self, node: Node, width: int, leaf: Callable[[range], Sums], store: StreamStore) -> Sums:
        """Sum over a node whose batches are all here. width: most shares of a leaf. store: for what waits."""
        start, stop = (self._batch(share) - self.own.start for share in node)
        if node[1] - node[0] <= width:
            return leaf(range(start, stop))
        left, right = _halves(node)
        if self._holder(left) is None:
            return self._sum(right, width, leaf, store)
        earlier = self._sum(left, width, leaf, store)
        if self._holder(right) is None:
            return earlier
        waiting = _Waiting(earlier, store)
        return waiting.before(self._sum(right, width, leaf, store))

    def _merge(self, node: Node, mine: dict[Node, Sums]) -> Sums:
        """Sum over a node on the process that has its last batch, none elsewhere."""
        if self._owners(node) <= 1:
            return mine.pop(node, {})
        left, right = _halves(node)
        earlier, later = self._merge(left, mine), self._merge(right, mine)
        sender, receiver, here = self._holder(left), self._holder(right), self.processes.index
        if sender is None or receiver is None:
            return earlier or later
        if sender == receiver:
            return _after(earlier, later) if here == receiver else {}
        if here == sender:
            self._send(earlier, receiver)
            return {}
        if here == receiver:
            self._receive(later, sender)
        return later

    def _send(self, sums: Sums, receiver: int) -> None:
        for moments in sums.values():
            self.processes.send(_numbers(moments.seen), receiver)
            for part in moments.parts():
                self.processes.send(part, receiver)

    def _receive(self, later: Sums, sender: int) -> None:
        for moments in later.values():
            count, mass = self.processes.receive(_numbers((0, 0.0)), sender).tolist()
            parts = (self.processes.receive(torch.empty_like(part), sender) for part in moments.parts())
            moments.add_before((int(count), mass), parts)

    def _spread(self, sums: Sums) -> None:
        holder = self.processes.count - 1
        for moments in sums.values():
            seen = _numbers(moments.seen)
            self.processes.spread(seen, holder)
            count, mass = seen.tolist()
            moments.seen = int(count), mass
            for part in moments.parts():
                self.processes.spread(part, holder)

    def solved_here(self, group: Group) -> list[LinearRef]:
        """Linears of a group that this process solves. One that is alone in it is solved where its moments are."""
        if len(group.linears) == 1:
            return list(group.linears) if self.processes.index == self.processes.count - 1 else []
        solvers = share_out({ref: ref.out_features * ref.in_features**2 for ref in group.linears}, self.processes.count)
        return [ref for ref in group.linears if solvers[ref] == self.processes.index]

    def exchange(self, found: dict[LinearRef, Any]) -> dict[LinearRef, Any]:
        """What all processes found together. The values have a method `cpu`."""
        if self.processes.count == 1:
            return found
        parts = self.processes.gather({ref: each.cpu() for ref, each in found.items()})
        return {ref: each for part in parts for ref, each in part.items()}

    def _bounds(self, index: int) -> Node:
        """First share of a process, and that behind its last. Up to LEAVES processes have whole leaves."""
        count = self.processes.count
        step = SHARES // LEAVES if count <= LEAVES else 1
        start, stop = (-(-i * (SHARES // step) // count) * step for i in (index, index + 1))
        return start, stop

    def _batch(self, share: int) -> int:
        return share * self.batches // SHARES

    def _holder(self, node: Node) -> int | None:
        """Process that has the last batch of a node, None if there is none in it."""
        start, stop = map(self._batch, node)
        return None if start == stop else self.owner(stop - 1)

    def _owners(self, node: Node) -> int:
        start, stop = map(self._batch, node)
        return 0 if start == stop else 1 + self.owner(stop - 1) - self.owner(start)

    def _whole(self, node: Node) -> list[Node]:
        """The largest nodes whose batches are with one process."""
        if self._owners(node) <= 1:
            return [node]
        return [part for half in _halves(node) for part in self._whole(half)]


class _Waiting:
    """Sums in a store."""

    def __init__(self, sums: Sums, store: StreamStore) -> None:
        self._seen, self._parts = {ref: moments.seen for ref, moments in sums.items()}, store.stream()
        for ref in list(sums):
            for part in sums.pop(ref).parts():
                self._parts.append(part)

    def before(self, later: Sums) -> Sums:
        """Add later sums to these, in place of the later."""
        numbers = iter(range(len(self._parts)))
        for ref, moments in later.items():
            parts = (self._parts.get(next(numbers), part.device) for part in moments.parts())
            moments.add_before(self._seen[ref], parts)
        self._parts.clear()
        return later


def share_out(costs: Mapping[Key, float], count: int) -> dict[Key, int]:
    """Share of each of some pieces of work: the dearest first, to the share that has least."""
    loads, found = [0.0] * count, {}
    for key in sorted(costs, key=costs.__getitem__, reverse=True):
        found[key] = least = min(range(count), key=loads.__getitem__)
        loads[least] += costs[key]
    return found


def _halves(node: Node) -> tuple[Node, Node]:
    start, stop = node
    middle = (start + stop) // 2
    return (start, middle), (middle, stop)


def _after(earlier: Sums, later: Sums) -> Sums:
    """Sum of both, in place of the later; the earlier goes piece by piece."""
    for ref in list(later):
        before = earlier.pop(ref)
        later[ref].add_before(before.seen, before.parts())
    return later


def _numbers(seen: tuple[int, float]) -> Tensor:
    return torch.tensor(seen, dtype=torch.float64)
