"""A specialist beside its teacher, as the Space `spaces/compare` shows it: folders that can be pushed as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from crm.names import STUDENT
from crm.prompts import ANSWERS
from crm.specialist import Specialist

from hf_qep.files import write_aside, write_text_aside

PROMPT, RECORDS, EXAMPLES, DESCRIPTION = "teacher_prompt.txt", "records.json", "examples.json", "specialist.json"
SHOWN = 12
"""Deals to try."""


def offer(task: Specialist, folder: Path) -> Path | None:
    """Write `folder`/<task> with the first student and what a visitor needs, and `folder`/teacher; the former's path.

    None where no student was taught.
    """
    if not task.plan.seeds.get(STUDENT):
        return None
    if not (folder / "teacher").exists():
        with write_aside(folder / "teacher") as aside:
            shutil.copytree(task.teacher, aside, dirs_exist_ok=True)
    rows = task.folder / "rows"
    out = folder / f"deals-{task.table.name}"
    test = task.table.test
    examples = [
        {"row": row, "outcome": bool(yes)} for row, yes in zip(test.rows[:SHOWN], test.yes[:SHOWN], strict=True)
    ]
    with write_aside(out, overwrite=True) as aside:
        shutil.copytree(task.folder / "student-0", aside, dirs_exist_ok=True)
        shutil.copy(rows / PROMPT, aside / PROMPT)
        shutil.copy(rows / RECORDS, aside / RECORDS)
        write_text_aside(aside / EXAMPLES, json.dumps(examples, indent=1) + "\n")
        facts = {
            "kind": "deals",
            "question": task.table.question,
            "answers": list(ANSWERS),
            "teacher": "teacher",
            "teacher_prompt": PROMPT,
        }
        write_text_aside(aside / DESCRIPTION, json.dumps(facts, indent=1) + "\n")
    return out
