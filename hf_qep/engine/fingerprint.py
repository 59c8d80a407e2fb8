"""What a job is made of, so that nobody goes on with another one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from hf_qep.config import QepConfig
from hf_qep.engine.manifest import versions
from hf_qep.engine.shards import Shards, digests_of
from hf_qep.engine.source import snapshot_revision
from hf_qep.engine.together.processes import Processes
from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Progress

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "transformers")


def job_parts(
    shards: Shards,
    config: QepConfig,
    device: torch.device | str,
    dtype: torch.dtype | None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Json values: weights and config of a model, recipe, where it is computed and in what, code.

    The number of threads is among them: sums are split between them, and round differently for another number.
    """
    files = digests_of([shards.folder / "config.json"]) | shards.digests(progress)
    return {
        "model": {"revision": snapshot_revision(shards.folder), "files": files},
        "recipe": {key: value for key, value in config.to_dict().items() if key != "layers"},
        "place": {
            "device": torch.device(device).type,
            "dtype": None if dtype is None else str(dtype),
            "threads": torch.get_num_threads(),
        },
        "code": {name: version for name, version in versions().items() if name in _LIBRARIES} | {"hf_qep": _code()},
    }


def check_alike(processes: Processes, config: QepConfig, folder: Path) -> None:
    """Raise ConfigError, on all of them, unless all processes have the same recipe, code and files by size."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    own = {
        "recipe": {key: value for key, value in config.to_dict().items() if key != "layers"},
        "sizes of the model's files": {path.name: path.stat().st_size for path in files},
        "number of threads": torch.get_num_threads(),
        "versions": versions(),
        "code of hf_qep": _code() if processes.count > 1 else "",
    }
    for index, other in enumerate(found := processes.gather(own)):
        if unequal := [name for name in own if other[name] != found[0][name]]:
            raise ConfigError(
                f"process {index} of {processes.count} has another {unequal[0]} than process 0; give all the same"
            )


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
