"""Activations of the calibration rows, batch by batch: in memory up to a budget, beyond it on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qep.engine.tensor_files import Described, TensorFile, write_tensors

ROOM_BYTES = 8 << 30
"""For the activations of a job in memory, unless more or less is asked for."""
SHARE = 0.5
"""Of the free memory: the most that activations take of it where the weights are read block by block."""


def room_bytes(free: int) -> int:
    """Bytes for the activations of a job that reads its model block by block, of `free` bytes."""
    return min(ROOM_BYTES, int(SHARE * free))


@dataclass(frozen=True)
class _Kept:
    """A tensor, or the file that holds it, and what it is like."""

    where: Tensor | Path
    like: Described


class StreamStore:
    """Room for activation tensors, shared by all streams of one job.

    budget_bytes: bytes kept in memory; tensors beyond it are written to a temporary folder. folder: where that lies
    (default: the system's). Use as a context manager; leaving it removes the files.
    """

    def __init__(self, budget_bytes: int, folder: Path | None = None) -> None:
        self.budget_bytes, self.used_bytes, self.spilled_bytes = budget_bytes, 0, 0
        self._parent, self._folder, self._count = folder, None, 0

    def __enter__(self) -> StreamStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def stream(self) -> Stream:
        """A new, empty stream."""
        return Stream(self)

    def keep(self, tensor: Tensor) -> _Kept:
        """Store a tensor on the CPU or on disk and return where it is."""
        tensor = tensor.detach().to("cpu", copy=tensor.device.type == "cpu").contiguous()
        like = Described.of(tensor)
        if self.used_bytes + like.bytes <= self.budget_bytes:
            self.used_bytes += like.bytes
            return _Kept(tensor, like)
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="hf_qep_", dir=self._parent)
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        save_file({"x": tensor}, path)
        self.spilled_bytes += like.bytes
        return _Kept(path, like)

    def drop(self, kept: _Kept) -> None:
        """Give the room back."""
        if isinstance(kept.where, Path):
            kept.where.unlink()
        else:
            self.used_bytes -= kept.like.bytes


class Stream:
    """One activation tensor per batch, in order."""

    def __init__(self, store: StreamStore) -> None:
        self._store, self._kept = store, []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Positions of all batches together."""
        return sum(torch.Size(kept.like.shape[:-1]).numel() for kept in self._kept)

    @property
    def bytes(self) -> int:
        """Of all batches together."""
        return sum(kept.like.bytes for kept in self._kept)

    def like(self, index: int) -> Described:
        """What the tensor of one batch is like."""
        return self._kept[index].like

    def append(self, tensor: Tensor) -> None:
        """Store the next batch."""
        self._kept.append(self._store.keep(tensor))

    def get(self, index: int, device: torch.device) -> Tensor:
        """The tensor of one batch, on `device`."""
        where = self._kept[index].where
        tensor = load_file(where)["x"] if isinstance(where, Path) else where
        return tensor.to(device)

    def all(self, device: torch.device) -> Iterator[Tensor]:
        """The tensors of all batches in turn, on `device`."""
        return (self.get(index, device) for index in range(len(self)))

    def replace(self, index: int, tensor: Tensor) -> None:
        """Store another tensor for a batch."""
        self._store.drop(self._kept[index])
        self._kept[index] = self._store.keep(tensor)

    def clear(self) -> None:
        """Drop all batches."""
        while self._kept:
            self._store.drop(self._kept.pop())

    def save(self, path: Path) -> None:
        """Write all batches to one file."""
        like = {str(index): kept.like for index, kept in enumerate(self._kept)}
        write_tensors(path, like, lambda name: self.get(int(name), torch.device("cpu")))

    def restore(self, path: Path) -> None:
        """Put the batches of a file that `save` wrote in the place of those that are here."""
        self.clear()
        file = TensorFile(path)
        for index in range(len(file.entries)):
            self.append(file.read(str(index)))
