"""Files of one commit of a Hub model: what the Hub says of them, their headers, and bringing them into the cache.

The client retries what it can and resumes a transfer that breaks off; `patiently` does so for whole files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, scan_cache_dir, snapshot_download
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from tqdm import tqdm

from hf_qep.engine.headers import TensorEntry, parse_header
from hf_qep.engine.remote.errors import AGAIN, explained, may_pass
from hf_qep.engine.source import DOWNLOADED, NOT_DOWNLOADED
from hf_qep.errors import QepError

T = TypeVar("T")
SAFETENSORS = "*.safetensors"
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before the second, third and fourth try of a file; each try has those of the client in it."""
FIRST_BYTES = 100_000
"""Of a file; nearly every header is shorter."""


@dataclass(frozen=True)
class Stored:
    """A file as the Hub has it. size: bytes. sha256: None for one that git holds. blob: its name in the cache."""

    size: int
    sha256: str | None
    blob: str


class Damaged(Exception):
    """A file that arrived is not the one that the Hub has."""


class Counted(tqdm):
    """A bar that shows nothing and reports how many bytes of a file have come, through the `report` of a subclass."""

    report: Callable[[int], None]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})

    def update(self, n: float | None = 1) -> None:
        """`n` more bytes."""
        self.n += n or 0
        type(self).report(int(self.n))


def pinned(repo: str, revision: str | None) -> Path:
    """The cache folder of the commit that `revision` is now, with everything but the weights.

    Raises CheckpointError if it cannot be had.
    """
    patterns = [pattern for pattern in DOWNLOADED if pattern != SAFETENSORS]
    wanted = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": NOT_DOWNLOADED}
    return Path(patiently(lambda: snapshot_download(repo, **wanted), "the configuration", repo, revision))


def stored_files(repo: str, commit: str) -> dict[str, Stored]:
    """All files of a commit by name. Raises CheckpointError if the Hub does not say."""

    def ask() -> Any:
        return HfApi().model_info(repo, revision=commit, files_metadata=True)

    info = patiently(ask, "the list of files", repo, commit)
    return {
        file.rfilename: Stored(file.size or 0, file.lfs.sha256 if file.lfs else None, _blob(file))
        for file in info.siblings or ()
    }


def _blob(file: Any) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id or ""


def read_remote_header(repo: str, commit: str, name: str, size: int) -> dict[str, TensorEntry]:
    """Tensors of a safetensors file of `size` bytes on the Hub, of which its first bytes are read.

    Raises CheckpointError if it cannot be had, or is not what a file of this size must be.
    """

    def get(start: int, end: int) -> bytes:
        return patiently(partial(_read_range, repo, commit, name, start, end), f"the header of {name!r}", repo, commit)

    first, at = get(0, min(FIRST_BYTES, size)), 0

    def read(count: int) -> bytes:
        nonlocal at
        start, at = at, min(at + count, size)
        held = first[start:at]
        return held if start + len(held) == at else held + get(start + len(held), at)

    return parse_header(name, size, read)


def _read_range(repo: str, commit: str, name: str, start: int, end: int) -> bytes:
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    with http_stream_backoff("GET", hf_hub_url(repo, name, revision=commit), headers=headers) as response:
        hf_raise_for_status(response)
        before = start if response.status_code == 200 else 0  # the whole file, from a server that knows no ranges
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= before + end - start:
                break
    if len(found) < before + end - start:
        raise Damaged(f"{len(found)} bytes came instead of {before + end - start}")
    return bytes(found[before : before + end - start])


def download(repo: str, commit: str, name: str, report: Callable[[int], None]) -> Path:
    """Bring a file into the cache. report: gets the bytes that have come; what it raises ends the download."""
    counted = type("Counted", (Counted,), {"report": staticmethod(report)})
    return Path(hf_hub_download(repo, name, revision=commit, tqdm_class=counted))


def patiently(
    attempt: Callable[[], T], what: str, repo: str, revision: str | None, stopped: Callable[[], bool] = lambda: False
) -> T:
    """Do something again, after a pause, as long as that may help. what: it is about. stopped: whether to give up.

    Raises what `explained` makes of the last error.
    """
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except QepError:
            raise
        except Exception as error:  # the Hub client raises many kinds
            if pause is None or stopped() or not may_pass(error):
                raise explained(error, what, repo, revision, AGAIN) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def remove_cached(folder: Path, name: str) -> bool:
    """Remove a file of a cache folder, and its content if no other revision has it as well; whether it is gone."""
    try:
        cache = scan_cache_dir(folder.parents[2])
        revisions = [
            revision for repo in cache.repos for revision in repo.revisions if revision.snapshot_path == folder
        ]
        files = [file for revision in revisions for file in revision.files if file.file_path == folder / name]
        cache.delete_files(*files).execute()
    except OSError:  # somebody else is at work in the cache; it is tried again behind the next block
        return False
    return not (folder / name).exists()
