"""A job that may be killed: the blocks that are done lie beside the output, and with them all that the next one needs.

    job.json              what the job is made of: weights, recipe, code; locked while a process is at work on it
    calibration/          the rows it is made from
    block-00000.safetensors   tensors of a finished block, as the output will hold them
    shards.json           weight files that the job brought into the Hub cache
    after-00001/          both streams and the report when so many blocks were done

Every entry is written under another name, flushed, and renamed, so what has its name is whole. A block counts as done
once the folder behind it exists; the last two of these are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qep.engine.calibration import Calibration
from hf_qep.engine.headers import MANIFEST, read_json
from hf_qep.engine.source import free_space_check
from hf_qep.engine.tensor_files import Described, write_tensors
from hf_qep.errors import OutputExistsError, ResumeError
from hf_qep.files import flush, write_text_aside

KEPT = 2
"""States that are kept: the last one, and the one before."""
_JOB, _ROWS, _STATE, _SHARDS = "job.json", "calibration", "state.json", "shards.json"
_NAMED = 3


class Unfinished:
    """The folder beside an output in which its job keeps what is done."""

    def __init__(self, out: Path) -> None:
        self.out = out
        whole = out.absolute()
        self.folder = whole.with_name(f".{whole.name}.unfinished")
        self.shards = self.folder / _SHARDS
        self._lock: IO[bytes] | None = None

    def begin(self, parts: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Start, or go on with what was left. parts: json values that say what the job is made of.

        Raises what `check` raises, and ResumeError if another process is at work on the job, or naming the parts that
        differ from those of the job that is to be resumed.
        """
        self.check(resume=resume, overwrite=overwrite)
        self._take()
        if not resume:
            self.remove()
        if (self.folder / _JOB).exists():
            try:
                self._compare(read_json(self.folder / _JOB), parts)
            except BaseException:
                self._release()
                raise
            self._clean()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text_aside(self.folder / _JOB, json.dumps(parts, indent=2, sort_keys=True) + "\n")
        flush(self.folder)
        self._take()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise OutputExistsError if something was left and neither option says what to do with it."""
        if self.folder.exists() and not resume and not overwrite:
            raise OutputExistsError(
                f"a job for {str(self.out)!r} was not finished; go on with --resume, or drop what it did with "
                "--overwrite"
            )

    def calibration(self, load: Callable[[], Calibration], *, costly: bool) -> Calibration:
        """The rows of the job: those that were kept, or new ones, which are kept.

        costly: what was kept is taken at its word; otherwise it must be what `load` gives. Raises ResumeError if not.
        """
        place = self.folder / _ROWS
        if not self.has_rows:
            rows = load()
            about = {"description": rows.description, "fingerprint": rows.fingerprint, "tokens": rows.tokens}
            with self._written(_ROWS) as folder:
                save_file(rows.inputs, folder / "inputs.safetensors")
                (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
            return rows
        about = read_json(place / "about.json")
        if costly:
            return Calibration(load_file(place / "inputs.safetensors"), **about)
        rows = load()
        self._compare({"calibration": about["fingerprint"]}, {"calibration": rows.fingerprint})
        return rows

    @property
    def wrote_output(self) -> bool:
        """Whether the output is this job's: it was killed before it could remove this folder."""
        found, about = self.out / MANIFEST, self.folder / _ROWS / "about.json"
        if not (found.is_file() and about.is_file() and self.latest()):
            return False
        return read_json(found).get("calibration", {}).get("fingerprint") == read_json(about)["fingerprint"]

    @property
    def has_rows(self) -> bool:
        """Whether the calibration rows were kept."""
        return (self.folder / _ROWS).exists()

    def check_room(self, packed: int, state: int) -> int:
        """Bytes of what the job will write: all packed blocks here and in the output, and states that are kept while
        the next is written. Sizes in bytes. Raises DiskSpaceError if the disk has no room for them."""
        here = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        needed = max(0, 2 * packed + (KEPT + 1) * state - here)
        free_space_check(self.folder, needed)
        return needed

    @property
    def revision(self) -> str | None:
        """Commit of the model that the job is made of, None if it is from no Hub or was not begun."""
        job = self.folder / _JOB
        model = read_json(job).get("model") if job.is_file() else None
        return model.get("revision") if isinstance(model, dict) else None

    def keep_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a finished block."""
        path, aside = self._block(index), self.folder / ".block.partial"
        write_tensors(aside, {name: Described.of(t) for name, t in tensors.items()}, tensors.__getitem__)
        flush(aside)
        os.replace(aside, path)
        flush(self.folder)

    @contextmanager
    def keep_state(self, done: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """Count `done` blocks as done when the body, which may write more into the folder it gets, has ended."""
        with self._written(_after(done)) as folder:
            (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
            yield folder
        shutil.rmtree(self.folder / _after(done - KEPT), ignore_errors=True)

    def latest(self) -> tuple[int, Path, dict[str, Any]] | None:
        """Number of blocks that are done, the folder of what the next one needs, and its state; None before the first.

        Raises ResumeError if the tensors of a finished block are gone.
        """
        done = max((int(p.name[-5:]) for p in self.folder.glob("after-*") if _is_state(p)), default=0)
        if not done:
            return None
        if gone := [path.name for path in self.blocks(done) if not path.is_file()]:
            raise ResumeError(f"{gone[0]!r} is gone from {self.folder.name!r}; start again with --overwrite")
        folder = self.folder / _after(done)
        return done, folder, read_json(folder / _STATE)

    def blocks(self, count: int) -> list[Path]:
        """Files of the first `count` blocks."""
        return [self._block(index) for index in range(count)]

    def give_up(self) -> None:
        """After an error: keep what is done, if anything is, but nothing half done."""
        if any(map(_is_state, self.folder.glob("after-*"))):
            self._clean()
            self._release()
        else:
            self.remove()

    def remove(self) -> None:
        """Drop all."""
        self._release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self) -> None:
        """Lock the job until this process is done with it, or dies; only where the system has such locks."""
        if not (self.folder / _JOB).exists() or sys.platform == "win32":
            return
        import fcntl

        self._lock = (self.folder / _JOB).open("rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release()
            raise ResumeError(f"another process is at work on the job for {str(self.out)!r}; wait for it") from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        """A folder that gets its name when the body has ended."""
        aside = self.folder / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for path in (*aside.iterdir(), aside):
            flush(path)
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a block that was done twice
        os.replace(aside, self.folder / name)
        flush(self.folder)

    def _clean(self) -> None:
        """Remove what a kill left half done, also beside this folder."""
        whole = re.compile(rf"{_JOB}|{_ROWS}|{_SHARDS}|block-\d{{5}}\.safetensors|after-\d{{5}}")
        half = [path for path in self.folder.iterdir() if not whole.fullmatch(path.name)]
        beside = [path for path in self.out.parent.iterdir() if path.name.endswith(".partial")]
        half += [path for path in beside if path.name.startswith(f".{self.out.name}.")]
        for path in half:
            if path.is_dir():  # activations of another process may go at the same time
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        before, after = dict(_flat(then)), dict(_flat(json.loads(json.dumps(now))))
        unequal = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
        if not unequal:
            return
        said = [f"{key} ({_brief(before.get(key))} then, {_brief(after.get(key))} now)" for key in unequal[:_NAMED]]
        more = f" and {len(unequal) - _NAMED} more" if len(unequal) > _NAMED else ""
        raise ResumeError(
            f"the unfinished job for {str(self.out)!r} cannot be resumed, it was made of something else: "
            f"{', '.join(said)}{more}; give the same again, or start anew with --overwrite"
        )


def _after(done: int) -> str:
    return f"after-{done:05}"


def _is_state(path: Path) -> bool:
    return bool(re.fullmatch(r"after-\d{5}", path.name))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts by dotted names."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{prefix}.{key}" if prefix else key)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}...{text[-1]}"
