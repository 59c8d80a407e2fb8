"""`--device` and `--dtype`: words into torch values, refused before a model is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hf_qep.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help=f"auto (as stored), {', '.join(DTYPES)}.")]


def to_device(name: str) -> torch.device:
    """The device of that name. Raises ConfigError if there is none on this machine."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"this machine has {torch.cuda.device_count()} CUDA devices, so not {name!r}; use cpu")
    return device


def to_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for "auto". Raises ConfigError for any other word."""
    import torch

    if name != "auto" and name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)
