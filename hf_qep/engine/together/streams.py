"""Streams whose batches lie with several processes: one file, written and read by the first of them.

The file is the one that a process alone would write, so a job can go on with any number of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hf_qep.engine.streams import Stream
from hf_qep.engine.tensor_files import Described, TensorFile, write_tensors
from hf_qep.engine.together.shares import Shares

_CPU = torch.device("cpu")


def save_stream(shares: Shares, stream: Stream, path: Path | None) -> None:
    """Write the batches of all processes to one file, as `Stream.save` does. path: on the first process only."""
    processes = shares.processes
    if processes.count == 1:
        stream.save(path)
        return
    found = {number: stream.like(number - shares.own.start) for number in shares.own}
    like = {str(number): each for part in processes.gather(found) for number, each in part.items()}

    def fetch(name: str) -> Tensor:
        if int(name) in shares.own:
            return stream.get(int(name) - shares.own.start, _CPU)
        with processes.moving(int(name)):
            return processes.receive(_like(like[name]), shares.owner(int(name)))

    if processes.first:
        write_tensors(path, like, fetch)
        processes.gather()
        return
    while _give(shares, stream):
        pass


def _give(shares: Shares, stream: Stream) -> bool:
    """Send the batch that the first process asks for, if it is here; whether it asks for one."""
    with shares.processes.moving() as said:
        if said[0] in shares.own:
            shares.processes.send(stream.get(said[0] - shares.own.start, _CPU), 0)
    return said[0] is not None


def restore_stream(shares: Shares, stream: Stream, path: Path | None) -> None:
    """Put the batches of a file that `save_stream` wrote, with any number of processes, where they belong.

    path: on the first process only.
    """
    processes = shares.processes
    if processes.count == 1:
        stream.restore(path)
        return
    stream.clear()
    file = TensorFile(path) if processes.first else None
    for number in range(shares.batches):
        tensor = None if file is None else file.read(str(number))
        with processes.moving(None if tensor is None else Described.of(tensor)) as said:
            if file is not None and number not in shares.own:
                processes.send(tensor, shares.owner(number))
            elif file is None and number in shares.own:
                tensor = processes.receive(_like(said[0]), 0)
        if number in shares.own:
            stream.append(tensor)


def _like(described: Described) -> Tensor:
    return torch.empty(described.shape, dtype=described.dtype)
