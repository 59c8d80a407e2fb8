"""What a job is made of, so that nobody goes on with another one."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from hf_qep.config import QepConfig
from hf_qep.engine.manifest import versions
from hf_qep.engine.source import snapshot_revision
from hf_qep.files import sha256

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "transformers")


def job_parts(folder: Path, config: QepConfig, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Json values: weights and config of the model in `folder`, recipe, where it is computed and in what, code."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return {
        "model": {"revision": snapshot_revision(folder), "files": {path.name: _digest(path) for path in files}},
        "recipe": {key: value for key, value in config.to_dict().items() if key != "layers"},
        "place": {"device": torch.device(device).type, "dtype": None if dtype is None else str(dtype)},
        "code": {name: version for name, version in versions().items() if name in _LIBRARIES} | {"hf_qep": _code()},
    }


def _digest(path: Path) -> str:
    """sha256 of a file; those in the Hub cache are links to files that are named by it."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else sha256(path)


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
