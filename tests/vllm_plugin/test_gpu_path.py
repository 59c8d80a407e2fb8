"""The products that a GPU would get, in Triton's interpreter: it decides at its import, so in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED = "imitation and ((gate_and_up and 2) or (add_up and flat and 4))"


def test_layers_load_and_compute_with_triton(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; run: pip install 'hf-qep[gpu]'")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    kept |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    tests = Path(__file__).with_name("test_layers.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", WANTED]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
