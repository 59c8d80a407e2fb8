"""A distillation with its teacher loaded and its rows read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.cli.distill_job import ANALYSIS, SEARCH, SEEN, Job, default_loss, public_name
from hf_qep.distill.checks import check_data
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.prompted import PromptedTeacher, prompt_tokens
from hf_qep.distill.reading import Columns, read_task
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, IMAGE_CLASSES, TEXT_CLASSES, TaskData
from hf_qep.distill.store import teacher_fingerprint
from hf_qep.engine.source import load_float_model, resolve_model
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import write_text_aside
from hf_qep.search.analysis import Analysis
from hf_qep.search.costs import Choice
from hf_qep.search.proxies import ProxyContext
from hf_qep.search.results import PICKS, SearchResult
from hf_qep.students.family import teacher_shape
from hf_qep.students.spec import CandidateSpec, TeacherShape, check_against

FIT_ROWS, JUDGE_ROWS = 8192, 1024
"""Most rows for healing and short distillations, and for judging candidates."""
LEAST_ROW = 2
"""Tokens of a row: one to read and one to answer."""
LEAST_KEY = 4
"""Digits of a key that name a student."""
AUTO_CLASSES = {
    CAUSAL_LM: "AutoModelForCausalLM",
    TEXT_CLASSES: "AutoModelForSequenceClassification",
    IMAGE_CLASSES: "AutoModelForImageClassification",
    EMBEDDING: "AutoModel",
    DETECTION: "AutoModelForObjectDetection",
}
"""Class of transformers that loads a model of a task."""


@dataclass
class Opened:
    """A job with its teacher and its rows.

    folder: where it lies. source: folder of the teacher. seen: fingerprints of the rows when they were analysed, None
    before that.
    """

    folder: Path
    job: Job
    source: Path
    teacher: PreTrainedModel
    processor: Any
    seen: dict[str, str] | None = None

    @cached_property
    def shape(self) -> TeacherShape:
        """Sizes of the teacher."""
        return teacher_shape(self.teacher)

    @cached_property
    def prompt_ids(self) -> Tensor | None:
        """Tokens of the prompt, (tokens,) int64, with the one that begins a text where there is one; None without.

        Raises ConfigError for a prompt that leaves no room for rows.
        """
        if self.job.prompt is None:
            return None
        ids = prompt_tokens(self._reader(), self.job.prompt)
        room = getattr(self.teacher.config, "max_position_embeddings", None)
        if room is not None and len(ids) + LEAST_ROW > room:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, and the teacher has room for {room}, of which a row needs at least "
                f"{LEAST_ROW}; shorten it"
            )
        return ids

    @cached_property
    def asked(self) -> PreTrainedModel | PromptedTeacher:
        """The teacher as it is asked and measured: behind its prompt if it has one. Raises as `prompt_ids` does."""
        return self.teacher if self.prompt_ids is None else PromptedTeacher(self.teacher, self.prompt_ids)

    def prompt_facts(self) -> dict[str, Any] | None:
        """What others may know of the prompt: how many tokens it has, and the SHA-256 of its UTF-8 text."""
        if self.prompt_ids is None:
            return None
        return {"tokens": len(self.prompt_ids), "sha256": hashlib.sha256(self.job.prompt.encode()).hexdigest()}

    @cached_property
    def parts(self) -> dict[str, TaskData]:
        """Rows to learn from (`train`), to judge candidates and epochs by (`judge`), and that decide nothing (`test`).

        Raises ConfigError where they do not fit the teacher, or are not those that were analysed.
        """
        job = self.job
        rows = self._read(job.data, job.classes or self._class_names())
        if job.test is not None:
            # Classes of an embedding are only told apart, so those of the test may be others.
            test = self._read(job.test, job.classes if job.task == EMBEDDING else rows.classes)
        else:
            rows, test = rows.split(job.held_out, job.seed)
        if job.task == EMBEDDING:
            # The nearness to prototypes of classes is not asked for here, so labels teach and judge nothing.
            rows = replace(rows, labels=None, classes=None)
        train, judge = rows.split(job.held_out, job.seed + 1)
        found = {"train": train, "judge": judge, "test": test}
        for name, part in found.items():
            check_data(part, self.teacher)
            if self.seen is not None and self.seen.get(name) != part.fingerprint():
                raise ConfigError(
                    f"the rows of {public_name(job.data)!r} are not those that were analysed; analyse them again"
                )
        return found

    def _read(self, source: str, classes: tuple[str, ...] | None) -> TaskData:
        job, reader = self.job, self._reader()
        longest = getattr(self.teacher.config, "max_position_embeddings", None) or job.max_length
        longest -= 0 if self.prompt_ids is None else len(self.prompt_ids)
        options: dict[str, Any] = {"answers": job.answers, "limit": job.limit, "seed": job.seed}
        options["columns"] = Columns(job.text, job.template, job.label, job.image, job.objects)
        options["max_length"] = min(job.max_length, longest)
        return read_task(source, job.task, reader, classes=classes if job.answers is None else None, **options)

    def _reader(self) -> Any:
        if self.processor is None:
            raise ConfigError(
                f"{self.job.teacher!r} has no tokenizer or image processor, so rows cannot be read for it"
            )
        return self.processor

    def _class_names(self) -> tuple[str, ...] | None:
        """Names of a classifier's outputs, where they are more than numbers."""
        if self.job.task in (CAUSAL_LM, EMBEDDING):
            return None
        names = self.teacher.config.id2label
        ordered = tuple(names[k] for k in sorted(names))
        return None if all(name == f"LABEL_{k}" for k, name in enumerate(ordered)) else ordered

    @property
    def train(self) -> TaskData:
        """Rows to learn from."""
        return self.parts["train"]

    @property
    def judge(self) -> TaskData:
        """Rows by which candidates and epochs are judged."""
        return self.parts["judge"]

    @property
    def test(self) -> TaskData:
        """Rows that decide nothing."""
        return self.parts["test"]

    def note_seen(self, folder: Path) -> None:
        """Write seen.json."""
        found = {"teacher": teacher_fingerprint(self.teacher)}
        found |= {name: part.fingerprint() for name, part in self.parts.items()}
        write_text_aside(folder / SEEN, json.dumps(found, indent=2) + "\n")

    def analysis(self) -> Analysis:
        """The analysis of the folder."""
        return Analysis.load(self.folder / ANALYSIS, self.shape)

    def context(self, loss: DistillLoss | None = None, *, judge_rows: int = JUDGE_ROWS, **options: Any) -> ProxyContext:
        """What proxies share. judge_rows: most rows that candidates are judged by. options: further fields."""
        fit, judge = (part.rows(slice(0, most)) for part, most in ((self.train, FIT_ROWS), (self.judge, judge_rows)))
        return ProxyContext(
            self.teacher, self.analysis(), fit, judge, loss=loss or default_loss(self.job.task), **options
        )

    def chosen(self, pick: str, spec: Path | None) -> Choice:
        """A student: of a file, or of the search by rule or by the beginning of its key.

        Raises ConfigError or CheckpointError if there is none, or it cannot be cut from this teacher.
        """
        if spec is not None:
            choice = _read_choice(spec)
            check_against(choice.spec, self.shape)
            return choice
        result = SearchResult.read(self.folder / SEARCH)
        if pick in PICKS:
            return result.pick(pick).choice
        named = [c.choice for c in result.finalists() if len(pick) >= LEAST_KEY and c.choice.key().startswith(pick)]
        whole = [choice for choice in named if choice.key() == pick]
        if len({choice.spec for choice in whole or named}) != 1:
            raise ConfigError(
                f"pick one of {', '.join(PICKS)}, or the first {LEAST_KEY} or more digits of one student's key in the "
                f"report, not {pick!r}"
            )
        return (whole or named)[0]


