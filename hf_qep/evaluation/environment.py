"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from hf_qep.accounting import bits_report
from hf_qep.files import sha256
from hf_qep.kernels.processor import processor_name

PACKAGES = {"torch": "torch", "transformers": "transformers", "hf_qep": "hf-qep", "lm_eval": "lm_eval"}


@dataclass(frozen=True)
class Environment:
    """Software and hardware."""

    versions: Annotated[dict[str, str | None], "python, torch, transformers, hf_qep, lm_eval; null if not installed"]
    platform: Annotated[str, "operating system and processor family"]
    processor: Annotated[str | None, "name of the processor"]
    cores: Annotated[int, "processor cores this process may use"]
    memory_bytes: Annotated[int | None, "memory of the machine"]
    accelerator: Annotated[str | None, "name of the accelerator the subject ran on; null for the processor"]
    threads: Annotated[int, "threads of torch"]


@dataclass(frozen=True)
class ModelFacts:
    """One model."""

    name: Annotated[str, "Hub id, or the name of its folder without the path"]
    revision: Annotated[str | None, "commit on the Hub; null for a local folder"]
    sha256: Annotated[dict[str, str], "weight file -> hex digest; empty for a model that has no files"]
    dtype: Annotated[str, "dtype of the parameters that are not packed"]
    parameters: Annotated[int, "weights the model stands for; a packed matrix counts out x in"]


def describe_environment(model: nn.Module) -> Environment:
    """The environment of this process; `model` tells the device."""
    device = next(model.parameters()).device
    return Environment(
        versions={"python": platform.python_version()} | {k: _version(d) for k, d in PACKAGES.items()},
        platform=f"{platform.system()} {platform.machine()}",
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
    )


def describe_model(model: nn.Module, *, name: str | None = None, folder: Path | None = None) -> ModelFacts:
    """Facts of a loaded model. name: default `name_or_path`. folder: where its weight files are, to hash them."""
    name = name or getattr(model, "name_or_path", "") or type(model).__name__
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return ModelFacts(
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        revision=_revision(model, folder),
        sha256={path.name: sha256(path) for path in files},
        dtype=str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        parameters=bits_report(model)["model_weights"],
    )


def _revision(model: nn.Module, folder: Path | None) -> str | None:
    if folder is not None and folder.parent.name == "snapshots":  # the Hub cache names folders by commit
        return folder.name
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def command_line() -> str:
    """The command of this process as it can be typed again; of absolute paths only the last part is kept.

    Records are published, and where a user keeps files is nobody else's business.
    """
    program, *arguments = sys.argv
    return shlex.join([Path(program).name, *(_without_folders(argument) for argument in arguments)])


def _without_folders(argument: str) -> str:
    parts = (option.split("=") for option in argument.split(","))  # also in --out=FILE and --tasks a=FILE,b=FILE
    return ",".join("=".join(Path(p).name if Path(p).is_absolute() else p for p in option) for option in parts)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
