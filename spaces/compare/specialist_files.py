"""Specialists of the settings: found, checked, loaded; or the sentence that says why not.

The folder of a specialist is a student of hf_qep with its tokenizer, and beside its weights:

    specialist.json       {"kind": "deals", "question": ..., "answers": [" no", " yes"], "teacher": ...,
                          "teacher_prompt": "teacher_prompt.txt"}
    teacher_prompt.txt    what the teacher alone reads before every row; without the key it reads nothing
    records.json          how a row is written as text (hf_qep.distill.records.RecordText)
    examples.json         [{"row": {column: value}, "outcome": true}, ...]

or, of a student that embeds images:

    specialist.json       {"kind": "glyphs", "image_size": S, "names": [n names], "teacher": ...,
                          "support": "support.safetensors", "centred": true}
    support.safetensors   `images`, (n, S, S) in [0, 1] with ink 1; drawings to try, if any, as `queries`, (m, S, S)

With `centred` a visitor's drawing is moved so that its ink is in the middle, as all the models' drawings were.
`teacher` is a Hub id, pinned by `teacher_revision`, or of a folder here the name of one beside it. Both models run on
the processor in float32, and no code of theirs is run: the classes of students come with hf_qep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import texts
import torch
from models import WORKING_ROOM, explain, free_bytes, human_bytes, shown_name, stored_bytes
from safetensors.torch import load_file
from settings import Settings
from specialists import STUDENT, TEACHER, Deals, Glyphs, Party

from hf_qep.distill.prompted import PromptedTeacher, prompt_tokens
from hf_qep.distill.records import RecordText
from hf_qep.engine.headers import check_links, read_json
from hf_qep.engine.source import (
    licence_of,
    load_float_model,
    load_processor,
    load_quantized,
    resolve_model,
    snapshot_revision,
)
from hf_qep.errors import CheckpointError
from hf_qep.files import listed_models

DEALS, GLYPHS = "deals", "glyphs"
DESCRIPTION, RECORDS, EXAMPLES = "specialist.json", "records.json", "examples.json"
_PLAIN = re.compile(r"[A-Za-z0-9_-][\w.-]*", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", re.ASCII)
_WIDENED = 2
"""Weights are mostly stored in two bytes, and run in four here."""


@dataclass(frozen=True)
class Offered:
    """A specialist of the settings. specialist: None where it cannot be had; problem then says why."""

    name: str
    specialist: Deals | Glyphs | None = None
    problem: str = ""


def load_specialists(settings: Settings) -> tuple[Offered, ...]:
    """All specialists of the settings. Nothing is raised for one that cannot be had: the page says so instead."""
    return tuple(_offered(name, revision) for name, revision in listed_models(settings.specialists))


def _offered(name: str, revision: str | None) -> Offered:
    shown = shown_name(name)
    try:
        return Offered(shown, _load(name, revision))
    except Exception as error:  # whatever it is, the page stands and tells it
        return Offered(shown, None, explain(error, shown))


def _load(name: str, revision: str | None) -> Deals | Glyphs:
    folder = resolve_model(name, revision)
    check_links(folder)
    facts = read_json(_inside(folder, DESCRIPTION))
    kinds, kind = {DEALS: _deals, GLYPHS: _glyphs}, str(facts.get("kind"))
    if kind not in kinds:
        raise CheckpointError(f"the file {DESCRIPTION} says the kind {kind!r}; it must be {' or '.join(kinds)}")
    student, note = _party(STUDENT, name, folder, kind), ""
    try:
        parties = (_teacher(folder, facts, local=Path(name).is_dir()), student)
    except Exception as error:  # the specialist can be tried alone
        parties = (student,)
        note = f"{texts.NO_TEACHER} {explain(error, shown_name(str(facts.get('teacher'))))}"
    found = kinds[kind](folder, facts, parties, note)
    # The first pass is slow and reads the teacher's prompt. It also shows that the two can be asked at all.
    found.ask(found.examples[0][0] if isinstance(found, Deals) else found.queries[0])
    return found


def _deals(folder: Path, facts: Mapping[str, Any], parties: tuple[Party, ...], note: str) -> Deals:
    answers = facts.get("answers")
    if not (isinstance(answers, list) and len(answers) == 2 and all(isinstance(one, str) for one in answers)):
        raise CheckpointError(f"`answers` of {DESCRIPTION} must be two texts, not {answers!r}")
    records = RecordText.load(_inside(folder, RECORDS))
    try:
        listed = json.loads(_inside(folder, EXAMPLES).read_bytes())
        examples = tuple(_example(item, records, answers) for item in listed)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"the file {EXAMPLES} must be a list of objects with `row` and `outcome`: {error}"
        ) from error
    if not examples:
        raise CheckpointError(f"the file {EXAMPLES} has no example")
    return Deals(parties, note, str(facts.get("question") or ""), tuple(answers), records, examples)


def _example(item: Any, records: RecordText, answers: list[str]) -> tuple[dict[str, Any], str]:
    """Row and outcome. An outcome that is true is the second answer; a row may lie flat beside its outcome."""
    row, outcome = item.get("row", item), item.get("outcome")
    records.text(row)
    said = answers[outcome] if isinstance(outcome, bool) else outcome
    return {column.column: row[column.column] for column in records.columns}, str(said or "").strip()


def _glyphs(folder: Path, facts: Mapping[str, Any], parties: tuple[Party, ...], note: str) -> Glyphs:
    tensors = load_file(_inside(folder, str(facts.get("support"))))
    side, names, images = facts.get("image_size"), facts.get("names"), tensors.get("images")
    shape = None if images is None else tuple(images.shape)
    if shape is None or len(shape) != 3 or shape[1:] != (side, side) or not shape[0]:
        raise CheckpointError(f"the support glyphs must be `images` of (n, {side}, {side}), not {shape}")
    if not isinstance(names, list) or len(names) != len(images):
        raise CheckpointError(f"`names` of {DESCRIPTION} must be a list of {len(images)} names, one for each glyph")
    queries = tensors.get("queries", images)
    if queries.ndim != 3 or queries.shape[1:] != images.shape[1:] or not len(queries):
        raise CheckpointError(f"`queries` must be of (m, {side}, {side}), not {tuple(queries.shape)}")
    images, queries = (part.float().clamp(0, 1) for part in (images, queries))
    return Glyphs(parties, note, tuple(map(str, names)), images, queries, facts.get("centred") is True)


def _party(who: str, name: str, folder: Path, kind: str) -> Party:
    """A model, packed or float, with what reads its inputs."""
    check_links(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        model, processor = load_quantized(folder, dtype=torch.float32), load_processor(folder)
    else:
        model, processor = load_float_model(folder, dtype=torch.float32)
    if kind == DEALS and not hasattr(processor, "decode"):
        raise CheckpointError(f"{shown_name(name)!r} has no tokenizer; add its files to the folder")
    size, licence = model.num_parameters(), licence_of(folder)
    return Party(who, shown_name(name), snapshot_revision(folder), licence, model, processor, size)


def _teacher(folder: Path, facts: Mapping[str, Any], *, local: bool) -> Party:
    name, revision = facts.get("teacher"), facts.get("teacher_revision")
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise CheckpointError(f"the file {DESCRIPTION} names no teacher")
    if local and _PLAIN.fullmatch(name):
        name = str(folder.resolve().parent / name)
        if not Path(name).is_dir():
            raise CheckpointError(
                f"there is no folder {Path(name).name!r} beside the specialist, where its teacher lies"
            )
    elif not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"the teacher {name!r} is neither a Hub id nor the name of a folder beside the specialist"
        )
    needed, free = int(stored_bytes(name, revision) * _WIDENED * WORKING_ROOM), free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise CheckpointError(texts.NO_ROOM_HERE.format(needed=human_bytes(needed), free=human_bytes(free)))
    party = _party(TEACHER, name, resolve_model(name, revision), facts["kind"])
    if facts.get("teacher_prompt") is None:
        return party
    prompt = _inside(folder, str(facts["teacher_prompt"])).read_bytes().decode("utf-8")
    return replace(party, model=PromptedTeacher(party.model, prompt_tokens(party.processor, prompt)).eval())


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder itself. Raises CheckpointError if it is not there."""
    if not _PLAIN.fullmatch(name) or not (folder / name).is_file():
        raise CheckpointError(f"the file {name!r} is missing, which a specialist needs")
    return folder / name
