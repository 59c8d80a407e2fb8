"""A checkpoint of quantisation method "qep", read with numpy alone; and what such a checkpoint is, in full.

The file imports nothing of its package: copy it, or translate it, into any other runtime.

    checkpoint = Checkpoint("qwen3-0.6b-1bit")
    weights = {name: checkpoint.dequantize(name) for name in checkpoint.modules}

Files.  A folder as `save_pretrained` of transformers writes it: `config.json` and `model.safetensors`, or shards with
`model.safetensors.index.json`, whose `weight_map` gives the file of every tensor.  A safetensors file is 8 bytes, the
length N of its header; N bytes of json, name -> {dtype, shape, data_offsets}, with a `__metadata__` to be ignored; then
the data, which the tensors fill without hole or overlap.  All numbers are little-endian, all arrays row-major.

Config.  `quantization_config` in `config.json` has `quant_method` "qep"; `format_version`, 1 or 2, of equal meaning,
where a reader refuses what is newer; and `layers`, groups of modules that are stored alike: their names, `modules`, a
`format`, and its options.  Nothing else in it matters for the weights.

Names.  A module NAME is stored as `NAME.weight` with the other tensors of its format beside it and, if it has one, its
bias, `NAME.bias`, (out,), of any float dtype.  A stack of experts has `NAME` in the place of `NAME.weight`, and each
tensor one more dimension in front.  `layers` names modules as transformers does; for the few families whose tensors
transformers renames when it loads them (ViT, Mixtral) files have the names of the Hub, and the caller gives `rename`.
A head that is tied to a listed embedding is neither listed nor stored: it is the same matrix.  Every W is (out, in),
those of GPT-2's Conv1D too; a table of tokens has a row per token, before any factor of the model's embeddings.

Format `sign`, options group_size (null: the whole row) and column_scale (default false):

    W[i, j] = (sign[i, j] * weight_scale[i, j // group_size]) * column_scale[j]

    weight         int32    (out, ceil(in/32))              signs
    weight_scale   float16  (out, in/group_size or 1)
    column_scale   float16  (in,)                           only with the option

Format `factored`, options rank and flat (default false): W = L R with

    L[i, k] = sign_left[i, k] * weight_scale[i]       R[k, j] = (sign[k, j] * middle_scale[k]) * column_scale[j]

    weight         int32    (rank, ceil(in/32))             signs of R
    left           int32    (out, ceil(rank/32)), if flat (ceil(out rank/32),): row after row, rank a multiple of 8
    weight_scale   float16  (out,)
    middle_scale   float16  (rank,)
    column_scale   float16  (in,)

Format `integer`, options bits (4 or 8) and group_size (null: the whole row):

    W[i, j] = code[i, j] * scale[i, j // group_size]

    weight         int32    (out, ceil(groups/2) + ceil(in bits/32)): float16 scales, the first in the lower half of a
                            word, then codes

Bits.  Bit j of word w, counted from the lowest, is column 32 w + j: 1 is +1, 0 is -1.  Byte k of a row holds columns
8k .. 8k+7.  A code of b bits is stored as code + 2^(b-1), the lowest column in the lowest b bits of a byte.  Bits past
the last column are 0.  Scales are widened to float32, and products rounded to it in the order of the brackets.

Widths.  `in` is the architecture's business; files tell it where scales do, elsewhere up to the padding of a row's last
word.  This reader takes the largest width if some row has a bit that proves it, and else asks for `columns`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION, WORD = 2, 32
MAX_HEADER_BYTES, MAX_DIMENSIONS, MAX_ELEMENTS = 100_000_000, 16, 1 << 48
PANEL_WEIGHTS = 1 << 22
"""Weights that `linear` makes dense at a time: 16 MiB of float32."""

DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8", "BOOL": "|b1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), "|u1"),
}
"""Of safetensors -> of numpy, in size; numpy has no bfloat16 and no floats of 8 bits."""
LEAVES = ("weight", "left", "weight_scale", "middle_scale", "column_scale")
OPTIONS: dict[str, dict[str, Any]] = {
    "sign": {"group_size": None, "column_scale": False},
    "factored": {"rank": None, "flat": False},
    "integer": {"bits": None, "group_size": None},
}

Array = np.ndarray
Shapes = dict[str, tuple[str, tuple[int, ...]]]


class ReaderError(ValueError):
    """What is wrong with a checkpoint, or with a question about it, in one sentence."""


class Entry(NamedTuple):
    """One tensor as its file describes it. start, end: of its data, in bytes from the beginning of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Module(NamedTuple):
    """One quantised matrix, or stack of them. tensors: leaf -> name in the files. widths: all that fit, ascending."""

    spec: dict[str, Any]
    tensors: dict[str, str]
    experts: int | None
    rows: int
    widths: list[int]


