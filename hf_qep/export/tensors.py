"""The tensors of a GGUF file, planned from the files of a checkpoint; each is made when it is read, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_qep.architectures.feeds import FACTOR, FEEDS
from hf_qep.errors import CheckpointError, ExportError
from hf_qep.export.blocks import block_type, interleaved, to_blocks
from hf_qep.export.families import Family, columns_of, rope_factors, turned_heads
from hf_qep.export.folding import Folds, Scales, fold
from hf_qep.extras import require
from hf_qep.reader import Checkpoint, Matrix, ReaderError

Array = np.ndarray
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
"""dtype of safetensors -> type of ggml."""
_HEAD = "lm_head"


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to write.

    name: in the file. module: in the checkpoint. kind: type of ggml. shape: (rows, columns) or (columns,). read: makes
    what is written, uint8 (rows, bytes of a row) for blocks, else an array of that shape; bfloat16 as uint16.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def weights(self) -> int:
        """Numbers that it stands for."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Size of its data in the file."""
        gguf = require("gguf", "gguf")
        columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return self.weights // columns * size


def open_checkpoint(folder: Path) -> Checkpoint:
    """The files of a folder. Raises CheckpointError."""
    try:
        return Checkpoint(folder)
    except ReaderError as error:
        raise CheckpointError(f"{folder.name!r} cannot be exported: {error}") from error


class Source:
    """A checkpoint, its configuration and what became of its column scales.

    Raises ExportError for formats that llama.cpp does not have, CheckpointError for files that contradict the
    configuration.
    """

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any], family: Family) -> None:
        self.checkpoint, self.config, self.family = checkpoint, config, family
        for name, module in checkpoint.modules.items():
            _check_format(name, module.spec["format"], module.experts)
        self.kinds = {name: block_type(self.matrix(name), name) for name in checkpoint.modules}
        self.folds = self._fold()

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.get("tie_word_embeddings", self.family.head_is_embedding)

    def matrix(self, module: str) -> Matrix:
        """The packed matrix of a module, as it is stored."""
        try:
            (found,) = self.checkpoint.matrices(module, columns=columns_of(self.config, module))
        except ReaderError as error:
            raise CheckpointError(str(error)) from error
        return found

    def _fold(self) -> Folds:
        scales = {}
        for name in self.checkpoint.modules:
            matrix = self.matrix(name)
            scales[name] = Scales(matrix.scale, matrix.column_scale)
        layers = [f"model.layers.{n}." for n in range(self.config["num_hidden_layers"])]
        own = FEEDS[self.config["model_type"]]
        feeds = {at + norm: [at + name for name in names] for at in layers for norm, names in own.items()}
        return fold(scales, feeds, [(at + FACTOR[0], at + FACTOR[1]) for at in layers])

    def order(self, module: str) -> Any:
        """Which row of the checkpoint is the next one in the file."""
        heads = turned_heads(self.config, self.family, module)
        if heads is None:
            return slice(None)
        rows = self.checkpoint.modules[module].rows if module in self.checkpoint.modules else None
        rows = rows or self.checkpoint.entries[f"{module}.weight"].shape[0]
        return interleaved(rows, heads)

    def blocks(self, module: str) -> Array:
        """uint8 (rows, bytes of a row): a packed module as it is written."""
        matrix = self.matrix(module)
        matrix = matrix._replace(scale=self.folds.rows.get(module, matrix.scale))
        return to_blocks(matrix, self.kinds[module])[self.order(module)]

    def floats(self, module: str, leaf: str) -> Array:
        """A float tensor as it is written: vectors are widened to float32, as llama.cpp wants them."""
        stored = self.checkpoint.entries[f"{module}.{leaf}"]
        value = self.checkpoint.tensor(f"{module}.{leaf}", widen=len(stored.shape) == 1)
        value = value[self.order(module)]
        if value.ndim > 1:
            return value
        moved = self.folds.norms if leaf == "weight" else self.folds.taken
        return value.astype(np.float32) * moved[module] if module in moved else value.astype(np.float32)


def _check_format(name: str, form: str, experts: int | None) -> None:
    if form == "factored":
        raise ExportError(
            f"`{name}` is a product of two sign matrices (format `factored`), which llama.cpp does not have; quantise "
            'with method="sign", export="gguf" for llama.cpp, or serve this checkpoint with transformers or vLLM'
        )
    if experts is not None:
        raise ExportError(f"`{name}` is a stack of {experts} experts, which cannot be exported to GGUF yet")


def plan_tensors(source: Source) -> list[Planned]:
    """Every tensor of the file, in the order of the checkpoint's layers.

    Raises ExportError for tensors that llama.cpp has no name for.
    """
    names = _Names(source.config, source.family)
    found = [*_packed(source, names), *_floats(source, names)]
    if (factors := rope_factors(source.config)) is not None:
        found.append(Planned("rope_freqs.weight", "rope_parameters", "F32", factors.shape, lambda: factors))
    needed = {"token_embd.weight", "output_norm.weight"} | (set() if source.tied else {"output.weight"})
    if missing := needed - {t.name for t in found}:
        raise CheckpointError(f"the checkpoint holds no tensor for {sorted(missing)}; it is not a whole language model")
    return sorted(found, key=lambda t: _position(t.name))


def _packed(source: Source, names: _Names) -> Iterator[Planned]:
    for module, entry in source.checkpoint.modules.items():
        shape = (entry.rows, source.matrix(module).columns)
        read = partial(source.blocks, module)
        yield Planned(names.of(module, "weight"), module, source.kinds[module], shape, read)


def _floats(source: Source, names: _Names) -> Iterator[Planned]:
    entries = source.checkpoint.entries
    packed = {stored for module in source.checkpoint.modules.values() for stored in module.tensors.values()}
    for stored, entry in entries.items():
        module, _, leaf = stored.rpartition(".")
        if stored in packed or (source.tied and module == _HEAD) or 0 in entry.shape:
            continue
        if entry.dtype not in FLOATS or len(entry.shape) not in (1, 2):
            raise ExportError(f"`{stored}` is {entry.dtype} of shape {entry.shape}; llama.cpp has no place for it")
        kind = "F32" if len(entry.shape) == 1 else FLOATS[entry.dtype]
        yield Planned(names.of(module, leaf), module, kind, entry.shape, partial(source.floats, module, leaf))


class _Names:
    """Names of llama.cpp, by the official table."""

    def __init__(self, config: dict[str, Any], family: Family) -> None:
        gguf = require("gguf", "gguf")
        self._family = family
        self._table = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH[family.architecture.upper()], config["num_hidden_layers"]
        )

    def of(self, module: str, leaf: str) -> str:
        """Name of a tensor. Raises ExportError if there is none."""
        found = self._table.get_name(module)
        if found is None or leaf not in ("weight", "bias"):
            raise ExportError(
                f"llama.cpp has no place for `{module}.{leaf}` in the architecture {self._family.architecture!r}"
            )
        return f"{found}.{leaf}"


def _position(name: str) -> tuple[int, int, str]:
    """Embedding first, then block by block, the head last."""
    parts = name.split(".")
    if parts[0] == "blk":
        return (1, int(parts[1]), "")
    return (0 if parts[0] == "token_embd" else 2, 0, name)
