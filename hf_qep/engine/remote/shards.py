"""Weight files of a Hub model that come when a block needs them, and may go when no later one does.

Before the first block only their headers are read. All are of one commit, whatever becomes of its branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import SINGLE_FILE, TensorEntry, inside, read_header, read_weight_map
from hf_qep.engine.remote import files as hub_files
from hf_qep.engine.remote.cache import Account, HubCache
from hf_qep.engine.remote.errors import AGAIN
from hf_qep.engine.shards import Shards, digests_of
from hf_qep.engine.source import hub_name
from hf_qep.engine.tensor_files import TensorFile
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.progress import SILENT, Progress

AHEAD = 2
"""Files that are brought before the block that needs them runs; one at a time."""
CONNECTIONS = 8
"""For headers."""


def open_shards(
    model: str | Path,
    revision: str | None = None,
    *,
    drop: bool = False,
    account: Path | None = None,
    progress: Progress = SILENT,
) -> Shards:
    """Weight files of a folder, or of a Hub id at the commit that `revision` is now; a single one comes at once.

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


class HubShards(Shards):
    """Weight files of a Hub id. folder: of the commit in the Hub cache. The others as for `open_shards`."""

    def __init__(
        self, repo: str, folder: Path, *, drop: bool, account: Path | None, progress: Progress = SILENT
    ) -> None:
        super().__init__(folder)
        advice = "" if drop else ", keep only the shards in use with --drop-shards"
        self.cache = HubCache(repo, folder, Account(account), progress, advice)
        self._drop, self._progress = drop, progress
        self._wanted: list[frozenset[str]] = []
        self._at: int | None = None  # nothing is brought ahead before it is known where the walk begins
        self._entries: dict[str, dict[str, TensorEntry]] = {}
        self.cache.when_idle = self._go_on
        if self.names == [SINGLE_FILE]:
            self.cache.fetch(SINGLE_FILE)

    @cached_property
    def names(self) -> list[str]:
        """Of the files, sorted."""
        if (self.folder / SINGLE_FILE).exists():
            return [SINGLE_FILE]
        try:
            return sorted(set(read_weight_map(self.folder).values()))
        except CheckpointError:
            if SINGLE_FILE in self.cache.stored:
                return [SINGLE_FILE]
            raise

    def entries(self, name: str) -> dict[str, TensorEntry]:
        """See `Shards.entries`; the Hub is asked for the header of a file that has not come."""
        if name not in self._entries:
            self._read_headers([name] if name not in self.names else self.names)
        return self._entries[name]

    def _read_headers(self, names: Sequence[str]) -> None:
        here = [name for name in names if self.cache.sound(name)]
        self._entries |= {name: read_header(inside(self.folder, name)) for name in here}
        away = [name for name in names if name not in here]
        sizes = [self.cache.size(name) for name in away]
        with (
            self._progress.bar("reading headers", total=len(away), unit="shard") as bar,
            ThreadPoolExecutor(CONNECTIONS) as pool,
        ):
            read = partial(hub_files.read_remote_header, self.cache.repo, self.cache.commit)
            for name, found in zip(away, pool.map(read, away, sizes), strict=True):
                self._entries[name] = found
                bar.advance(1)

    def digests(self, progress: Progress = SILENT) -> dict[str, str]:
        """See `Shards.digests`: of a file that has not come it is what the Hub says."""
        here = [name for name in self.names if self.cache.sound(name)]
        away = {name: self.cache.stored[name].blob for name in self.names if name not in here}
        return dict(sorted((digests_of([self.folder / name for name in here], progress) | away).items()))

    def open(self, path: str | Path) -> TensorFile:
        """See `Shards.open`; the file comes when it is read."""
        return HubFile(self, Path(path).name)

    def prepare(self, config: Any) -> None:
        """See `Shards.prepare`: transformers opens a file only to learn a dtype that the config does not tell."""
        if getattr(config, "dtype", None) is None:
            self.cache.fetch(self.names[0])

    def expect(self, wanted: Sequence[Iterable[str]]) -> None:
        """See `Shards.expect`."""
        self._wanted = [frozenset(names) for names in wanted]

    def begin(self, done: int, written: int = 0) -> None:
        """See `Shards.begin`."""
        self.durable(done)
        self._check_room(done, written)
        self.run(done - 1)

    def run(self, block: int) -> None:
        """See `Shards.run`."""
        self._at = block
        self._go_on()

    def durable(self, done: int) -> None:
        """See `Shards.durable`; files that no other block needs are removed, if that was asked for."""
        if self._drop and done:
            self.cache.remove_own(kept=frozenset().union(*self._wanted[done:]))

    def keep_account(self) -> None:
        """See `Shards.keep_account`."""
        self.cache.keep_account()

    def close(self) -> None:
        """See `Shards.close`."""
        self.cache.close()

    def _go_on(self) -> None:
        """Begin to bring the next file, if one of the next few is missing."""
        if self._at is not None:
            self.cache.fetch_behind(islice(self._coming(self._at), AHEAD))

    def _coming(self, block: int) -> Iterator[str]:
        """Files that blocks behind one need, in that order."""
        seen = set(self._wanted[block]) if block >= 0 else set()
        for names in self._wanted[block + 1 :]:
            yield from sorted(names - seen)
            seen |= names

    def _check_room(self, done: int, written: int) -> None:
        """Raise DiskSpaceError if `written` bytes and all files that blocks from `done` on need will not find room."""
        missing = {name for names in self._wanted[done:] for name in names if not self.cache.sound(name)}
        if missing:
            sizes = {name: self.cache.size(name) for name in missing}
            most = max(map(sum, self._held(done, sizes))) if self._drop else sum(sizes.values())
            self.cache.check_free("the weight files that are still to come, and the output, need", most + written)

    def _held(self, done: int, sizes: dict[str, int]) -> Iterator[list[int]]:
        """For each block the sizes of the files that are there while it runs, among those that were missing."""
        for block in range(done, len(self._wanted)):
            before = frozenset().union(*self._wanted[done : block + 1])
            still = frozenset().union(*self._wanted[block:])
            yield [size for name, size in sizes.items() if name in before and name in still]


class HubFile(TensorFile):
    """A file of the Hub that comes when it is first read, and again if it has gone from the cache."""

    def __init__(self, shards: HubShards, name: str) -> None:
        self._cache, self._path, self._state = shards.cache, shards.folder / name, None
        self.entries = shards.entries(name)

    def check(self) -> None:
        """Have the file. Raises CheckpointError if it cannot be had, or is another one than its header said."""
        self._cache.fetch(self.name)
        if self._state == (now := self._stat()):
            return
        if self._state is not None:
            self._cache.confirm(self.name)
        if read_header(self._path) != self.entries:
            raise CheckpointError(f"{self.name!r} in the Hub cache is not what the Hub said it was; remove it, {AGAIN}")
        self._state = now

    def read(self, name: str) -> Any:
        """See `TensorFile.read`."""
        try:
            return super().read(name)
        except CheckpointError:
            if self._path.exists():
                raise
            return super().read(name)
