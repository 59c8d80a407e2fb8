"""A float model that is only run: in memory if it fits there, else read block by block as it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_qep.engine.headers import read_headers
from hf_qep.engine.on_demand import free_memory, load_on_demand
from hf_qep.engine.source import load_float_model
from hf_qep.errors import ArchitectureError

SHARE = 0.5
"""Of the free memory that a model may take; the other half is for what it computes, and for the model beside it."""


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer, processor or None. on_demand: its blocks are on meta and are read
    each time that they run."""

    model: PreTrainedModel
    processor: Any
    on_demand: bool = False


def load_to_run(
    folder: Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", *, whole: bool = False
) -> Loaded:
    """The checked float model of `folder`, whole if there is room for it on `device` and on the way there.

    dtype: of the weights; "auto" keeps the stored one. whole: in memory in any case.
    Raises what `load_float_model` raises. A model without a list of blocks is always loaded whole.
    """
    place = torch.device(device)
    if not whole and needed_bytes(folder, dtype) > SHARE * min(free_memory(), free_on(place)):
        try:
            model, blocks, processor = load_on_demand(folder, dtype)
        except ArchitectureError:  # its blocks cannot be told apart
            pass
        else:
            blocks.place(place, None)
            return Loaded(model, processor, True)
    model, processor = load_float_model(folder, dtype)
    return Loaded(model.to(place), processor)


def needed_bytes(folder: Path, dtype: torch.dtype | str = "auto") -> int:
    """Of the tensors in the files of a folder, as they are or in another dtype. Raises CheckpointError."""
    entries = read_headers(folder).values()
    if dtype == "auto":
        return sum(entry.bytes for entry in entries)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return sum(kind.itemsize * torch.Size(entry.shape).numel() for entry in entries)


def free_on(device: torch.device) -> int:
    """Bytes that are free on a device; on the processor, what `free_memory` says."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
