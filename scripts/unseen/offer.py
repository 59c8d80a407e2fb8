"""A student beside its teacher, as the Space `spaces/compare` shows them: a visitor draws a glyph.

The folder of the student is complete: `distillation.json` and the card are as `hf-qep distill` writes them, so that
`hf-qep distill report`, `hf-qep push` and `hf-qep verify` take it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hf_qep.cli.distill_report import write_facts
from hf_qep.distill.pictures import centred
from hf_qep.files import write_aside, write_text_aside
from hf_qep.hub.cards.distilled import write_student_card
from hf_qep.progress import SILENT, Progress
from hf_qep.students.saving import FILE_NAME as NOTE
from unseen.evidence import evidence
from unseen.glyphs import Run
from unseen.material import load_material
from unseen.pipeline import STUDENT, Job
from unseen.pipeline import TEACHER as KEPT

GLYPHS, TEACHER = "glyphs", "glyphs-teacher"
SUPPORT, DESCRIPTION = "support.safetensors", "specialist.json"
WORDS = "recognising a handwritten character from one drawing of each that it can be, also of alphabets it never saw"


def offer(job: Job, results: Mapping[str, Any], folder: Path, *, progress: Progress = SILENT) -> Path:
    """Write `folder`/glyphs with the student, `folder`/glyphs-teacher, and return the former.

    job: of the characters, run to its end. results: what it found. The first official run gives the glyphs to tell
    apart and the drawings to try.
    """
    material = load_material(job.preset, job.data)
    with write_aside(folder / TEACHER, overwrite=True) as aside:
        shutil.copytree(job.folder / KEPT, aside, dirs_exist_ok=True)
    with write_aside(folder / GLYPHS, overwrite=True) as aside:
        shutil.copytree(job.folder / STUDENT, aside, dirs_exist_ok=True)
        _name_teacher(aside / NOTE)
        write_facts(aside, evidence(job, results, material, TEACHER, progress=progress), job.folder / KEPT)
        _describe(aside, material.runs[0])
        write_student_card(aside, repo_id=GLYPHS, specialised_for=WORDS)
    return folder / GLYPHS


def _name_teacher(note: Path) -> None:
    """Let a student name its teacher by the folder that lies beside it."""
    found = json.loads(note.read_text(encoding="utf-8")) | {"teacher": TEACHER}
    write_text_aside(note, json.dumps(found, indent=2, sort_keys=True) + "\n")


def _describe(folder: Path, run: Run) -> None:
    """What the Space needs besides the model."""
    pictures = {"images": centred(run.support)[:, 0], "queries": centred(run.queries)[:, 0]}
    save_file({name: part.clamp(0, 1).contiguous() for name, part in pictures.items()}, folder / SUPPORT)
    facts = {
        "kind": "glyphs",
        "image_size": run.support.shape[-1],
        "names": [f"character {number + 1}" for number in range(len(run.support))],
        "teacher": TEACHER,
        "support": SUPPORT,
        "centred": True,
    }
    write_text_aside(folder / DESCRIPTION, json.dumps(facts, indent=1) + "\n")
