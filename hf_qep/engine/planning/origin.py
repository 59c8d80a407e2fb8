"""Where a plan begins: the configuration of a Hub id, a folder or a config.json. No weight is read or downloaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_qep.engine.headers import INDEX_FILE, SINGLE_FILE, read_headers, read_json
from hf_qep.engine.remote.errors import explained
from hf_qep.engine.source import check_limits, check_not_quantized
from hf_qep.errors import CheckpointError

CONFIG = "config.json"
MOST_LAYERS = 10_000
"""Of a configuration whose weights are not there to be counted."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class Origin:
    """What is planned from. said: how the dtype of the files is known."""

    config: PreTrainedConfig
    dtype: torch.dtype
    said: str


def find_origin(model: str, revision: str | None = None) -> Origin:
    """The configuration of a Hub id, a folder or a config.json, and the dtype of its weight files.

    Headers of weight files are read where they lie beside the configuration; otherwise the dtype is the one that the
    configuration names. Raises CheckpointError if there is none, or it is of a kind that transformers does not know;
    AlreadyQuantizedError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / CONFIG
    elif not path.is_file():
        path = _downloaded(model, revision)
    values = read_json(path)
    check_not_quantized(values)
    check_limits(values, MOST_LAYERS)
    config = _parsed(values, model)
    folder = path.parent
    if path.name == CONFIG and any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        stored = _stored_dtype(folder)
        if stored is not None:
            return Origin(config, stored, "the headers of the weight files")
    named = config.get_text_config(decoder=True).dtype if config.dtype is None else config.dtype
    if isinstance(named, torch.dtype):
        return Origin(config, named, "the configuration")
    return Origin(config, torch.bfloat16, "no file, so bfloat16 is assumed")


def _downloaded(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(
            f"{name!r} is neither a folder, nor a config.json, nor a Hub id; give one of them, such as 'owner/name'"
        )
    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision))
    except Exception as error:  # the Hub client raises many kinds; all mean that it cannot be had
        raise explained(error, repr(CONFIG), name, revision) from error


def _parsed(values: dict[str, Any], name: str) -> PreTrainedConfig:
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"the configuration of {name!r} is of the model type {kind!r}, which this version of transformers does not "
            "know without code of the repository; models of such types cannot be planned"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(values)))
    except Exception as error:  # whatever a hostile or damaged configuration makes a class raise
        said = str(error).strip().splitlines()
        raise CheckpointError(
            f"the configuration of {name!r} cannot be read: {said[0] if said else type(error).__name__}; check it, or "
            "the version of transformers"
        ) from error


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most bytes of the weight files; None if the files that an index names are not there."""
    try:
        tensors = read_headers(folder)
    except CheckpointError:
        return None
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        sizes[entry.dtype] += entry.bytes
    return _DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None
