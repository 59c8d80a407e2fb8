"""GGUF files that lie beside a checkpoint: published only if they hold that very model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hf_qep.errors import QepError
from hf_qep.export.gguf_file import check_gguf
from hf_qep.hub.allowed import kind_of


def gguf_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """A sentence for each GGUF file among `names` that is not the checkpoint in `folder`, or cannot be compared."""
    problems = []
    for name in names:
        if kind_of(name) != "gguf":
            continue
        try:
            differs = check_gguf(folder / name, folder).differs
        except QepError as error:
            problems.append(f"{name!r} cannot be compared with the checkpoint: {error}")
            continue
        if differs:
            problems.append(f"{name!r} is not this checkpoint: {differs[0]}; write it again with: hf-qep export gguf")
    return problems
