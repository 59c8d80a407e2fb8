"""Weight files of one commit of a Hub model in the Hub cache: bringing them there, comparing, and removing them again.

A file is brought by a thread of its own, so that a block can be at work meanwhile. Only files that a job brought there
itself are ever removed; its account of them lies in the folder of the unfinished job.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import cached_property, partial
from pathlib import Path

from hf_qep.engine.headers import read_json
from hf_qep.engine.remote import files as hub_files
from hf_qep.engine.remote.errors import AGAIN
from hf_qep.engine.source import snapshot_revision
from hf_qep.errors import CheckpointError, DiskSpaceError
from hf_qep.files import sha256, write_text_aside
from hf_qep.progress import Progress

LOOK_SECONDS = 0.2
"""Between two looks at a download that a block waits for."""
ABANDONED_SECONDS = 600
"""Since the last byte of a download of this job that ended with its process."""


class Account:
    """Files that a job brought into the cache: those that are whole and as the Hub has them, and those that may not be.

    path: of the file that keeps it, once its folder exists; None for nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._whole, self.closed = path, {}, False
        if path is not None and path.is_file():
            self._whole = {name: whole is True for name, whole in read_json(path).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._whole))

    def doubtful(self, name: str) -> bool:
        """Whether its download was begun, and nobody saw it end well."""
        return self._whole.get(name) is False

    def note(self, name: str, whole: bool) -> None:
        """A file is about to come, or has come and was compared."""
        self._whole[name] = whole
        self.save()

    def strike(self, name: str) -> None:
        """A file was removed."""
        self._whole.pop(name, None)
        self.save()

    def save(self) -> None:
        """Write it where it belongs."""
        if self._path is not None and self._path.parent.is_dir() and not self.closed:
            write_text_aside(self._path, json.dumps(self._whole, indent=2, sort_keys=True) + "\n")


class HubCache:
    """Files of the commit whose cache folder is `folder`.

    account: of those that are brought. progress: shows what is waited for. room_advice: words on how to need less room.
    """

    def __init__(self, repo: str, folder: Path, account: Account, progress: Progress, room_advice: str) -> None:
        self.repo, self.folder, self.commit = repo, folder, snapshot_revision(folder) or "main"
        self._account, self._progress, self._advice = account, progress, room_advice
        self._lock = threading.RLock()
        self._running: dict[str, Future[None]] = {}
        self._arrived: dict[str, int] = {}
        self.when_idle: Callable[[], None] = lambda: None
        """Called when a file has come and no other one is on its way."""

    @cached_property
    def stored(self) -> dict[str, hub_files.Stored]:
        """All files of the commit, as the Hub says. Raises CheckpointError if it does not."""
        return hub_files.stored_files(self.repo, self.commit)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CheckpointError if the Hub has none of this name."""
        if name not in self.stored:
            raise CheckpointError(
                f"{self.repo!r} has no {name!r} at {self.commit[:12]}, though its index names it; choose another "
                "revision"
            )
        return self.stored[name].size

    def sound(self, name: str) -> bool:
        """Whether a file is there, whole."""
        return (self.folder / name).exists() and not self._account.doubtful(name) and name not in self._running

    def fetch(self, name: str) -> None:
        """Have a file in the cache, whole. Raises CheckpointError, DiskSpaceError."""
        with self._lock:
            if self.sound(name):
                return
            size, future = self.size(name), self._running.get(name) or self._start(name)
        with self._progress.bar(f"waiting for {name}", total=size, unit="B") as bar:
            shown = 0
            while not wait([future], timeout=LOOK_SECONDS).done:
                bar.advance((seen := self._arrived.get(name, 0)) - shown)
                shown = seen
            future.result()
            bar.advance(size - shown)

    def fetch_behind(self, names: Iterator[str]) -> None:
        """Begin to bring the first of the names that is not there, if nothing else is on its way and it finds room."""
        with self._lock:
            if self._account.closed or self._running:
                return
            missing = next((name for name in names if not self.sound(name)), None)
            if missing is not None and self.free >= self.size(missing):
                self._start(missing)

    def confirm(self, name: str) -> None:
        """A file is another one than it was. Raises CheckpointError unless its content is the same."""
        try:
            self._compare(name)
        except hub_files.Damaged as error:
            raise CheckpointError(
                f"{name!r} in the Hub cache has changed and is damaged ({error}); remove it with `hf cache rm`, {AGAIN}"
            ) from error

    def remove_own(self, kept: frozenset[str]) -> None:
        """Remove what this job brought, but for the files in `kept` and those that are on their way."""
        with self._lock:
            for name in [name for name in self._account if name not in kept and name not in self._running]:
                if not (self.folder / name).exists() or hub_files.remove_cached(self.folder, name):
                    self._account.strike(name)

    def keep_account(self) -> None:
        """Write down what was brought."""
        with self._lock:
            self._account.save()

    def close(self) -> None:
        """Begin nothing more, and end what is on its way."""
        with self._lock:
            self._account.closed = True

    @property
    def free(self) -> int:
        """Bytes on the disk."""
        return shutil.disk_usage(self.folder).free

    def check_free(self, what: str, size: int) -> None:
        """Raise DiskSpaceError if so many bytes, which are for `what`, find no room."""
        if (free := self.free) < size:
            raise DiskSpaceError(
                f"{what} {size / 1e9:.2f} GB on the disk of the Hub cache, and {free / 1e9:.2f} GB are free; free some"
                f"{self._advice}, or let HF_HOME name a folder on another disk, {AGAIN}"
            )

    def _start(self, name: str) -> Future[None]:
        future: Future[None] = Future()
        self._running[name] = future
        threading.Thread(target=self._work, args=(name, future), name=f"download {name}", daemon=True).start()
        return future

    def _work(self, name: str, future: Future[None]) -> None:
        error: BaseException | None = None
        try:
            bring, stopped = partial(self._bring, name), lambda: self._account.closed
            hub_files.patiently(bring, repr(name), self.repo, self.commit, stopped)
        except BaseException as caught:
            error = caught
        with self._lock:
            del self._running[name]
        if error is not None:
            future.set_exception(error)
            return
        future.set_result(None)
        self.when_idle()

    def _bring(self, name: str) -> None:
        size = self.size(name)
        with self._lock:
            self._account.note(name, whole=False)
        self._sweep(name)
        if not (self.folder / name).exists():
            self.check_free(f"{name!r} needs", size)
        hub_files.download(self.repo, self.commit, name, partial(self._report, name))
        try:
            self._compare(name)
        except hub_files.Damaged:
            hub_files.remove_cached(self.folder, name)
            raise
        with self._lock:
            self._account.note(name, whole=True)

    def _report(self, name: str, arrived: int) -> None:
        self._arrived[name] = max(arrived, self._arrived.get(name, 0))  # xet counts in two places
        if self._account.closed:
            raise CheckpointError(f"the download of {name!r} was given up with its job")

    def _compare(self, name: str) -> None:
        """Raise Damaged if a file in the cache is not the one that the Hub has."""
        path, stored = self.folder / name, self.stored[name]
        if path.stat().st_size != stored.size:
            raise hub_files.Damaged(f"{path.stat().st_size} bytes instead of {stored.size}")
        if stored.sha256 is not None and sha256(path) != stored.sha256:
            raise hub_files.Damaged(f"its sha256 is not {stored.sha256[:12]}...")

    def _sweep(self, name: str) -> None:
        """Remove what a download left that ended with its process; the client never goes on with it."""
        blobs, stored = self.folder.parents[1] / "blobs", self.stored[name]
        for path in blobs.glob(f"{stored.blob}*.incomplete"):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
