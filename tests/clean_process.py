"""Calls in processes of their own, forked from an interpreter without threads.

A process that pytest forks itself has copies of locks that other threads held at that moment, and waits for them for
ever. Here a server that has imported everything and started nothing forks instead.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["tests.engine.test_streaming"]
"""Modules that the server imports, once."""
PATIENCE = 240
"""Seconds after which a process is taken for stuck."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def exit_code(target: Callable[..., Any], *args: Any) -> int:
    """Call `target` in a new process: 0 if it returned, 1 if it raised, -9 if it was killed. Both must be picklable."""
    return exit_codes(target, [args])[0]


def exit_codes(target: Callable[..., Any], calls: Sequence[tuple], patience: float = PATIENCE) -> list[int]:
    """The same for several calls at the same time. Those that take longer than so many seconds are killed, and
    TimeoutError is raised."""
    processes = [_context.Process(target=_call, args=(target, *args), daemon=True) for args in calls]
    for process in processes:
        process.start()
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    if stuck := [process for process in processes if process.is_alive()]:
        for process in stuck:
            process.kill()
        raise TimeoutError(f"{target.__name__} did not end within {patience} s")
    return [process.exitcode for process in processes]


def address_space() -> int:
    """Bytes of addresses that this process has taken; on Linux."""
    return int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def limit_address_space(allowance: int) -> None:
    """Let this process take so many more bytes of addresses and no more; on Linux, for a process of its own."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (address_space() + allowance, resource.RLIM_INFINITY))


def _call(target: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    target(*args)
