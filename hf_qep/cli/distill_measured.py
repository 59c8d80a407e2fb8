"""How good and how fast the models of a report are, on rows that nothing was chosen by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_qep.accounting import bits_report
from hf_qep.distill.prompted import PromptedTeacher
from hf_qep.distill.said import Said
from hf_qep.distill.samples import TaskData
from hf_qep.evaluation.retention import paired_retention
from hf_qep.modules import packed_modules
from hf_qep.progress import Progress
from hf_qep.search.latency import Bench
from hf_qep.search.proxies import distance
from hf_qep.search.scoring import Scores, can_score, score
from hf_qep.students.spec import TeacherShape

BEFORE, LABELS_ONLY = "student, before", "student, labels only"
"""Names in a report of a student that has not learned yet, and of one that learned from the labels alone."""
SCORE_BATCH, ROUNDS = 32, 15


@dataclass(frozen=True)
class Measured:
    """scores: None for rows that cannot be scored item by item. distance: from the teacher's answers, nats per answer
    (an embedding: relative squared error). parameters: weights, however few bits hold them."""

    scores: Scores | None
    distance: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        score = {} if self.scores is None else self.scores.summary()
        return {"score": score, "distance": self.distance, "parameters": self.parameters}


def measured(
    model: PreTrainedModel | PromptedTeacher,
    test: TaskData,
    said: Said | None,
    progress: Progress,
    scores: Scores | None = None,
) -> Measured:
    """A model on some rows. said: what the teacher said about them, None for the teacher itself. scores: if known."""
    if scores is None and can_score(test):
        scores = score(model, test, SCORE_BATCH, progress=progress)
    away = 0.0 if said is None else distance(model, test, said, SCORE_BATCH)
    weights = bits_report(model)["model_weights"] if packed_modules(model) else model.num_parameters()
    return Measured(scores, away, weights)


def beside(found: dict[str, Measured], times: dict[str, float]) -> dict[str, Any]:
    """What a report says of all models as a JSON value: `models`, and the `retention` of the student.

    found: name -> measured, `teacher` and `student` among them. times: milliseconds of those that were timed.
    """
    models = {who: one.to_dict() | {"latency_ms": times.get(who)} for who, one in found.items()}
    return {"models": models, "retention": retention_of(found["student"], found["teacher"])}


def retention_of(student: Measured, teacher: Measured) -> dict[str, Any] | None:
    """What a student has of its teacher's accuracy on the same items, as a JSON value of `Retention`; None without."""
    if student.scores is None or teacher.scores is None:
        return None
    items = [one.scores.correct.float().tolist() for one in (teacher, student)]
    return asdict(paired_retention(*items, student.scores.chance)[2])


def latencies(
    models: dict[str, tuple[PreTrainedModel | PromptedTeacher, TaskData]], shape: TeacherShape
) -> dict[str, float]:
    """Median milliseconds of each model for the first of its rows, timed in turn so that a busy machine hits all alike.

    models: name -> a model and rows that it reads. A prompt is not timed: what it comes to is computed once before.
    shape: of the teacher.
    """
    builds = iter([model for model, _ in models.values()])
    rows = iter([(data.rows(slice(0, 1)).inputs, model.device) for model, data in models.values()])

    def inputs(_: Any) -> dict[str, Any]:
        values, device = next(rows)
        return {name: value.to(device) for name, value in values.items()}

    times = Bench(lambda _: next(builds), inputs, repeats=ROUNDS).medians([shape.identity()] * len(models))
    return dict(zip(models, times, strict=True))
