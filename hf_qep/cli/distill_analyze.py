"""The work of `hf-qep distill analyze`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_qep.cli.distill_job import ANALYSIS, Job
from hf_qep.cli.distill_opened import Opened, open_new
from hf_qep.distill.samples import TaskData
from hf_qep.files import write_aside
from hf_qep.progress import Progress
from hf_qep.search.additions import Aim, score_additions
from hf_qep.search.analysis import Analysis, analyse
from hf_qep.search.scoring import can_score, score
from hf_qep.students.spec import SUB_BLOCKS

SHOWN_ADDITIONS, TO_NOTHING = 5, 1e6
SEEN_ROWS = 1024
"""Most rows that a teacher is run over, evenly spaced: what its units do is known from far fewer."""


def analyze(
    job: Job, out: Path, batch_size: int, additions: bool, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Make the folder of a distillation and return what is to be shown. Nothing is left behind on an error."""
    opened = open_new(out, job)
    found = analyse(opened.teacher, _few(opened.train), batch_size=batch_size, seed=job.seed, progress=progress)
    places = []
    if additions:
        aim = Aim(opened.judge, seed=job.seed)
        whole = opened.shape.identity()
        places = score_additions(opened.teacher, whole, aim, batch_size=batch_size, progress=progress)
    scores = _scores(opened, batch_size, progress)
    with write_aside(out, overwrite=overwrite) as aside:
        # The names of the classes are settled now: a later look at other rows must not number them otherwise.
        settled = opened.train.classes if job.answers is None else None
        replace(job, classes=settled or job.classes).save(aside)
        opened.note_seen(aside)
        found.save(aside / ANALYSIS)
    return {
        "out": str(out),
        "teacher": {"parameters": opened.teacher.num_parameters(), "rows": found.rows, "tokens": found.tokens} | scores,
        "layers": layer_rows(found),
        "additions": [{"position": a.position, "source": a.source, "gain": a.gain} for a in places[:SHOWN_ADDITIONS]],
    }


def _few(data: TaskData) -> TaskData:
    if len(data) <= SEEN_ROWS:
        return data
    return data.rows(torch.linspace(0, len(data) - 1, SEEN_ROWS).round().long())


def layer_rows(found: Analysis) -> list[dict[str, Any]]:
    """One row per layer: its name, influence at the answers and at all tokens, relative size of what it adds."""
    rows = []
    for stack, influence in enumerate(found.influence):
        for number, at_answers in enumerate(influence):
            parts = found.part_influence[stack][number]
            rows.append(
                {
                    "layer": f"decoder {number}" if stack else str(number),
                    "influence": at_answers,
                    "influence_all": found.influence_all[stack][number],
                    **{part: _size(parts.get(part)) for part in SUB_BLOCKS},
                }
            )
    return rows


def _size(value: float | None) -> float | None:
    """None for what is added to nothing: the decoder of a detector begins with zeros."""
    return None if value is None or value > TO_NOTHING else value


def _scores(opened: Opened, batch_size: int, progress: Progress) -> dict[str, Any]:
    """How good the teacher is at the task, behind its prompt if it has one, on rows that nothing is chosen by."""
    rows = _few(opened.test)
    if not can_score(rows):
        return {}
    summary = score(opened.asked, rows, batch_size, progress=progress).summary()
    return {name: summary[name] for name in ("scored", "nll", "accuracy", "auc", "majority") if name in summary}