class Matrix(NamedTuple):
    """Packed signs (bits 1) or codes, uint8 (rows, bytes), and scales, float16 (rows, groups) and (columns,)."""

    octets: Array
    columns: int
    scale: Array
    column_scale: Array | None = None
    bits: int = 1

    def codes(self, rows: Any) -> Array:
        """float32 (n, columns): signs, or whole numbers, of the rows that a slice or an int array (n,) picks."""
        octets = self.octets[rows]
        if self.bits == 1:
            return np.unpackbits(octets, axis=-1, count=self.columns, bitorder="little").astype(np.float32) * 2 - 1
        parts = [octets >> shift & (1 << self.bits) - 1 for shift in range(0, 8, self.bits)]
        return np.stack(parts, -1).reshape(len(octets), -1)[:, : self.columns].astype(np.float32) - (1 << self.bits - 1)

    def dense(self, rows: Any = slice(None)) -> Array:
        """float32 (n, columns): the same rows, multiplied by their scales."""
        codes, scale = self.codes(rows), self.scale[rows].astype(np.float32)
        dense = (codes.reshape(*scale.shape, self.columns // scale.shape[1]) * scale[..., None]).reshape(codes.shape)
        return dense if self.column_scale is None else dense * self.column_scale.astype(np.float32)

    def product(self, x: Array) -> Array:
        """x float32 (..., columns) -> (..., rows), a panel of rows at a time."""
        rows, step = len(self.octets), max(1, PANEL_WEIGHTS // self.columns)
        y = np.empty((*x.shape[:-1], rows), np.float32)
        for first in range(0, rows, step):
            y[..., first : first + step] = x @ self.dense(slice(first, first + step)).T
        return y


class Checkpoint:
    """A packed checkpoint, mapped to memory; nothing is read before it is asked for.

    modules: name as in `config.json` -> Module. entries: name of a tensor in the files -> Entry.
    rename: from the first to the second kind of name, for families that transformers renames.
    Raises ReaderError if a file is missing, damaged, of a newer version, or not what the config says.
    """

    def __init__(self, folder: str | Path, rename: Callable[[str], str] = str) -> None:
        self.folder = Path(folder)
        try:
            specs = _specs(_object((self.folder / "config.json").read_bytes(), "config.json"))
            self.entries = _entries(self.folder)
            files = {entry.file: self.folder / entry.file for entry in self.entries.values()}
            self._maps = {name: np.memmap(path, np.uint8, "r") for name, path in files.items()}
        except OSError as error:
            raise ReaderError(f"{str(error.filename)!r} cannot be read: {error.strerror}") from error
        self.modules = {name: _module(name, rename(name), spec, self.entries) for name, spec in specs.items()}

    def tensor(self, name: str, widen: bool = True) -> Array:
        """A tensor of the files as stored, read-only; bfloat16 is widened to float32, or else its bits as uint16."""
        entry = self.entries.get(name)
        if entry is None or entry.dtype.startswith("F8"):
            raise ReaderError(f"{self.folder.name!r} holds no tensor {name!r} of a dtype that numpy has")
        value = np.ndarray(entry.shape, DTYPES[entry.dtype], self._maps[entry.file], entry.start)
        return (value.astype("<u4") << 16).view("<f4") if entry.dtype == "BF16" and widen else value

    def matrices(self, name: str, expert: int | None = None, columns: int | None = None) -> list[Matrix]:
        """Packed matrices whose product, the first on the left, is the weight: one, or two of format `factored`."""
        module, columns = self._module(name), self._columns(name, columns)
        if (expert is None) != (module.experts is None) or (expert is not None and not 0 <= expert < module.experts):
            raise ReaderError(f"{name!r} has {module.experts or 'no'} experts, so `expert` cannot be {expert!r}")
        whole = {leaf: self.tensor(stored) for leaf, stored in module.tensors.items()}
        return _matrices(module, whole if expert is None else {k: t[expert] for k, t in whole.items()}, columns)

    def rows(self, name: str, ids: Any, expert: int | None = None, columns: int | None = None) -> Array:
        """float32 (..., in): rows `ids` int (...) of the weight, as a table of tokens is read."""
        left, *rest = self.matrices(name, expert, columns)
        ids, limit = np.asarray(ids), len(left.octets)
        if ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < limit):
            raise ReaderError(f"rows of {name!r} are whole numbers from 0 to {limit - 1}, not {brief(ids)}")
        dense = left.dense(ids.ravel())
        for matrix in rest:
            dense = dense @ matrix.dense()
        return dense.reshape(*ids.shape, -1)

    def dequantize(self, name: str, columns: int | None = None) -> Array:
        """Dense float32 weight (out, in), or (experts, out, in)."""
        ids, experts = np.arange(self._module(name).rows), self._module(name).experts
        if experts is None:
            return self.rows(name, ids, None, columns)
        return np.stack([self.rows(name, ids, expert, columns) for expert in range(experts)])

    def bias(self, name: str) -> Array | None:
        """float32 (out,), or None if the module has none."""
        module = self._module(name)
        stored = module.tensors["weight"].removesuffix(".weight") + ".bias"
        if module.experts is not None or stored not in self.entries:
            return None
        bias = self.tensor(stored)
        if bias.shape != (module.rows,) or bias.dtype.kind != "f":
            raise ReaderError(f"{stored!r} is {bias.dtype} {bias.shape}, not one float for each of {module.rows} rows")
        return bias.astype(np.float32)

    def linear(self, name: str, x: Array, expert: int | None = None) -> Array:
        """x (..., in) -> x W^T + bias, float32 (..., out), without ever holding the dense weight."""
        y = np.asarray(x, np.float32)
        for matrix in reversed(self.matrices(name, expert, y.shape[-1] if y.ndim else 0)):
            y = matrix.product(y)
        return y if (bias := self.bias(name)) is None else y + bias

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            raise ReaderError(f"{name!r} is none of the {len(self.modules)} quantised modules of {self.folder.name!r}")
        return self.modules[name]

    def _columns(self, name: str, columns: int | None) -> int:
        """The width of a module, given or found out. Raises ReaderError if it is wrong or cannot be known."""
        module = self._module(name)
        *narrower, widest = module.widths
        if columns is None and (not narrower or self._has_bits_beyond(module, narrower[-1])):
            return widest
        if columns not in module.widths or (columns != widest and self._has_bits_beyond(module, columns)):
            span = f"{module.widths[0]} to {widest}"
            raise ReaderError(f"{name!r} has {span} columns by its files, and `columns` cannot be {columns!r}")
        return columns

    def _has_bits_beyond(self, module: Module, columns: int) -> bool:
        used = (columns * module.spec.get("bits", 1) - 1) % WORD + 1
        last = self.tensor(module.tensors["weight"])[..., -1].astype("<u4")
        return used < WORD and bool((last >> used).any())


def _matrices(module: Module, tensors: dict[str, Array], columns: int) -> list[Matrix]:
    spec, octets = module.spec, tensors["weight"].view(np.uint8)
    if spec["format"] == "sign":
        return [Matrix(octets, columns, tensors["weight_scale"], tensors.get("column_scale"))]
    if spec["format"] == "integer":
        groups = columns // (spec["group_size"] or columns)
        scale = octets[:, : 2 * groups].view("<f2")
        return [Matrix(octets[:, 4 * _ceil(groups, 2) :], columns, scale, None, spec["bits"])]
    left = tensors["left"].view(np.uint8)
    if spec["flat"]:
        left = left[: module.rows * spec["rank"] // 8].reshape(module.rows, -1)
    right = Matrix(octets, columns, tensors["middle_scale"][:, None], tensors["column_scale"])
    return [Matrix(left, spec["rank"], tensors["weight_scale"][:, None]), right]


def _ceil(bits: int, word: int = WORD) -> int:
    return -(-bits // word)


def _layout(spec: dict[str, Any], out: int, width: int) -> Shapes:
    """Leaf -> dtype and shape that one matrix (out, width) must have."""
    rank, groups = spec.get("rank"), width // (spec.get("group_size") or width)
    if spec["format"] == "integer":
        return {"weight": ("I32", (out, _ceil(groups, 2) + _ceil(width * spec["bits"])))}
    scales: Shapes = {"weight_scale": ("F16", (out, groups)), "column_scale": ("F16", (width,))}
    if spec["format"] == "sign":
        scales = scales if spec["column_scale"] else {"weight_scale": scales["weight_scale"]}
        return {"weight": ("I32", (out, _ceil(width))), **scales}
    left = (_ceil(out * rank),) if spec["flat"] else (out, _ceil(rank))
    scales |= {"weight_scale": ("F16", (out,)), "middle_scale": ("F16", (rank,))}
    return {"weight": ("I32", (rank, _ceil(width))), "left": ("I32", left), **scales}


def _widths(spec: dict[str, Any], rows: int, stored: Shapes) -> list[int]:
    """Widths with which so many rows are stored in these shapes, ascending."""
    words, group, bits = (stored["weight"][1] or (0,))[-1], spec.get("group_size"), spec.get("bits", 1)
    low, high = WORD * (words - 1), WORD * words
    if spec["format"] == "integer" and group:  # rounding up took less than two words
        low, high = (WORD * n * group // (16 + group * bits) - 1 for n in (words - 2, words + 1))
    elif spec["format"] == "integer":
        low, high = (WORD * n // bits for n in (words - 2, words - 1))
    near = range(max(low, 0) + 1, high + 1)
    return [width for width in near if width % (group or 1) == 0 and _layout(spec, rows, width) == stored]


def _module(name: str, stem: str, spec: dict[str, Any], entries: dict[str, Entry]) -> Module:
    """Where a module is stored, after comparing what is there with what its format needs."""
    stacked = stem in entries
    names = {leaf: stem if stacked and leaf == "weight" else f"{stem}.{leaf}" for leaf in LEAVES}
    names = {leaf: stored for leaf, stored in names.items() if stored in entries}
    if "weight" not in names:
        raise ReaderError(f"no file holds the weight of {name!r}; if transformers renames this family, give `rename`")
    found = {leaf: (entries[stored].dtype, entries[stored].shape) for leaf, stored in names.items()}
    stack = found["weight"][1][:stacked]
    if all(shape[:stacked] == stack for _, shape in found.values()) and len(stack) == stacked and 0 not in stack:
        single = {leaf: (dtype, shape[stacked:]) for leaf, (dtype, shape) in found.items()}
        rows = (single.get("weight_scale", single["weight"])[1] or (0,))[0]
        if rows and (widths := _widths(spec, rows, single)):
            return Module(spec, names, stack[0] if stacked else None, rows, widths)
    raise ReaderError(f"the tensors of {name!r} do not fit {brief(spec)}, for they are {found}")


def _specs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> `format` and all its options, of the object in config.json."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "qep":
        raise ReaderError("config.json has no quantization_config of method 'qep'; this is no packed checkpoint")
    version, groups = found.get("format_version"), found.get("layers")
    if not _are_sizes([version]) or not 1 <= version <= FORMAT_VERSION:
        raise ReaderError(f"the format version is {brief(version)}, and this reader knows 1 to {FORMAT_VERSION}")
    specs: dict[str, dict[str, Any]] = {}
    for group in groups if isinstance(groups, list) else [groups]:
        names = group.get("modules") if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ReaderError(f"an entry of `layers` in config.json names no modules: {brief(group)}")
        spec = _spec({key: value for key, value in group.items() if key != "modules"})
        if len(specs) + len(names) != len(specs := specs | dict.fromkeys(names, spec)):
            raise ReaderError(f"config.json lists one of these modules twice: {brief(names)}")
    return specs


def _spec(given: dict[str, Any]) -> dict[str, Any]:
    known = OPTIONS.get(given["format"]) if isinstance(given.get("format"), str) else None
    if known is None:
        raise ReaderError(f"config.json names the format {brief(given.get('format'))}; known are {[*OPTIONS]}")
    spec = {**known, **given}
    group = 1 if spec.get("group_size") is None else spec["group_size"]
    whole = [group, spec.get("rank", 8), spec.get("bits", 4)]
    switches = all(isinstance(spec.get(name, False), bool) for name in ("flat", "column_scale"))
    fits = _are_sizes(whole) and all(whole) and whole[2] in (4, 8) and switches
    if spec.keys() != {*known, "format"} or not fits or (spec.get("flat") and spec["rank"] % 8):
        raise ReaderError(f"config.json has options that do not fit their format: {brief(given)}")
    return spec


def _entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder, in one file or in shards."""
    if (folder / "model.safetensors").exists():
        return _header(folder / "model.safetensors")
    index = "model.safetensors.index.json"
    shard_of = _object((folder / index).read_bytes(), index).get("weight_map")
    files = [*shard_of.values()] if isinstance(shard_of, dict) else [None]
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise ReaderError(f"{index!r} names the file {brief(file)}, which is no plain name of a safetensors file")
    shards = {file: _header(folder / file) for file in sorted(set(files))}
    if missing := [name for name, file in shard_of.items() if name not in shards[file]]:
        raise ReaderError(f"{index!r} places {missing[0]!r} in {shard_of[missing[0]]!r}, which does not hold it")
    return {name: shards[file][name] for name, file in shard_of.items()}


def _header(path: Path) -> dict[str, Entry]:
    """Tensors of one safetensors file, which must be exactly what its header says."""
    with path.open("rb") as file:
        size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ReaderError(f"{path.name!r} has {size} bytes and claims a header of {length}; it is truncated")
        header = _object(file.read(length), path.name)
    header.pop("__metadata__", None)
    entries = {name: _entry(path.name, name, value, 8 + length) for name, value in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][3:]):
        if entry.start != at or entry.end > size:
            where = f"{name!r} lies at {entry.start}:{entry.end}, not from {at} on within {size}"
            raise ReaderError(f"{path.name!r} has tensors that overlap or leave holes, or is truncated: {where}")
        at = entry.end
    if at != size:
        raise ReaderError(f"{path.name!r} has {size - at} bytes that belong to no tensor")
    return entries


def _entry(file: str, name: str, value: Any, base: int) -> Entry:
    """A tensor whose dtype, shape and offsets are possible and agree."""
    dtype, shape, offsets = map((value if isinstance(value, dict) else {}).get, ("dtype", "shape", "data_offsets"))
    if isinstance(dtype, str) and dtype in DTYPES and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
        small = len(shape) <= MAX_DIMENSIONS and math.prod(size or 1 for size in shape) <= MAX_ELEMENTS
        if small and offsets[1] - offsets[0] == math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            return Entry(file, dtype, tuple(shape), base + offsets[0], base + offsets[1])
    raise ReaderError(f"{file!r} describes the tensor {brief(name)} as {brief(value)}, which cannot be")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _object(text: bytes, file: str) -> dict[str, Any]:
    """A json object without a key twice, of which two readers might take different ones."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError(f"a key stands twice near {brief(pairs[0][0])}")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ReaderError(f"{file!r} is no json to be relied on: {error}") from error
    if isinstance(value, dict):
        return value
    raise ReaderError(f"{file!r} holds a json {type(value).__name__}, not an object")
