"""Models of the real vLLM, built, divided and loaded by its own code, in processes that add their shares themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm_plugin.conftest import unimportable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def on_a_processor() -> None:
    """Skip where there is no vLLM, or one for a GPU, whose models cannot be built beside it."""
    if reason := unimportable():
        pytest.skip(reason)
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not for a processor")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(("family", "ranks"), [("llama", 1), ("cohere2", 2), ("qwen3", 4)])
def test_linears_embeddings_and_logits_are_those_of_transformers(on_a_processor, saved: Callable, family, ranks):
    folder, port = saved(family).folder, free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    place = [[str(folder), str(rank), str(ranks), str(port)] for rank in range(ranks)]
    command = [sys.executable, "-m", "tests.vllm_plugin.whole_model"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*command, *own], cwd=ROOT, env=environment, **output) for own in place]
    for text in [process.communicate(timeout=280)[0] for process in started]:
        assert "DIFFERENCE" in text, text[-4000:]
        assert float(text.rpartition("DIFFERENCE")[2].split()[0]) < 1e-5
