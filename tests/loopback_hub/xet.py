"""Optional transfer through hf_xet: its extension can keep its store in a folder, which the double reads.

This is not documented by hf_xet, so the tests that use it skip where it does not work.
"""

from __future__ import annotations

import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_RECORD, _HEADER = 48, 48
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30


class XetContent(NamedTuple):
    """A content in the store: the name that hf_xet gave to it, and its bytes."""

    name: str
    size: int


class XetStore:
    """The folder in which hf_xet keeps its chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def access(self) -> dict[str, Any]:
        """What hf_xet has to know to use the folder."""
        return {"casUrl": f"local://{self.folder}", "accessToken": "xet", "exp": int(time.time()) + 3600}

    def index(self) -> dict[str, XetContent]:
        """What hf_xet has stored, by sha256."""
        return {sha256: found for shard in self.folder.rglob("*.mdb") for sha256, found in _records(shard.read_bytes())}

    def read(self, sha256: str) -> bytes:
        """Content of a file, fetched by hf_xet itself; the process that stored it must have ended."""
        import hf_xet

        access = self.access()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "content"
            with hf_xet.XetSession().new_file_download_group(
                endpoint=access["casUrl"], token=access["accessToken"], token_expiry_unix_secs=access["exp"]
            ) as group:
                group.start_download_file(hf_xet.XetFileInfo(self.index()[sha256].name, None), str(target))
            return target.read_bytes()


def _records(shard: bytes) -> Iterator[tuple[str, XetContent]]:
    """(sha256, content) of the files in a shard: 48-byte records after a header of 48 bytes, ended by 0xff.

    A file is a record with its name, one per segment with the segment's bytes, as many for verification, and one with
    its sha256.
    """
    at = _HEADER
    while at + _RECORD <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
        name = _hex(shard[at : at + 32])
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD
        size = sum(struct.unpack_from("<I", shard, at + n * _RECORD + 36)[0] for n in range(segments))
        at += _RECORD * segments * (2 if flags & _WITH_VERIFICATION else 1)
        if flags & _WITH_METADATA:
            yield _hex(shard[at : at + 32]), XetContent(name, size)
            at += _RECORD


def _hex(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
