"""`hf_qep_manifest.json`: how a checkpoint was made, from what, and what its files are.

config.json holds what loading needs; the manifest holds the rest. No value in it shows a folder of the machine it was
made on.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import Calibration
from hf_qep.engine.report import QuantizationReport
from hf_qep.files import sha256

MANIFEST = "hf_qep_manifest.json"
MANIFEST_VERSION = 1

_RECIPE = [
    "bits",
    "method",
    "group_size",
    "propagation",
    "damping",
    "num_samples",
    "seq_len",
    "batch_size",
    "skip_modules",
    "seed",
    "bias_correction",
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


def public_name(name: str) -> str:
    """`name` without the folders of this machine: a Hub id stays, a path keeps its last part.

    A mix such as "data/set/a.txt*0.7,org/set*0.3" is taken part by part.
    """
    return ",".join(_last_part(part) for part in name.split(","))


def without_folders(value: Any) -> Any:
    """A json value in which every string that is a local path keeps only its last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return public_name(value) if isinstance(value, str) and _is_local(value) else value


def _is_local(text: str) -> bool:
    """Whether a string is, or starts with, a path of this machine; a token such as "/" is none."""
    return bool(re.match(r"(~|\.{1,2}|[A-Za-z]:)?[/\\][^/\\\s]+[/\\]", text)) and "\n" not in text


def _last_part(text: str) -> str:
    text = text.strip()
    if Path(text).is_dir() or _is_local(text) or text.count("/") > 1:
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return text
