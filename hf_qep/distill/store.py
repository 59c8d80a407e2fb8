"""What a teacher said, on disk: asked once, read by every student, whichever loss it is trained with.

A folder of safetensors shards, some rows each, and an index.json that says of which teacher, rows and settings they
are. A shard is there whole or not at all, so that a build that was stopped goes on where it was, and several processes
may build different shards of one folder. Log-probabilities are float16 (relative 2^-11; the likeliest class stays the
likeliest); beyond the k that are kept, the others are one class.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_qep.distill.said import Said, take_said
from hf_qep.distill.samples import CAUSAL_LM, TaskData
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import canonical_json, write_text_aside
from hf_qep.progress import SILENT, Progress

INDEX, VERSION = "index.json", 1
PARTS = {"teacher": "teacher", "data": "rows", "settings": "settings"}
_PASSING = ("_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype")
"""Keys of a configuration that change nothing about what a model says, or that its tensors show."""


@dataclass(frozen=True)
class TeacherStore:
    """A folder of what a teacher said. index: content of index.json."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: Any,
        data: TaskData,
        *,
        k: int = 64,
        batch_size: int = 32,
        rows_per_shard: int = 1024,
        keep_ids: Tensor | None = None,
        hidden: bool = False,
        shards: Iterable[int] | None = None,
        progress: Progress = SILENT,
    ) -> TeacherStore:
        """Ask a teacher about all rows and write down what it says; what is there already is not asked again.

        k: classes kept per answer of a language model without `data.answers`, of which the label is always one; of
        others all are. keep_ids: tokens of the teacher, (student's vocabulary,) int64 in the order of the student's
        ids, where the student has only some; the rows then hold the student's ids. hidden: also keep the last hidden
        state. shards: numbers of those to build here, None for all. Raises ConfigError if the folder holds answers of
        another teacher, to other rows or with other settings.
        """
        folder = Path(folder)
        kept = None if keep_ids is None else digest([("keep_ids", keep_ids)])
        few = data.task != CAUSAL_LM or data.answers is not None
        settings = {"k": None if few else k, "keep_ids": kept, "hidden": hidden, "rows_per_shard": rows_per_shard}
        index = {
            "version": VERSION,
            "teacher": teacher_fingerprint(teacher),
            "data": data.fingerprint(),
            "settings": settings,
            "rows": len(data),
        }
        if (folder / INDEX).exists():
            _check_same(cls.open(folder).index, index)
        else:
            write_text_aside(folder / INDEX, json.dumps(index, indent=2) + "\n")
        store = cls(folder, index)
        wanted = range(store.count) if shards is None else shards
        missing = [n for n in wanted if not store.path(n).exists()]
        with progress.bar("asking the teacher", len(missing), "shard") as bar:
            for number in missing:
                part = data.rows(slice(number * rows_per_shard, (number + 1) * rows_per_shard))
                options = {"k": settings["k"], "keep_ids": keep_ids, "hidden": hidden}
                said = take_said(teacher, part, batch_size=batch_size, **options)
                store._write(number, said)
                bar.advance()
        return store

    @classmethod
    def open(cls, folder: str | Path, *, teacher: Any = None, data: TaskData | None = None) -> TeacherStore:
        """A folder that was built. teacher, data: what it has to belong to, where given.

        Raises CheckpointError if there is no index that can be read, ConfigError if it belongs to something else.
        """
        path = Path(folder) / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            version, _ = index["version"], [index[key] for key in (*PARTS, "rows")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{str(path)!r} is missing or no index of a teacher's answers; build it") from error
        if version != VERSION:
            raise CheckpointError(
                f"{str(path)!r} has version {version}, and this hf_qep reads {VERSION}; build it again"
            )
        store = cls(Path(folder), index)
        store.check(teacher=teacher, data=data)
        return store

    def check(self, *, teacher: Any = None, data: TaskData | None = None) -> None:
        """Raise ConfigError unless it belongs to this teacher and these rows, where given."""
        wanted = dict(self.index)
        if teacher is not None:
            wanted["teacher"] = teacher_fingerprint(teacher)
        if data is not None:
            wanted["data"] = data.fingerprint()
        _check_same(self.index, wanted)

    @property
    def count(self) -> int:
        """Shards of the whole."""
        return -(-self.index["rows"] // self.index["settings"]["rows_per_shard"])

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"said-{number:05d}.safetensors"

    @cached_property
    def said(self) -> Said:
        """All that was said, read into memory. Raises CheckpointError for a shard that is missing or damaged."""
        return Said.joined([self._read(number) for number in range(self.count)])

    def _write(self, number: int, said: Said) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in said.tensors().items()}
        marks = {"index": self._mark(), "digest": digest(sorted(tensors.items()))}
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".said-") as aside:
            new = Path(aside) / self.path(number).name
            save_file(tensors, new, metadata=marks)
            with new.open("rb") as f:
                os.fsync(f.fileno())
            os.replace(new, self.path(number))

    def _read(self, number: int) -> Said:
        path = self.path(number)
        if not path.exists():
            raise CheckpointError(f"{str(path)!r} is missing, one of {self.count} shards; build the store to its end")
        try:
            with safe_open(path, "pt") as f:
                marks, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} is truncated or damaged; delete it and build again") from error
        if marks.get("index") != self._mark():
            raise CheckpointError(f"{str(path)!r} belongs to another {INDEX}; delete it and build again")
        if marks.get("digest") != digest(sorted(tensors.items())):
            raise CheckpointError(f"{str(path)!r} is damaged: its tensors changed; delete it and build again")
        return Said(**tensors)

    def _mark(self) -> str:
        return hashlib.sha256(canonical_json(self.index).encode()).hexdigest()


def teacher_fingerprint(model: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all tensors of a model, and its configuration."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PASSING}
    text = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return hashlib.sha256(f"{text} {digest(sorted(model.state_dict().items()))}".encode()).hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError that says what differs between the index of a folder and the one that is needed."""
    for key, word in PARTS.items():
        if found[key] == wanted[key]:
            continue
        detail = ""
        if key == "settings":
            names = sorted(n for n in wanted[key] if found[key].get(n) != wanted[key][n])
            detail = ": " + ", ".join(f"{n} is {found[key].get(n)}, not {wanted[key][n]}" for n in names)
        raise ConfigError(f"the stored answers belong to another {word}{detail}; choose another folder or build again")
