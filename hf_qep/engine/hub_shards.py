"""Weight files of a Hub model that come when a block needs them, and may go when no later one does.

They are brought into the Hub cache by the client of the Hub, each for the block that runs and the next ones behind its
back, all of one commit, and compared with the size and sha256 that the Hub has of them. Only files that a job brought
there itself are ever removed from there; its account of them lies in the folder of the unfinished job.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hf_qep.engine import hub_files
from hf_qep.engine.headers import SINGLE_FILE, TensorEntry, inside, read_header, read_json, read_weight_map
from hf_qep.engine.hub_errors import AGAIN
from hf_qep.engine.shards import Shards, digests_of
from hf_qep.engine.source import hub_name, snapshot_revision
from hf_qep.engine.tensor_files import TensorFile
from hf_qep.errors import CheckpointError, ConfigError, DiskSpaceError, QepError
from hf_qep.files import sha256, write_text_aside
from hf_qep.progress import SILENT, Progress

AHEAD = 2
"""Files that are brought before the block that needs them runs; one at a time."""
CONNECTIONS = 8
"""For headers."""
LOOK_SECONDS = 0.2
"""Between two looks at a download that a block waits for."""
ABANDONED_SECONDS = 600
"""Since the last byte of a download of this job that ended with its process."""


def open_shards(
    model: str | Path,
    revision: str | None = None,
    *,
    drop: bool = False,
    account: Path | None = None,
    progress: Progress = SILENT,
) -> Shards:
    """Weight files of a folder, or of a Hub id at the commit that `revision` is now; of these none is downloaded yet.

    drop: remove those that were downloaded once no later block needs them. account: file for the names of these.
    Raises CheckpointError if there is no such model, ConfigError for `drop` and a folder.
    """
    name = hub_name(model)
    if name is not None:
        return HubShards(name, hub_files.pinned(name, revision), drop=drop, account=account, progress=progress)
    if drop:
        raise ConfigError(
            f"--drop-shards removes files that a job downloads from the Hub, and {str(model)!r} is a folder, from "
            "which nothing is removed; leave it out"
        )
    return Shards(Path(model).expanduser())


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


class HubShards(Shards):
    """Weight files of a Hub id. folder: of the commit in the Hub cache. The others as for `open_shards`."""

    def __init__(
        self, repo: str, folder: Path, *, drop: bool, account: Path | None, progress: Progress = SILENT
    ) -> None:
        super().__init__(folder)
        self._repo, self._commit, self._drop, self._progress = repo, snapshot_revision(folder) or "main", drop, progress
        self._account = Account(account)
        self._lock = threading.RLock()
        self._running: dict[str, Future[None]] = {}
        self._arrived: dict[str, int] = {}
        self._wanted: list[frozenset[str]] = []
        self._at: int | None = None  # nothing is brought ahead before it is known where the walk begins
        self._entries: dict[str, dict[str, TensorEntry]] = {}
        if self.names == [SINGLE_FILE]:
            self.fetch(SINGLE_FILE)

    # ---- what there is ----

    @cached_property
    def names(self) -> list[str]:
        """Of the files, sorted."""
        if (self.folder / SINGLE_FILE).exists():
            return [SINGLE_FILE]
        try:
            sharded = sorted(set(read_weight_map(self.folder).values()))
        except CheckpointError:
            if SINGLE_FILE in self._stored:
                return [SINGLE_FILE]
            raise
        return sharded

    @cached_property
    def _stored(self) -> dict[str, hub_files.Stored]:
        return hub_files.stored_files(self._repo, self._commit)

    def _sound(self, name: str) -> bool:
        return (self.folder / name).exists() and not self._account.doubtful(name) and name not in self._running

    def _size(self, name: str) -> int:
        if name not in self._stored:
            raise CheckpointError(
                f"{self._repo!r} has no {name!r} at {self._commit[:12]}, though its index names it; choose another "
                "revision"
            )
        return self._stored[name].size

    def entries(self, name: str) -> dict[str, TensorEntry]:
        """See `Shards.entries`; the Hub is asked for the header of a file that has not come."""
        if name not in self._entries:
            self._read_headers([name] if name not in self.names else self.names)
        return self._entries[name]

    def _read_headers(self, names: Sequence[str]) -> None:
        here = [name for name in names if self._sound(name)]
        self._entries |= {name: read_header(inside(self.folder, name)) for name in here}
        away = [name for name in names if name not in here]
        sizes = [self._size(name) for name in away]
        with (
            self._progress.bar("reading headers", total=len(away), unit="shard") as bar,
            ThreadPoolExecutor(CONNECTIONS) as pool,
        ):
            read = partial(hub_files.read_remote_header, self._repo, self._commit)
            for name, found in zip(away, pool.map(read, away, sizes), strict=True):
                self._entries[name] = found
                bar.advance(1)

    def digests(self, progress: Progress = SILENT) -> dict[str, str]:
        """See `Shards.digests`: of a file that has not come it is what the Hub says."""
        here = [name for name in self.names if self._sound(name)]
        away = {name: self._stored[name].blob for name in self.names if name not in here}
        return dict(sorted((digests_of([self.folder / name for name in here], progress) | away).items()))

    def open(self, path: str | Path) -> TensorFile:
        """See `Shards.open`; the file comes when it is read."""
        return HubFile(self, Path(path).name)

    # ---- when it is needed ----

    def prepare(self, config: Any) -> None:
        """See `Shards.prepare`: transformers opens a file only to learn a dtype that the config does not tell."""
        if getattr(config, "dtype", None) is None:
            self.fetch(self.names[0])

    def expect(self, wanted: Sequence[Iterable[str]]) -> None:
        """See `Shards.expect`."""
        self._wanted = [frozenset(names) for names in wanted]

    def begin(self, done: int) -> None:
        """See `Shards.begin`."""
        self.durable(done)
        self._check_room(done)
        self.run(done - 1)

    def run(self, block: int) -> None:
        """See `Shards.run`."""
        self._at = block
        self._go_on()

    def durable(self, done: int) -> None:
        """See `Shards.durable`; files that no other block needs are removed, if that was asked for."""
        if not self._drop or not done:
            return
        later = frozenset().union(*self._wanted[done:])
        with self._lock:
            for name in [name for name in self._account if name not in later and name not in self._running]:
                if not (self.folder / name).exists() or hub_files.remove_cached(self.folder, name):
                    self._account.strike(name)

    def keep_account(self) -> None:
        """See `Shards.keep_account`."""
        with self._lock:
            self._account.save()

    def close(self) -> None:
        """See `Shards.close`."""
        with self._lock:
            self._account.closed = True

    def fetch(self, name: str) -> None:
        """Have a file in the cache, whole. Raises CheckpointError, DiskSpaceError."""
        with self._lock:
            if self._sound(name):
                return
            future = self._running.get(name) or self._start(name)
        with self._progress.bar(f"waiting for {name}", total=self._size(name), unit="B") as bar:
            shown = 0
            while not wait([future], timeout=LOOK_SECONDS).done:
                bar.advance((seen := self._arrived.get(name, 0)) - shown)
                shown = seen
        future.result()

    def confirm(self, name: str) -> None:
        """A file of the cache is another one than it was. Raises CheckpointError unless its content is the same."""
        try:
            self._compare(name)
        except hub_files.Damaged as error:
            raise CheckpointError(
                f"{name!r} in the Hub cache has changed and is damaged ({error}); remove it with `hf cache rm`, {AGAIN}"
            ) from error

    # ---- bringing it ----

    def _start(self, name: str) -> Future[None]:
        future: Future[None] = Future()
        self._running[name] = future
        threading.Thread(target=self._work, args=(name, future), name=f"download {name}", daemon=True).start()
        return future

    def _work(self, name: str, future: Future[None]) -> None:
        error: BaseException | None = None
        try:
            hub_files.patiently(
                partial(self._bring, name),
                repr(name),
                self._repo,
                self._commit,
                lambda: self._account.closed,
            )
        except BaseException as caught:
            error = caught
        with self._lock:
            del self._running[name]
        if error is not None:
            future.set_exception(error)
            return
        future.set_result(None)
        self._go_on()

    def _bring(self, name: str) -> None:
        size = self._size(name)
        with self._lock:
            self._account.note(name, whole=False)
        self._sweep(name)
        if not (self.folder / name).exists() and self._free() < size:
            raise DiskSpaceError(self._too_little(f"{name!r} needs", size))
        hub_files.download(self._repo, self._commit, name, partial(self._report, name))
        try:
            self._compare(name)
        except hub_files.Damaged:
            hub_files.remove_cached(self.folder, name)
            raise
        with self._lock:
            self._account.note(name, whole=True)

    def _report(self, name: str, arrived: int) -> None:
        self._arrived[name] = arrived
        if self._account.closed:
            raise CheckpointError(f"the download of {name!r} was given up with its job")

    def _compare(self, name: str) -> None:
        """Raise Damaged if a file in the cache is not the one that the Hub has."""
        path, stored = self.folder / name, self._stored[name]
        if path.stat().st_size != stored.size:
            raise hub_files.Damaged(f"{path.stat().st_size} bytes instead of {stored.size}")
        if stored.sha256 is not None and sha256(path) != stored.sha256:
            raise hub_files.Damaged(f"its sha256 is not {stored.sha256[:12]}...")

    def _sweep(self, name: str) -> None:
        """Remove what a download left that ended with its process; the client never goes on with it."""
        blobs, stored = self.folder.parents[1] / "blobs", self._stored[name]
        for path in blobs.glob(f"{stored.blob}*.incomplete"):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)

    def _go_on(self) -> None:
        """Begin to bring the next file, if one of the next few is missing and the disk has room for it."""
        with self._lock:
            if self._at is None or self._account.closed or self._running:
                return
            missing = [name for name in self._coming() if not self._sound(name)]
            if missing and self._free() >= self._size(missing[0]):
                self._start(missing[0])

    def _coming(self) -> list[str]:
        """The next files that blocks need which have not run."""
        now = self._wanted[self._at] if 0 <= self._at < len(self._wanted) else frozenset()
        later = dict.fromkeys(name for names in self._wanted[self._at + 1 :] for name in sorted(names - now))
        return list(later)[:AHEAD]

    # ---- room ----

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _check_room(self, done: int) -> None:
        """Raise DiskSpaceError if not all files that blocks from `done` on need will find room."""
        missing = {name for names in self._wanted[done:] for name in names if not self._sound(name)}
        if not missing:
            return
        sizes = {name: self._size(name) for name in missing}
        most = max(map(sum, self._held(done, sizes))) if self._drop else sum(sizes.values())
        if self._free() < most:
            raise DiskSpaceError(self._too_little("the weight files that are still to come need", most))

    def _held(self, done: int, sizes: dict[str, int]) -> Iterator[list[int]]:
        """For each block the sizes of the files that are there while it runs, among those that were missing."""
        for block in range(done, len(self._wanted)):
            before = frozenset().union(*self._wanted[done : block + 1])
            still = frozenset().union(*self._wanted[block:])
            yield [size for name, size in sizes.items() if name in before and name in still]

    def _too_little(self, what: str, size: int) -> str:
        less = "" if self._drop else ", keep only the shards in use with --drop-shards"
        return (
            f"{what} {size / 1e9:.2f} GB in the Hub cache, and {self._free() / 1e9:.2f} GB are free; free some space"
            f"{less}, or let HF_HOME name a folder on another disk, {AGAIN}"
        )


class HubFile(TensorFile):
    """A file of the Hub that comes when it is first read, and again if it has gone from the cache."""

    def __init__(self, shards: HubShards, name: str) -> None:
        self._shards, self._path, self._state = shards, shards.folder / name, None
        self.entries = shards.entries(name)

    def check(self) -> None:
        """Have the file. Raises CheckpointError if it cannot be had, or is another one than its header said."""
        name = self._path.name
        self._shards.fetch(name)
        if self._state == (now := self._stat()):
            return
        if self._state is not None:
            self._shards.confirm(name)
        if read_header(self._path) != self.entries:
            raise CheckpointError(f"{name!r} in the Hub cache is not what the Hub said it was; remove it, {AGAIN}")
        self._state = now

    def read(self, name: str) -> Any:
        """See `TensorFile.read`."""
        try:
            return super().read(name)
        except QepError:
            if self._path.exists():
                raise
            return super().read(name)
