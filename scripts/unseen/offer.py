"""A student beside its teacher, as the Space `spaces/compare` shows them: a visitor draws a glyph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from hf_qep.distill.pictures import centred
from hf_qep.files import write_aside, write_text_aside
from unseen.glyphs import Run

GLYPHS, TEACHER = "glyphs", "glyphs-teacher"
SUPPORT, DESCRIPTION = "support.safetensors", "specialist.json"


def offer(runs: Sequence[Run], done: Path, folder: Path) -> Path:
    """Write `folder`/glyphs with the student, `folder`/glyphs-teacher, and return the former.

    runs: the first one gives the glyphs to tell apart and the drawings to try. done: folder of the task, with
    `teacher` and `student`.
    """
    run = runs[0]
    with write_aside(folder / TEACHER, overwrite=True) as aside:
        shutil.copytree(done / "teacher", aside, dirs_exist_ok=True)
    with write_aside(folder / GLYPHS, overwrite=True) as aside:
        shutil.copytree(done / "student", aside, dirs_exist_ok=True)
        pictures = {"images": centred(run.support)[:, 0], "queries": centred(run.queries)[:, 0]}
        save_file({name: part.clamp(0, 1).contiguous() for name, part in pictures.items()}, aside / SUPPORT)
        facts = {
            "kind": "glyphs",
            "image_size": run.support.shape[-1],
            "names": [f"character {number + 1}" for number in range(len(run.support))],
            "teacher": TEACHER,
            "support": SUPPORT,
            "centred": True,
        }
        write_text_aside(aside / DESCRIPTION, json.dumps(facts, indent=1) + "\n")
    return folder / GLYPHS
