"""The detection half, on the teacher and the characters of the recognition half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_qep.distill.pictures import centred
from hf_qep.progress import SILENT, Progress
from unseen import detect as detector
from unseen import strokes
from unseen.lessons import Lesson
from unseen.material import load_material
from unseen.pipeline import LESSONS, Job, kept_teacher
from unseen.vit import embed

PART = "detection"
OTHERS = 1000
"""Invented drawings of no class: every method learns boxes from them."""


def detect(job: Job, folder: Path, *, workers: int = 2, progress: Progress = SILENT) -> tuple[dict[str, Any], str]:
    """Results as a JSON value, and the table. job: of the recognition half; its teacher and its bank are used."""
    torch.set_num_threads(1)
    material, teacher = load_material(job.preset, job.data), kept_teacher(job, job.made(), progress)
    make = torch.Generator().manual_seed(1)
    other = strokes.drawn(strokes.invent(min(OTHERS, job.preset.student.bank), make), make, job.preset.side)
    bank = Lesson.load(job.folder / LESSONS / "0.safetensors").bank

    def look(images: Tensor) -> Tensor:
        return embed(teacher, centred(images))

    results = detector.run_detection(
        detector.Material(material.seen, material.unseen, other),
        look,
        bank,
        preset="quick" if job.preset.name == "quick" else "default",
        folder=folder,
        workers=workers,
        progress=progress,
    )
    return results | {"summary": detector.summary(results)}, detector.table(results) + "\n"
