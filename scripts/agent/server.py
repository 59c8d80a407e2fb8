"""`hf-qep serve` in a process of its own on this machine, ended with the block that asked for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hf_qep.errors import ConfigError

HOST = "127.0.0.1"
PATIENCE = 120.0
"""Seconds until a server that does not answer is given up."""
PAUSE, GOODBYE = 0.2, 10.0


@contextmanager
def served(model: Path, patience: float = PATIENCE) -> Iterator[str]:
    """The address (".../v1") of a server of `model`, a folder, that answers while the body runs.

    Whatever ends the body ends the server. Raises ConfigError with its last words if it does not come up.
    """
    port = _free_port()
    command = [sys.executable, "-m", "hf_qep", "serve", str(model), "--host", HOST, "--port", str(port), "--quiet"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
        try:
            _wait(process, port, time.monotonic() + patience, log)
            yield f"http://{HOST}:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(GOODBYE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """This one, with the packages that this process found, and without bars in the log."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], port: int, end: float, log: IO[str]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with direct.open(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None or time.monotonic() > end:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
            raise ConfigError(f"the server did not come up; its last words: {said[-1] if said else 'none'}")
        time.sleep(PAUSE)
