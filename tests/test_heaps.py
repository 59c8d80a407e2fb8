"""Heaps where address space is limited."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Barrier, Thread

import pytest

from hf_qep import heaps
from tests.clean_process import address_space, exit_code, limit_address_space

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space and glibc")
THREADS, STACKS = 4, 4 * (9 << 20)


def grown_by_threads() -> int:
    """Bytes of address space for threads that each hold a little."""
    before, all_there = address_space(), Barrier(THREADS + 1)

    def hold():
        kept = [bytes(2000) for _ in range(1000)]
        all_there.wait()
        all_there.wait()
        return kept

    threads = [Thread(target=hold, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    all_there.wait()
    grown = address_space() - before
    all_there.wait()
    return grown


def threads_share_a_heap():
    limit_address_space(1 << 30)
    heaps.limit_heaps()
    assert grown_by_threads() < STACKS + (32 << 20)


def threads_have_heaps_of_their_own():
    heaps.limit_heaps()
    assert grown_by_threads() > STACKS + (32 << 20)


def freed_memory_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) << 12

    kept = [bytearray(b"1" * 50_000) for _ in range(2000)]
    del kept[:-1]  # the last one keeps the heap from shrinking
    before = resident()
    heaps.trim_heaps()
    assert before - resident() > 50 << 20


def test_one_heap_for_all_threads_under_a_limit():
    assert exit_code(threads_share_a_heap) == 0


def test_nothing_changes_without_a_limit():
    assert exit_code(threads_have_heaps_of_their_own) == 0


def test_trimming_gives_back_what_lies_below_something_held():
    assert exit_code(freed_memory_is_given_back) == 0
