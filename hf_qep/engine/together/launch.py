"""Processes that a launcher (torchrun, accelerate) started find each other, and end together."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_qep.engine.together.processes import Processes, Together
from hf_qep.errors import ConfigError, LostProcessError

PATIENCE = "HF_QEP_PATIENCE"
"""Environment variable: seconds that a process waits for another one."""
PATIENCE_SECONDS = 6 * 3600
"""Without it: longer than any linear takes to solve. A process that dies is noticed at once; this is for one that
hangs, or whose machine is cut off."""
ARRIVAL_SECONDS = 600
"""For all processes to find each other."""


def launched() -> int:
    """Number of processes that a launcher such as torchrun has started for this job; 1 without one.

    Raises ConfigError if what the environment says of them is not complete.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise ConfigError(
            "`accelerate launch` has started only one of the processes, as it does without GPUs; add --multi_gpu, or "
            "use torchrun"
        )
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or count == "1":
        return 1
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE is {count}, but {missing[0]} is not set; start the processes with torchrun")
    return int(count)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process where several were asked for as `cuda`; any other device as it is."""
    if device.type != "cuda" or device.index is not None or launched() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """This process and those that were launched with it, while the body runs; they end together.

    device: where this process computes. Raises LostProcessError if the others do not come.
    """
    if launched() == 1:
        yield Processes()
        return
    with ExitStack() as stack:
        stack.enter_context(_ended_by_signal())
        if not dist.is_initialized():
            _find_each_other(device)
            stack.callback(dist.destroy_process_group)
        together = Together(device)
        if not together.first:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the first says it
        stack.enter_context(together.agreeing())
        yield together


def _find_each_other(device: torch.device) -> None:
    patience = os.environ.get(PATIENCE, str(PATIENCE_SECONDS))
    if not patience.isdecimal() or patience == "0":
        raise ConfigError(f"{PATIENCE} must be a whole number of seconds, not {patience!r}")
    backend = "gloo"
    if device.type == "cuda" and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    waiting = timedelta(seconds=min(ARRIVAL_SECONDS, int(patience)))
    try:
        store, index, count = next(dist.rendezvous("env://", timeout=waiting))
        options = {"store": store, "rank": index, "world_size": count, "timeout": timedelta(seconds=int(patience))}
        dist.init_process_group(backend, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LostProcessError(f"the {launched()} processes have not found each other: {reason}") from error


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Launchers end the processes that are left by SIGTERM; it becomes an error, so that all is left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise LostProcessError(
            "this process was told to end, as all are when one of them is lost; blocks that are done are kept, start "
            "all processes again with --resume"
        )

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
