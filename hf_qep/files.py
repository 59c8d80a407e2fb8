"""Files that are never half there: write aside, flush, rename once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_qep.errors import CheckpointError, ConfigError, OutputExistsError

_PIECE = 1 << 22
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", re.IGNORECASE)


def sha256(path: Path, seen: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file. seen: gets the number of bytes of each piece that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(_PIECE):
            digest.update(piece)
            if seen is not None:
                seen(len(piece))
    return digest.hexdigest()


def parse_size(size: str | int, *, zero: bool = False) -> int:
    """Bytes of a size such as "14GB" (10^9), "900MB", "14GiB" (2^30) or a number of bytes. zero: "0B" is one as well.

    Raises ConfigError.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None or not (zero or float(found[1])):
        raise ConfigError(f'a size must be a number of bytes or like "14GB", "900MB" or "14GiB", not {size!r}')
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def listed_models(text: str) -> list[tuple[str, str | None]]:
    """(name, revision) of each in a list such as `acme/deals@0123abc, folder`; a revision is None if none is given."""
    found = []
    for entry in filter(None, map(str.strip, text.split(","))):
        name, _, revision = (entry, "", "") if Path(entry).is_dir() else entry.partition("@")
        found.append((name, revision or None))
    return found


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or what a user may take of it, is full; safetensors has errors of its own."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def safe_join(root: Path, name: str) -> Path:
    """`root / name`, or CheckpointError if the result would lie outside `root`."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise CheckpointError(f"file name {name!r} points outside the folder {root.name!r}; the checkpoint is not safe")
    return path


def bundled(name: str) -> Path:
    """Folder of data that comes with the package: "model_cards" or "spaces"; in a checkout it lies beside the package.

    Raises CheckpointError if the installation lacks it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "bundled" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"this installation of hf_qep has no folder {name!r}; install the package again")


@contextmanager
def write_aside(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of the folder `final`, renamed to it when the body ends without an error.

    Raises OutputExistsError if `final` exists, is not empty and `overwrite` is false. On an error, and on
    KeyboardInterrupt, the temporary folder is removed and `final` is as it was before.
    """
    check_output(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        yield aside
        for path in aside.rglob("*"):
            flush(path)
        os.chmod(aside, 0o755)
        _swap(aside, final)
        flush(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _swap(aside: Path, final: Path) -> None:
    """Put `aside` in the place of `final`. An old folder is moved away whole before it is deleted, so that a kill never
    leaves half of it under its name."""
    old = aside.with_name(f"{aside.name.removesuffix('.partial')}.old.partial")
    if final.is_dir():
        os.replace(final, old)
    try:
        os.replace(aside, final)
    except BaseException:
        if old.is_dir():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def write_file_aside(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`write_aside` for a single file.

    Raises OutputExistsError if `final` is a folder, or exists and `overwrite` is false.
    """
    if final.is_dir() or (final.exists() and not overwrite):
        what = (
            "is a folder; give the name of a file" if final.is_dir() else "exists; choose another or pass --overwrite"
        )
        raise OutputExistsError(f"{str(final)!r} {what}")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", suffix=".partial", dir=final.parent) as folder:
        aside = Path(folder) / final.name
        yield aside
        flush(aside)
        os.replace(aside, final)
        flush(final.parent)


def write_text_aside(path: Path, text: str) -> None:
    """Replace one file in a single step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def check_output(final: Path, *, overwrite: bool = False) -> None:
    """Raise OutputExistsError unless `final` can become an output folder."""
    if final.exists() and not final.is_dir():
        raise OutputExistsError(f"{str(final)!r} is a file; give the name of a new folder")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise OutputExistsError(f"the folder {str(final)!r} is not empty; choose another one or pass --overwrite")


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
