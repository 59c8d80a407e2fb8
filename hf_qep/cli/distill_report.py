"""What a search or a training has found, read from and written to its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qep.errors import CheckpointError
from hf_qep.files import write_text_aside
from hf_qep.hub.allowed import DISTILLATION as FACTS

if TYPE_CHECKING:
    from hf_qep.search.costs import Cost
    from hf_qep.search.results import SearchResult

OF_INTEREST = ("optuna", "peft", "scipy", "datasets", "accelerate")
"""Packages that a distillation depends on besides those of every checkpoint."""


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student that was trained."""
    return (folder / FACTS).is_file()


def read_search(folder: Path) -> tuple[SearchResult, Cost]:
    """The search of a folder, and the teacher's costs. Raises CheckpointError if there was none."""
    from hf_qep.cli.distill_job import SEARCH
    from hf_qep.cli.distill_search import TEACHER_COST
    from hf_qep.search.costs import Cost
    from hf_qep.search.results import SearchResult

    result = SearchResult.read(folder / SEARCH)
    return result, Cost.from_dict(_read(folder / SEARCH / TEACHER_COST))


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_facts` wrote. Raises CheckpointError."""
    return _read(folder / FACTS)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error


def write_facts(
    folder: Path,
    facts: dict[str, Any],
    teacher: Path,
    *,
    start_revision: str | None = None,
    start_licence: str | None = None,
) -> dict[str, Any]:
    """Write what was found, with what a card needs to know of the models besides, beside the files of a student.

    facts: with the `task` and the `schedule`, which has the `seed`. teacher: its folder. start_revision, start_licence:
    of the first weights, where they are not the teacher's. Returns what was written.
    """
    from hf_qep.cli.distill_opened import AUTO_CLASSES
    from hf_qep.engine.manifest import file_table
    from hf_qep.engine.source import licence_of, snapshot_revision
    from hf_qep.hub.allowed import weight_bytes

    more = {
        "made_of": {
            "revision": snapshot_revision(teacher),
            "licence": licence_of(teacher),
            "start_revision": start_revision,
            "start_licence": start_licence,
            "teacher_bytes": weight_bytes(teacher),
            "student_bytes": weight_bytes(folder),
            "auto_class": AUTO_CLASSES[facts["task"]],
        },
        "seed": facts["schedule"]["seed"],
        "versions": _versions(),
        "files": file_table(folder),
    }
    write_text_aside(folder / FACTS, json.dumps(facts | more, indent=1, ensure_ascii=False) + "\n")
    return facts | more


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from hf_qep.engine.manifest import versions

    found = versions()
    for package in OF_INTEREST:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
