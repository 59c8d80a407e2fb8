"""The weight files of a float model: where they are, what they are, and when they are needed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import TensorEntry, inside, read_header
from hf_qep.engine.tensor_files import TensorFile
from hf_qep.files import sha256
from hf_qep.progress import SILENT, Progress


class Shards:
    """Weight files that lie in a folder, all of them, and stay there. `engine.remote.shards` has those of the Hub.

    Blocks have numbers here, in the order in which they run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def names(self) -> list[str]:
        """Of the files, sorted."""
        return sorted(path.name for path in self.folder.glob("*.safetensors"))

    def entries(self, name: str) -> dict[str, TensorEntry]:
        """Tensors of a file by its header. Raises CheckpointError."""
        return read_header(inside(self.folder, name))

    def open(self, path: str | Path) -> TensorFile:
        """A file of the folder, to be read tensor by tensor. Raises CheckpointError."""
        return TensorFile(path)

    def prepare(self, config: Any) -> None:
        """Have what transformers reads of the files besides their tensors. config: of the model."""

    def expect(self, wanted: Sequence[Iterable[str]]) -> None:
        """Say which files each block needs."""

    def begin(self, done: int, written: int = 0) -> None:
        """The walk over the blocks begins behind the first `done`. written: bytes that it will write to the same disk.

        Raises DiskSpaceError if it cannot end.
        """

    def run(self, block: int) -> None:
        """A block runs now; its files are here."""

    def durable(self, done: int) -> None:
        """Of the first `done` blocks nothing will be read any more, whatever happens to this process."""

    def keep_account(self) -> None:
        """The folder of the unfinished job exists."""

    def close(self) -> None:
        """The job has ended, or failed: nothing more is begun."""

    def digests(self, progress: Progress = SILENT) -> dict[str, str]:
        """Name of a file -> what tells its content from any other, see `digests_of`."""
        return digests_of([self.folder / name for name in self.names], progress)


def digests_of(paths: Sequence[Path], progress: Progress = SILENT) -> dict[str, str]:
    """Name of a file -> sha256. Files of the Hub cache are links to files with a name that follows from their content;
    that name is taken, and the file is not read."""
    found = {path.name: named for path in paths if (named := blob_name(path))}
    unnamed = [path for path in paths if path.name not in found]
    with progress.bar("hashing", total=sum(path.stat().st_size for path in unnamed), unit="B") as bar:
        for path in unnamed:
            found[path.name] = sha256(path, seen=_shown(bar.advance, path.name))
    return dict(sorted(found.items()))


def _shown(advance: Callable[[int, str], None], name: str) -> Callable[[int], None]:
    return lambda count: advance(count, name)


def blob_name(path: Path) -> str | None:
    """sha256, or git's digest of a small file, by which the Hub cache names the content of `path`; None elsewhere."""
    if not path.is_symlink():
        return None
    target = Path(os.readlink(path))
    return (
        target.name
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name)
        else None
    )
