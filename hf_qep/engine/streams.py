"""Activations of the calibration rows, batch by batch: in memory up to a budget, beyond it on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


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

    def keep(self, tensor: Tensor) -> Tensor | Path:
        """Store a tensor on the CPU or on disk and return where it is."""
        tensor = tensor.detach().to("cpu", copy=tensor.device.type == "cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        if self.used_bytes + size <= self.budget_bytes:
            self.used_bytes += size
            return tensor
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="hf_qep_", dir=self._parent)
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        save_file({"x": tensor}, path)
        self.spilled_bytes += size
        return path

    def drop(self, kept: Tensor | Path) -> None:
        """Give the room back."""
        if isinstance(kept, Path):
            kept.unlink()
        else:
            self.used_bytes -= kept.numel() * kept.element_size()


class Stream:
    """One activation tensor per batch, in order."""

    def __init__(self, store: StreamStore) -> None:
        self._store, self._kept = store, []

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, tensor: Tensor) -> None:
        """Store the next batch."""
        self._kept.append(self._store.keep(tensor))

    def get(self, index: int, device: torch.device) -> Tensor:
        """The tensor of one batch, on `device`."""
        kept = self._kept[index]
        tensor = load_file(kept)["x"] if isinstance(kept, Path) else kept
        return tensor.to(device)

    def replace(self, index: int, tensor: Tensor) -> None:
        """Store another tensor for a batch."""
        self._store.drop(self._kept[index])
        self._kept[index] = self._store.keep(tensor)

    def clear(self) -> None:
        """Drop all batches."""
        while self._kept:
            self._store.drop(self._kept.pop())
