"""The folder of a distillation: which teacher, which rows, and what was found so far.

job.json    what was asked for, so that later commands need not be told again
analysis/   what each layer and unit of the teacher does for the task
search/     the search and its result
teacher/    what the teacher says about the rows to learn from
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_qep.distill.checks import check_data
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.reading import Columns, read_task
from hf_qep.distill.samples import EMBEDDING, TaskData
from hf_qep.engine.source import load_float_model, resolve_model
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import write_text_aside
from hf_qep.search.analysis import Analysis
from hf_qep.search.proxies import ProxyContext
from hf_qep.search.results import SearchResult
from hf_qep.students.family import teacher_shape
from hf_qep.students.spec import CandidateSpec, TeacherShape

JOB, ANALYSIS, SEARCH, TEACHER = "job.json", "analysis", "search", "teacher"
FIT_ROWS, JUDGE_ROWS = 1024, 1024
"""Most rows for healing and short distillations, and for judging candidates."""


@dataclass(frozen=True)
class Job:
    """What was asked for. data, test: sources of rows (`reading.read_rows`); without `test` a share `held_out` of the
    rows is kept for it. A second share judges candidates and epochs. limit: most rows that are read of each source."""

    teacher: str
    task: str
    data: str
    revision: str | None = None
    test: str | None = None
    template: str | None = None
    text: str | None = None
    label: str | None = None
    image: str = "image"
    classes: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    max_length: int = 512
    limit: int | None = None
    held_out: float = 0.15
    seed: int = 0
    device: str = "cpu"

    def save(self, folder: Path) -> None:
        """Write job.json."""
        write_text_aside(folder / JOB, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read job.json. Raises CheckpointError if the folder is none of a distillation."""
        try:
            values = json.loads((folder / JOB).read_text(encoding="utf-8"))
            for name in ("classes", "answers"):
                values[name] = None if values[name] is None else tuple(values[name])
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{str(folder)!r} is not the folder of a distillation ({error}); make it with hf-qep distill analyze"
            ) from error


@dataclass
class Opened:
    """A job with its teacher and its rows. folder: where it lies. source: folder of the teacher."""

    folder: Path
    job: Job
    source: Path
    teacher: PreTrainedModel
    processor: Any

    @cached_property
    def shape(self) -> TeacherShape:
        """Sizes of the teacher."""
        return teacher_shape(self.teacher)

    @cached_property
    def _split(self) -> tuple[TaskData, TaskData, TaskData]:
        job = self.job
        rows = self._read(job.data, job.limit)
        if job.test is not None:
            test = self._read(job.test, job.limit)
        else:
            rows, test = rows.split(job.held_out, job.seed)
        train, judge = rows.split(job.held_out, job.seed + 1)
        for part in (train, judge, test):
            check_data(part, self.teacher)
        return train, judge, test

    def _read(self, source: str, limit: int | None) -> TaskData:
        job = self.job
        columns = Columns(job.text, job.template, job.label, job.image)
        if self.processor is None:
            raise ConfigError(f"{job.teacher!r} has no tokenizer or image processor, so rows cannot be read for it")
        options = {"classes": job.classes or self._class_names(), "answers": job.answers, "max_length": job.max_length}
        return read_task(source, job.task, self.processor, columns=columns, limit=limit, seed=job.seed, **options)

    def _class_names(self) -> tuple[str, ...] | None:
        """Names of a classifier's outputs, where they are more than numbers."""
        names = getattr(self.teacher.config, "id2label", None) or {}
        ordered = tuple(names[k] for k in sorted(names))
        return None if all(name == f"LABEL_{k}" for k, name in enumerate(ordered)) else ordered

    @property
    def train(self) -> TaskData:
        """Rows to learn from."""
        return self._split[0]

    @property
    def judge(self) -> TaskData:
        """Rows by which candidates and epochs are judged."""
        return self._split[1]

    @property
    def test(self) -> TaskData:
        """Rows that decide nothing."""
        return self._split[2]

    def analysis(self) -> Analysis:
        """The analysis of the folder."""
        return Analysis.load(self.folder / ANALYSIS, self.shape)

    def context(self, loss: DistillLoss | None = None, **options: Any) -> ProxyContext:
        """What proxies share. options: further fields of ProxyContext."""
        fit, judge = (part.rows(slice(0, most)) for part, most in ((self.train, FIT_ROWS), (self.judge, JUDGE_ROWS)))
        return ProxyContext(
            self.teacher, self.analysis(), fit, judge, loss=loss or default_loss(self.job.task), **options
        )

    def chosen(self, pick: str, spec: Path | None) -> CandidateSpec:
        """A specification: of a file, or of the search by rule or by the beginning of its key.

        Raises ConfigError or CheckpointError if there is none.
        """
        if spec is not None:
            try:
                values = json.loads(spec.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{str(spec)!r} is no specification of a student: {error}") from error
            return CandidateSpec.from_dict(values.get("spec", values))
        result = SearchResult.read(self.folder / SEARCH)
        matches = [c for c in result.finalists() if len(pick) >= 4 and c.choice.key().startswith(pick)]
        return (matches[0] if len(matches) == 1 else result.pick(pick)).choice.spec


def default_loss(task: str) -> DistillLoss:
    """Half labels, half teacher; an embedding learns from the teacher alone."""
    return DistillLoss(alpha=0.0, relation=0.5) if task == EMBEDDING else DistillLoss()


def open_job(folder: Path) -> Opened:
    """Load the teacher of a folder. Raises what loading raises."""
    return open_new(folder, Job.load(folder))


def open_new(folder: Path, job: Job) -> Opened:
    """Load the teacher of a job."""
    if not 0 < job.held_out < 0.5:
        raise ConfigError(f"the share of rows that is held out must be above 0 and below 0.5, not {job.held_out}")
    source = resolve_model(job.teacher, job.revision)
    teacher, processor = load_float_model(source, dtype=torch.float32, device=job.device)
    return Opened(folder, job, source, teacher, processor)
