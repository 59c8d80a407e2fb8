"""Results on disk as soon as they are known: one line of JSON each, for one search only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import canonical_json


def refuse_other(path: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ConfigError that names the parts in which two fingerprints differ, if they do."""
    parts = sorted(stored.keys() | asked.keys())
    other = [p for p in parts if canonical_json(stored.get(p)) != canonical_json(asked.get(p))]
    if other:
        raise ConfigError(
            f"{path!r} belongs to another search: {', '.join(f'`{p}`' for p in other)} "
            f"{'is' if len(other) == 1 else 'are'} not the same; go on with the settings it was begun with, or give "
            "another folder"
        )


class Journal:
    """Results of one search by key; those that are in the file already are known from the start.

    path: file of JSON lines, made when it is not there. fingerprint: everything that the results depend on, as JSON
    values by part. A last line that a kill cut off is dropped. Each line is written in one call and flushed to disk, so
    processes of one machine can add to the same file; they see what the others wrote when they open it again.
    Raises ConfigError if the file was begun with another fingerprint, CheckpointError if a line in it is unreadable.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lines = _whole_lines(path)
        if not lines:
            self._append({"fingerprint": dict(fingerprint)})
            return
        if "fingerprint" not in lines[0]:
            raise CheckpointError(f"{str(path)!r} does not begin as a journal does; give another folder")
        for line in lines:
            if "fingerprint" in line:  # more than one, where processes began together
                refuse_other(str(path), line["fingerprint"], fingerprint)
            else:
                self._results[line.pop("key")] = line

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def get(self, key: str) -> dict[str, Any] | None:
        """The result under a key, None if there is none yet."""
        return self._results.get(key)

    def add(self, key: str, **result: Any) -> None:
        """Write a result: JSON values without NaN. It is on disk when this returns."""
        self._append({"key": key, **result})
        self._results[key] = result

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; what follows the last line end is cut off it."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(f"line {number} of the journal {str(path)!r} is unreadable; remove it") from error
    return lines
