"""Memory that was freed goes back to the system: what glibc's heaps do not do by themselves."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
"""Of glibc's mallopt."""
THRESHOLD = 1 << 17
"""Bytes from which a piece of memory is the system's again once it is freed; glibc raises this, up to 32 MB, whenever
a larger piece is freed, and from then on keeps such pieces in a heap that fills with holes."""


def limit_heaps() -> None:
    """Where address space is limited, as by `ulimit -v`: one heap for all threads, and none that keeps large pieces.

    glibc gives every thread a heap of 64 MB of addresses, twice that where it aligns them, and loading a model starts
    several threads. To be called before these are. Pieces that come from the system each time cost time, so this has no
    effect where there is no limit; none without glibc either.
    """
    if sys.platform != "linux":
        return
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, THRESHOLD)


def trim_heaps() -> None:
    """Give the system the pages of the heaps that hold nothing. Without effect where there is no glibc."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(ctypes.c_size_t(0))


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
