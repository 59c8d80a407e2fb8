"""The work of `hf-qep distill analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_qep.cli.distill_job import ANALYSIS, Job, open_new
from hf_qep.distill.samples import DETECTION, EMBEDDING
from hf_qep.files import write_aside
from hf_qep.progress import Progress
from hf_qep.search.additions import Aim, score_additions
from hf_qep.search.analysis import Analysis, analyse
from hf_qep.search.scoring import score

SHOWN_ADDITIONS = 5


def analyze(
    job: Job, out: Path, batch_size: int, additions: bool, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Make the folder of a distillation and return what is to be shown. Nothing is left behind on an error."""
    opened = open_new(out, job)
    rows = opened.train
    found = analyse(opened.teacher, rows, batch_size=batch_size, seed=job.seed, progress=progress)
    places = []
    if additions:
        aim = Aim(opened.judge, seed=job.seed)
        whole = opened.shape.identity()
        places = score_additions(opened.teacher, whole, aim, batch_size=batch_size, progress=progress)
    with write_aside(out, overwrite=overwrite) as aside:
        job.save(aside)
        found.save(aside / ANALYSIS)
    return {
        "out": str(out),
        "teacher": {"parameters": opened.teacher.num_parameters(), "rows": found.rows, "tokens": found.tokens}
        | _scores(opened, batch_size),
        "layers": layer_rows(found),
        "additions": [{"position": a.position, "source": a.source, "gain": a.gain} for a in places[:SHOWN_ADDITIONS]],
    }


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
                    "attention": parts.get("attention"),
                    "mlp": parts.get("mlp"),
                }
            )
    return rows


def _scores(opened: Any, batch_size: int) -> dict[str, Any]:
    """How good the teacher is at the task, on rows that nothing is chosen by."""
    if opened.job.task in (EMBEDDING, DETECTION):
        return {}
    summary = score(opened.teacher, opened.test, batch_size).summary()
    return {name: summary[name] for name in ("nll", "accuracy", "auc", "majority")}
