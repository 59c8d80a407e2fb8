"""Bytes a model occupies and the extra bytes it needs while it runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_STATM = Path("/proc/self/statm")
WORKING_WIDTH = 512
"""Of the products before memory is looked at; wide enough for the libraries to take them apart into panels."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory; storage shared by several names (tied embeddings) counts once.

    What is on meta, because it is read when it is needed, counts as if it were in memory.
    """
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[tensor.device, id(tensor) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device, interval_s: float = 0.002) -> int | None:
    """Highest memory during `run` above its level just before it: activations, caches and unpacked weights.

    CUDA: bytes of the allocator. Otherwise resident memory of the process, sampled every `interval_s`, so short peaks
    can be missed, and memory the allocator had kept is not seen as new. None where /proc does not exist.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not _STATM.exists():
        return None
    return _sampled_peak(run, interval_s)


def _sampled_peak(run: Callable[[], object], interval_s: float) -> int:
    before = highest = resident_bytes()
    finished = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not finished.wait(interval_s):
            highest = max(highest, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
        last = resident_bytes()
    finally:
        finished.set()
        watcher.join()
    return max(highest, last) - before


def working_bytes() -> int:
    """`resident_bytes` once this process has computed something: libraries bring buffers with the first products.

    0 where /proc does not exist.
    """
    x = torch.ones(WORKING_WIDTH, WORKING_WIDTH)
    for kind in (torch.float32, torch.bfloat16):
        torch.mm(x.to(kind), x.to(kind))
    del x
    return resident_bytes() if _STATM.exists() else 0


def resident_bytes() -> int:
    """Memory of this process that is in the machine's, from /proc."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
