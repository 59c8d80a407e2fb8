"""From `distillation.json`, what a training has found, to the card of its student; every number of the card is there.

The file is read as untrusted input: what a card shows of it is checked field by field by `StudentFacts`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import read_json
from hf_qep.errors import CardError, OutputExistsError
from hf_qep.files import write_text_aside
from hf_qep.hub.allowed import DISTILLATION, STUDENT_CODE
from hf_qep.hub.base import read_metadata
from hf_qep.hub.cards.card import CARD, is_generated, render_student_card
from hf_qep.hub.cards.escape import inline, is_repo_id

TEACHER, BEFORE, SUBJECT = "teacher", "student, before", "student"
"""Names in `models`; those of others are shown as they are."""
_EMBEDDING = "image-embedding"
_PIPELINES = {"causal-lm": "text-generation", _EMBEDDING: "image-feature-extraction"}
_NOT_FOR = "anything that is unlike the rows it learned from"
_WORDS = "qwordsofthepublisherq"
"""In the place of what the publisher says the student is for; stands in no template."""


def write_student_card(
    folder: Path, *, repo_id: str | None = None, specialised_for: str | None = None, overwrite: bool = False
) -> Path:
    """Write README.md of a student from its `distillation.json`.

    Raises CheckpointError if that cannot be read, CardError if it does not give a card, and OutputExistsError for a
    card that was changed by hand, unless `overwrite`.
    """
    target = folder / CARD
    if target.exists() and not overwrite and not is_generated(target.read_text(encoding="utf-8", errors="replace")):
        raise OutputExistsError(f"{str(target)!r} was written or changed by hand; move it away, or pass --overwrite")
    values = student_values(
        read_json(folder / DISTILLATION),
        repo_id or folder.resolve().name,
        specialised_for=specialised_for,
        remote_code=(folder / STUDENT_CODE).is_file(),
    )
    write_text_aside(target, render_student_card(values))
    return target


def student_values(
    found: dict[str, Any], name: str, *, specialised_for: str | None = None, remote_code: bool = False
) -> dict[str, Any]:
    """Fields of `StudentFacts`. found: content of distillation.json. name: of the student, OWNER/NAME on the Hub.

    Raises CardError if something is missing that a card needs, and for a task without a score by items.
    """
    try:
        return _values(found, name, specialised_for, remote_code)
    except (KeyError, TypeError, AttributeError) as error:
        raise CardError(f"{DISTILLATION!r} lacks what a card needs ({error}); train the student again") from error


def rendered_again(card: str, found: dict[str, Any], *, remote_code: bool) -> str:
    """What the card should be: written again from distillation.json, with the name and the words of `card`.

    Raises CardError if there can be none, or the words of `card` are not such as a card could hold.
    """
    words = re.search(r"^\* You need exactly this: (.*)\.$", card, re.MULTILINE)
    shown = words[1] if words else ""
    if not shown or inline(re.sub(r"\\(.)", r"\1", shown)) != shown:
        raise CardError("it does not say what the student is for in plain words")
    values = student_values(found, named_in(card), specialised_for=_WORDS, remote_code=remote_code)
    # Not a render of the unescaped words: the seal is over the text, so it is compared without.
    return unsealed(render_student_card(values)).replace(_WORDS, shown)


def unsealed(card: str) -> str:
    """A card without the digest in its last line."""
    return re.sub(r"<!-- written by hf-qep;[^\n]*-->\n\Z", "", card)


def named_in(card: str) -> str:
    """The name of the student in the results of a card, "" without one. Raises CardError for broken metadata."""
    index = read_metadata(card).get("model-index")
    first = index[0] if isinstance(index, list) and index else None
    name = first.get("name") if isinstance(first, dict) else None
    return name if isinstance(name, str) else ""


def _values(found: dict[str, Any], name: str, specialised_for: str | None, remote_code: bool) -> dict[str, Any]:
    models, made = found["models"], found["made_of"]
    if not models[SUBJECT]["score"]:
        more = "; give its test labels, two rows of a class at least" if found["task"] == _EMBEDDING else ""
        raise CardError(
            f"a student of {found['task']} has no score by items, and a card without one promises nothing{more}"
        )
    data = _data_name(found["data"])
    times = {who: models[who]["latency_ms"] for who in (TEACHER, SUBJECT)}
    return {
        "name": name,
        "made_by": name.partition("/")[0] if "/" in name else None,
        "pipeline_tag": _PIPELINES.get(found["task"], found["task"]),
        "auto_class": made["auto_class"],
        "remote_code": remote_code,
        "specialised_for": specialised_for or f"the task of {data}",
        "not_for": _NOT_FOR,
        "teacher": _party(found, TEACHER),
        "start": start_of(found),
        "student": _party(found, SUBJECT) | {"name": name},
        "transfer": [{"name": data, "examples": found["rows"]["train"], "labels": _taught_by(found)}],
        "tasks": [
            {
                "name": found.get("test") or found["data"],
                "metric": "accuracy",
                "chance": models[SUBJECT]["score"]["majority"],
                "teacher": _accuracy(models[TEACHER]),
                "start": _accuracy(models[BEFORE]) if BEFORE in models else None,
                "student": _accuracy(models[SUBJECT]),
                "retention": found["retention"],
                "scored": models[SUBJECT]["score"].get("scored"),
            }
        ],
        "others": [
            {"name": who, "score": _accuracy(other)}
            for who, other in models.items()
            if who not in (TEACHER, BEFORE, SUBJECT)
        ],
        "changes": {change: _text(change, how) for change, how in found["changes"].items()},
        "latency_ms": {} if None in times.values() else times,
        "command": found.get("command"),
        "seed": found["seed"],
        "seconds": found["training"]["seconds"],
        "versions": found["versions"],
        "languages": [],
        "prompt": found.get("prompt"),
    }


def start_of(found: dict[str, Any]) -> dict[str, Any]:
    """The first weights: those of the teacher, or of `start`, whose licence is unknown unless `made_of` gives it."""
    teacher, made = _party(found, TEACHER), found["made_of"]
    if found["start"] == found["teacher"]:
        return teacher
    more = {"name": found["start"], "revision": made.get("start_revision"), "licence": made.get("start_licence")}
    return _party(found, BEFORE) | more


def _party(found: dict[str, Any], who: str) -> dict[str, Any]:
    """A `StudentModel`."""
    made, teacher = found["made_of"], who == TEACHER
    return {
        "name": found["teacher"],
        "revision": made["revision"] if teacher else None,
        "parameters": found["models"][who]["parameters"],
        "bytes": made["teacher_bytes" if teacher else "student_bytes"],
        "licence": made["licence"],
    }


def _accuracy(model: dict[str, Any]) -> dict[str, Any]:
    """An `Estimate`."""
    score = model["score"]
    return {"value": score["accuracy"], "stderr": score["accuracy_stderr"], "n": score["answers"]}


def _data_name(data: str) -> str:
    """The Hub id of id:config:split, any other name as it is."""
    name = data.partition(":")[0]
    return name if "/" in name and is_repo_id(name) else data


def _taught_by(found: dict[str, Any]) -> str:
    """What a student learned from, in words. An embedding's relations are those between embeddings."""
    loss, embeds = found["loss"], found["task"] == _EMBEDDING
    parts = ["given labels"] if loss["alpha"] > 0 else []
    parts += [f"the teacher's {'embeddings' if embeds else 'probabilities'}"] if loss["alpha"] < 1 else []
    parts += ["the teacher's hidden states"] if loss["hidden"] > 0 or (loss["relation"] > 0 and not embeds) else []
    return " and ".join(parts)


def _text(change: str, how: Any) -> str:
    """A change in words. Layers that are gone are numbers, which could be read as a count."""
    if isinstance(how, list):
        return f"{how[0]} before, {how[1]} now"
    numbers = "numbers" if "," in str(how) else "number"
    return f"{numbers} {how}" if "removed" in change else str(how)
