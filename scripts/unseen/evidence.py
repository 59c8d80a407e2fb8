"""What the card of our student says: measured by the package, on characters that no student saw.

The official runs compare methods. A card states what anybody with the rows can measure again by the package alone, as
`hf-qep distill train` does: one-shot recognition over all drawings of alphabets that the teacher knows and no student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hf_qep.cli.distill_measured import BEFORE, SCORE_BATCH, Measured, beside, latencies, measured
from hf_qep.distill.pictures import centred
from hf_qep.distill.said import take_said
from hf_qep.distill.samples import EMBEDDING, TaskData
from hf_qep.distill.student_trainer import TrainReport
from hf_qep.progress import SILENT, Progress
from hf_qep.search.scoring import score_said
from hf_qep.students.family import teacher_shape
from hf_qep.students.saving import describe_changes, load_student
from unseen.glyphs import Glyphs
from unseen.lessons import Lesson
from unseen.material import Material
from unseen.methods import OURS, bank_loss, schedule
from unseen.pipeline import STUDENT, TEACHER, Job, lesson_path
from unseen.shrink import START, Shrunk, start_of

SEED = 0
"""Of the student that is kept."""


def rows_of(glyphs: Glyphs) -> TaskData:
    """Drawings as a model sees them, with the numbers of their characters."""
    return TaskData(EMBEDDING, {"pixel_values": centred(glyphs.images)}, glyphs.labels, glyphs.characters)


def evidence(
    job: Job, results: Mapping[str, Any], material: Material, teacher_name: str, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Facts of our student of the first seed as `hf_qep.cli.distill_report.write_facts` takes them.

    results: of `run_task` for the characters. teacher_name: what the teacher is published as.
    """
    teacher, test, plan = load_student(job.folder / TEACHER), rows_of(material.unseen), job.preset.student
    spec, shape = Shrunk.from_dict(results["shrunk"]).spec, teacher_shape(teacher)
    lesson = Lesson.load(lesson_path(job, SEED))
    report = TrainReport(plan.steps, None, None, None, results["units"][OURS][str(SEED)]["seconds"])
    return {
        "task": EMBEDDING,
        "teacher": teacher_name,
        "data": _named(job, material.seen),
        "test": f"{_named(job, material.unseen)} (known to the teacher)",
        "prompt": None,
        "start": teacher_name,
        "rows": {"train": len(lesson.pixels), "test": len(test)},
        **_compared(job, teacher, test, progress),
        "spec": spec.key(),
        "bits": None,
        "changes": describe_changes(spec, shape),
        "loss": bank_loss(plan).to_dict(),
        "schedule": schedule(plan, SEED) | {"prototypes": len(lesson.bank)},
        "calibration": None,
        "training": asdict(report),
    }


def _compared(job: Job, teacher: Any, test: TaskData, progress: Progress) -> dict[str, Any]:
    """Teacher and student, before it learned where it was kept, on the same questions."""
    said = take_said(teacher, test, batch_size=SCORE_BATCH, progress=progress)
    found: dict[str, Measured] = {"teacher": measured(teacher, test, None, progress, score_said(said, test))}
    if (job.folder / START).is_dir():
        found[BEFORE] = measured(start_of(job.folder), test, said, progress)
    student = load_student(job.folder / STUDENT)
    found["student"] = measured(student, test, said, progress)
    times = latencies({"teacher": (teacher, test), "student": (student, test)}, teacher_shape(teacher))
    return beside(found, times)


def _named(job: Job, glyphs: Glyphs) -> str:
    return f"{'invented characters' if job.preset.invented else 'Omniglot'}, {', '.join(glyphs.alphabets)}"
