"""Safetensors files that are written and read tensor by tensor, so that no file has to fit in memory.

What is written is byte for byte what the library writes: tensors in descending order of their dtypes, then by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_qep.engine.headers import read_header
from hf_qep.errors import CheckpointError

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> name in a file, in the order in which a file holds its tensors."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_ALIGNMENT = 8
AGAIN = "put it back as it was, then go on with --resume if a block was done, else start again"
"""What to do about a file that went away under a job."""


@dataclass(frozen=True)
class Described:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Described:
        """What `tensor`, which may be on meta, is like."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(path: Path, tensors: Mapping[str, Described], read: Callable[[str], Tensor]) -> None:
    """Write a file of the described tensors. read: gives one of them by its name; it is asked once for each.

    Raises ValueError if it gives another dtype or shape, KeyError for a dtype that is not in DTYPES.
    """
    with path.open("wb") as file:
        file.write(header_of(tensors))
        for name in _in_order(tensors):
            tensor = read(name).detach().cpu().contiguous()
            if Described.of(tensor) != tensors[name]:
                raise ValueError(f"{name!r} is {Described.of(tensor)}, not {tensors[name]}")
            if tensor.numel():
                file.write(_bytes(tensor))


def header_of(tensors: Mapping[str, Described]) -> bytes:
    """All that a file of these tensors holds before their values. Raises KeyError for a dtype that is not in DTYPES."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in _in_order(tensors):
        found = tensors[name]
        span = [at, at := at + found.bytes]
        header[name] = {"dtype": DTYPES[found.dtype], "shape": list(found.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _in_order(tensors: Mapping[str, Described]) -> list[str]:
    rank = {dtype: place for place, dtype in enumerate(DTYPES)}
    return sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """A file that is read tensor by tensor into memory of its own; the library maps whole files.

    Raises CheckpointError if it is gone or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._state = self._stat()
        self.entries = read_header(self._path)

    @property
    def name(self) -> str:
        """Of the file, without folders."""
        return self._path.name

    def check(self) -> None:
        """Raise CheckpointError if the file is gone, or another one than it was."""
        if self._stat() != self._state:
            raise CheckpointError(f"{self._path.name!r} has changed since it was opened; {AGAIN}")

    def read(self, name: str) -> Tensor:
        """One tensor. Raises KeyError for a name that is not in `entries`."""
        self.check()
        entry = self.entries[name]
        raw = torch.empty(entry.bytes, dtype=torch.uint8)
        try:
            with self._path.open("rb") as file:
                file.seek(entry.start)
                found = file.readinto(_bytes(raw))
        except OSError as error:
            raise self._gone(error) from error
        if found != entry.bytes:
            raise CheckpointError(f"{self._path.name!r} ends before {name!r} does; {AGAIN}")
        return raw.view(_BY_NAME[entry.dtype]).reshape(entry.shape)

    def _stat(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise self._gone(error) from error
        return found.st_size, found.st_mtime_ns

    def _gone(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._path.name!r} is gone or unreadable ({error.strerror}); {AGAIN}")

    def lazily(self, name: str) -> Unread:
        """A stand-in for a tensor, as transformers takes it."""
        return Unread(self, name)


@dataclass(frozen=True)
class Unread:
    """A tensor of a file that is read when it is asked for an index."""

    file: TensorFile
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.file.read(self.name)[index]
