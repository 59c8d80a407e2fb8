"""Python in a fresh process, where hf_qep is imported only if the code says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = "import torch, transformers; torch.set_num_threads(1); transformers.logging.set_verbosity_error()\n"
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_qep":
            raise ModuleNotFoundError("No module named 'hf_qep'", name="hf_qep")
sys.meta_path.insert(0, Block())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the repository on the path, offline; standard output and error as text."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, timeout=300
    )
