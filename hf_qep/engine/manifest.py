"""`hf_qep_manifest.json`: how a checkpoint was made, from what, and what its files are.

config.json holds what loading needs; the manifest holds the rest. No value in it shows a folder of the machine it was
made on.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import Calibration
from hf_qep.engine.headers import MANIFEST
from hf_qep.engine.report import QuantizationReport
from hf_qep.files import sha256
from hf_qep.public_names import public_name

MANIFEST_VERSION = 1

_RECIPE = [
    "bits",
    "method",
    "max_memory",
    "group_size",
    "propagation",
    "residual",
    "damping",
    "effort",
    "num_samples",
    "seq_len",
    "batch_size",
    "skip_modules",
    "seed",
    "bias_correction",
    "tune_epochs",
    "tune_lookahead",
    "distill_epochs",
    "distill_signs",
    "embedding_bits",
    "head_bits",
    "format_version",
]
_PACKAGES = ("hf-qep", "torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "numpy")


def build_manifest(
    *,
    base_model: str | Path,
    config: QepConfig,
    calibration: Calibration,
    report: QuantizationReport,
    revision: str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """What is known before the files are written; `save_checkpoint` adds bits, files and versions.

    base_model: Hub id, or a folder of which only the name is kept.
    """
    return {
        "base_model": public_name(str(base_model)),
        "revision": revision,
        "licence": licence,
        "recipe": {key: getattr(config, key) for key in _RECIPE},
        "calibration": {**calibration.description, "fingerprint": calibration.fingerprint},
        "report": {key: value for key, value in report.to_dict().items() if key != "calibration"},
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape the result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size in bytes of every file under `folder` except the manifest, by relative name."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
