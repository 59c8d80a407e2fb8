"""Headers of safetensors files, read as untrusted input: no weight is read, nothing is allocated by what they claim.

A file is: 8 bytes, the header length N, little-endian; N bytes of json, name -> {dtype, shape, data_offsets}; the data.
The tensors must fill the data exactly: no hole, no overlap, no byte left over.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qep.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library itself."""
MAX_JSON_BYTES = 64 << 20
MAX_DIMENSION = 2**31

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "hf_qep_manifest.json"
"""How a checkpoint was made; written by `manifest.py`, named here because reading it needs no torch."""
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")
"""Keys with which a config makes a reader run code of the repository."""

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
SHARED_BLOBS = ".huggingface-shared-blobs"
"""In the folder in which the Hub cache keeps what several repositories share."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file describes it. bytes: size of its data. start: where they begin in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int


def read_json(path: Path) -> dict[str, Any]:
    """A json object of a checkpoint. Raises CheckpointError if it is missing, too large, not json or not an object."""
    if not path.is_file():
        raise CheckpointError(f"{path.name!r} is missing in {path.parent.name!r}; download the checkpoint again")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path.name!r} has {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}; it is no config or index"
        )
    return _parse(path.read_bytes(), path.name)


def read_headers(
    folder: Path, entries: Callable[[str], dict[str, TensorEntry]] | None = None
) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint in `folder`, as transformers would find them: one file, or shards with an index.

    entries: tensors of a file by its name, where files need not be in `folder` yet; default: they are read there.
    Raises CheckpointError naming the file or tensor if one is missing, truncated, contradictory or outside `folder`.
    """
    read = entries or (lambda name: read_header(inside(folder, name)))
    if (folder / SINGLE_FILE).exists():
        return read(SINGLE_FILE)
    weight_map = read_weight_map(folder)
    shards = {name: read(name) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{INDEX_FILE!r} places {name!r} in {shard!r}, which does not hold it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_weight_map(folder: Path) -> dict[str, str]:
    """Name of a tensor -> plain name of its file, by the index. Raises CheckpointError if there is none to be used."""
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(inside(folder, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE!r} has no `weight_map`; download the checkpoint again")
    for shard in weight_map.values():
        _check_plain(shard)
    return weight_map


def inside(folder: Path, name: Any) -> Path:
    """`folder / name`. Raises CheckpointError unless the name is plain and the file is there."""
    _check_plain(name)
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{name!r} is missing in {folder.name!r}; download the checkpoint again")
    return path


def _check_plain(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(safetensors|json)", name):
        raise CheckpointError(
            f"the index names the file {name!r}; only plain file names inside the folder are safe to read"
        )


def check_links(folder: Path) -> None:
    """Raise CheckpointError for a link that leads out of `folder`: what is read may be published again.

    Files of the Hub cache are links into `blobs` of their repository or of the whole cache; these are allowed.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        repository = root.parent.parent
        allowed += [repository / "blobs"]
        allowed += [repository.parent / "blobs"] if (repository.parent / "blobs" / SHARED_BLOBS).is_file() else []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{path.name!r} is a link to outside {folder.name!r}; replace it by a copy if you trust it"
            )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file. Raises CheckpointError if the file is not exactly what its header says."""
    with path.open("rb") as file:
        return parse_header(path.name, path.stat().st_size, file.read)


def parse_header(name: str, size: int, read: Callable[[int], bytes]) -> dict[str, TensorEntry]:
    """Tensors of a safetensors file of so many bytes. read: gives the next bytes of it, as many as are asked for.

    Raises CheckpointError if the file is not exactly what its header says.
    """
    prefix = read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{name!r} has {size} bytes and no safetensors header; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{name!r} claims a header of {length} bytes, but has {size} bytes (limit {MAX_HEADER_BYTES}); it is "
            "truncated or not a safetensors file, download it again"
        )
    header = _parse(read(length), name)
    header.pop("__metadata__", None)
    spans = {tensor: _span(name, tensor, entry) for tensor, entry in header.items()}
    _check_cover(name, spans, size - 8 - length)
    return {
        tensor: TensorEntry(
            name, header[tensor]["dtype"], tuple(header[tensor]["shape"]), end - start, 8 + length + start
        )
        for tensor, (start, end) in spans.items()
    }


def _span(file: str, name: str, entry: Any) -> tuple[int, int]:
    """(start, end) of a tensor's data, after checking that dtype, shape and offsets agree."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"the tensor {name!r} in {file!r} lacks dtype, shape or data_offsets; the file is damaged"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"the tensor {name!r} in {file!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or any(size > MAX_DIMENSION for size in shape):
        raise CheckpointError(f"the tensor {name!r} in {file!r} has the impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"the tensor {name!r} in {file!r} has the impossible data_offsets {offsets!r}")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"the tensor {name!r} in {file!r} has {end - start} bytes, but {dtype} of shape {shape} needs "
            f"{math.prod(shape) * _ITEM_BYTES[dtype]}; the file is damaged"
        )
    return start, end


def _check_cover(file: str, spans: dict[str, tuple[int, int]], data_bytes: int) -> None:
    at, previous = 0, "the header"
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if end > data_bytes:
            raise CheckpointError(
                f"{file!r} is truncated: the tensor {name!r} ends at byte {end} of the data, the file has "
                f"{data_bytes}; download it again"
            )
        if start != at:
            what = "overlaps with" if start < at else "leaves a hole after"
            raise CheckpointError(f"the tensor {name!r} in {file!r} {what} {previous!r}; the file is damaged")
        at, previous = end, name
    if at != data_bytes:
        raise CheckpointError(f"{file!r} has {data_bytes - at} bytes that belong to no tensor; the file is damaged")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _parse(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name!r} is not readable json ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name!r} holds a json {type(value).__name__}, not an object; download it again")
    return value


def _unique(pairs: Iterable[tuple[str, Any]], name: str) -> dict[str, Any]:
    """Two readers may pick different ones of two equal keys; a checkpoint with such keys has no meaning."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise CheckpointError(f"{name!r} has the key {key!r} twice; the file is damaged")
        found[key] = value
    return found


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder.name!r} has only the weights {pickles[0]!r}, and such files can run code when read; convert them "
            "to safetensors in a place you trust (load, then save_pretrained) or use a revision with safetensors"
        )
    return f"{folder.name!r} has neither {SINGLE_FILE!r} nor {INDEX_FILE!r}; give the folder of a transformers model"