def _read_choice(path: Path) -> Choice:
    """A student of a file: a specification, or a line of candidates.jsonl or student.json that holds one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Choice(CandidateSpec.from_dict(values.get("spec", values)), values.get("bits"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is no specification of a student: {error}") from error


def open_job(folder: Path) -> Opened:
    """Load the teacher of a folder. Raises what loading raises, and ConfigError for a teacher that has changed."""
    opened = open_new(folder, Job.load(folder))
    try:
        opened.seen = json.loads((folder / SEEN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(folder / SEEN)!r} cannot be read ({error}); analyse the teacher again") from error
    if opened.seen.get("teacher") != teacher_fingerprint(opened.teacher):
        raise ConfigError(f"the teacher {opened.job.teacher!r} has changed since it was analysed; analyse it again")
    return opened


def open_new(folder: Path, job: Job) -> Opened:
    """Load the teacher of a job. Raises what loading raises, and ConfigError for one without the head of the task."""
    source = resolve_model(job.teacher, job.revision)
    teacher, processor = load_float_model(source, dtype=torch.float32, device=job.device)
    check_head(teacher, job.task, job.teacher)
    return Opened(folder, job, source, teacher, processor)


def check_head(model: PreTrainedModel, task: str, name: str) -> None:
    """Raise ConfigError unless a model has the head of a task."""
    auto = AUTO_CLASSES[task]
    mapping = getattr(transformers, auto)._model_mapping
    kinds = [mapping[kind] for kind in type(model.config).__mro__ if kind in mapping]
    classes = tuple(c for kind in kinds for c in (kind if isinstance(kind, tuple | list) else [kind]))
    projects = task == EMBEDDING and type(model).__name__.endswith("WithProjection")
    if not projects and not isinstance(model, classes):
        raise ConfigError(
            f"{name!r} is a {type(model).__name__}, which has not the head of {task}; give a model that {auto} loads"
        )
