"""Whether the files of a float student are what `distillation.json` says of them, and its card what that file gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import read_json
from hf_qep.errors import CardError
from hf_qep.hub.allowed import DISTILLATION, MADE_LATER, STUDENT, STUDENT_CODE, kind_of
from hf_qep.hub.listed import listed_problems

AGAIN = "run: hf-qep distill train"
CARD_COMMAND = "hf-qep distill report FOLDER --card --repo-id OWNER/NAME"


def read_student(folder: Path) -> dict[str, Any]:
    """distillation.json of a student. Raises CheckpointError if it cannot be read."""
    return read_json(folder / DISTILLATION)


def student_problems(folder: Path, files: dict[str, tuple[str, int]], card: str | None) -> list[str]:
    """What contradicts distillation.json: files, weights, sizes, student.json and the card.

    files: (sha256, size in bytes) by name, recomputed. card: None if it is not to be compared.
    Raises QepError for files that cannot be read or do not fit the configuration.
    """
    if read_json(folder / "config.json").get("quantization_config"):
        return [
            "'config.json' is that of packed weights, and only a float student is published with its card; quantise it "
            "after it was trained, with: hf-qep quantize"
        ]
    found = read_student(folder)
    problems = [*file_problems(found, files), *size_problems(folder, found, files), *note_problems(folder, found)]
    if card is not None:
        problems += card_problems(card, found, remote_code=STUDENT_CODE in files)
    return problems


def lists_files(found: dict[str, Any]) -> bool:
    """Whether distillation.json holds the digests of the files that were written with it."""
    return isinstance(found.get("files"), dict)


def file_problems(found: dict[str, Any], files: dict[str, tuple[str, int]]) -> list[str]:
    """Differences between `files` of distillation.json, if it has them, and those found."""
    if not lists_files(found):
        return []
    options = {"later": _is_later, "since": "the student was trained", "whole": "student"}
    return listed_problems(DISTILLATION, found["files"], files, **options)


def card_problems(card: str, found: dict[str, Any], *, remote_code: bool) -> list[str]:
    """A sentence that names the first line of `card` which is not what distillation.json gives."""
    from hf_qep.hub.cards.card import is_generated
    from hf_qep.hub.cards.distilled import rendered_again, unsealed

    try:
        wanted = rendered_again(card, found, remote_code=remote_code).splitlines()
    except CardError as error:
        return [f"the card is not that of this student: {error}; run: {CARD_COMMAND}"]
    lines = unsealed(card).splitlines()
    longest = max(len(lines), len(wanted))
    pairs = zip(lines + [""] * (longest - len(lines)), wanted + [""] * (longest - len(wanted)), strict=True)
    different = next((number for number, (is_, should) in enumerate(pairs, 1) if is_ != should), None)
    if different is None and is_generated(card):
        return []
    where = f"line {different}" if different else "its last line"
    return [f"the card is not what hf-qep writes from {DISTILLATION!r} (see {where}); run: {CARD_COMMAND}"]


def result_problems(card: str, found: dict[str, Any]) -> list[str]:
    """Results in the metadata of a card that are not the student's score; for cards of other versions."""
    from hf_qep.hub.base import read_metadata
    from hf_qep.hub.claims import index_values

    try:
        values = list(index_values(read_metadata(card).get("model-index")))
        score = found["models"]["student"]["score"]["accuracy"]
    except (CardError, KeyError, TypeError) as error:
        return [f"the results of the card cannot be compared with {DISTILLATION!r} ({error})"]
    return [
        f"the card gives {name!r} as {value!r}, and {DISTILLATION!r} says {score!r}"
        for _, name, value in values
        if value != score
    ]


def size_problems(folder: Path, found: dict[str, Any], files: dict[str, tuple[str, int]]) -> Iterator[str]:
    """Bytes and parameters that are stated, against those of the files and of the model that they describe."""
    size = sum(size for name, (_, size) in files.items() if kind_of(name) == "weights")
    stated = _stated(found, "made_of", "student_bytes")
    if stated != size:
        yield f"{DISTILLATION!r} says {stated!r} bytes of weight files, and there are {size}; {AGAIN}"
    stated, count = _stated(found, "models", "student", "parameters"), count_parameters(folder)
    if stated != count:
        yield f"{DISTILLATION!r} says {stated!r} parameters, and the student has {count}; {AGAIN}"


def count_parameters(folder: Path) -> int:
    """Parameters of the model that config.json describes, built without memory and without code of the folder.

    Raises CheckpointError if the files do not fit it.
    """
    from hf_qep.engine.source import check_checkpoint, described_model

    check_checkpoint(folder)
    return described_model(folder).num_parameters()


def note_problems(folder: Path, found: dict[str, Any]) -> Iterator[str]:
    """student.json was written in the same moment as distillation.json, where the student was cut from its teacher."""
    if not (folder / STUDENT).exists():
        if found.get("spec", "unknown") is not None:
            yield f"{STUDENT!r} is missing, and {DISTILLATION!r} says that the student was cut; {AGAIN}"
        return
    note = read_json(folder / STUDENT)
    stated = _stated(found, "models", "student", "parameters")
    if note.get("parameters") != stated:
        yield f"{STUDENT!r} says {note.get('parameters')!r} parameters, and {DISTILLATION!r} {stated!r}; {AGAIN}"
    names = note.get("teacher"), found.get("teacher")
    if names[0] != names[1]:
        yield f"{STUDENT!r} names the teacher {names[0]!r}, {DISTILLATION!r} {names[1]!r}; {AGAIN}"


def _stated(found: dict[str, Any], *keys: str) -> Any:
    """A value deep in a json object, None if it is not there."""
    value: Any = found
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_later(name: str) -> bool:
    """Whether a file is made from the student after distillation.json was written, or is that file."""
    return name == DISTILLATION or kind_of(name) in MADE_LATER - {"record"}
