"""Cards of distilled students: a small model that learned one thing from a large one.

The facts come from whoever distils, as a dict with the fields of `StudentFacts`; unknown and missing ones are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from hf_qep.errors import CardError
from hf_qep.evaluation import schema
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.retention import Retention
from hf_qep.hub.base import BaseFacts
from hf_qep.hub.cards.escape import Markdown, block, code, hub_link, is_repo_id, table, words
from hf_qep.hub.cards.lint import TAG
from hf_qep.hub.cards.numbers import NOT_MEASURED, estimate, interval, percent, shown, size
from hf_qep.hub.licences import decide


@dataclass(frozen=True)
class StudentTask:
    """One task, answered by all models on the same items."""

    name: Annotated[str, "task name"]
    metric: Annotated[str, "what the scores are"]
    chance: Annotated[float | None, "expected score of guessing; null if unknown"]
    teacher: Annotated[Estimate, "score of the teacher, 0 to 1"]
    start: Annotated[Estimate | None, "score of the student before it was taught; null if not measured"]
    student: Annotated[Estimate, "score of the student"]
    retention: Annotated[Retention, "what the student has of the teacher's score"]


@dataclass(frozen=True)
class TransferData:
    """One source of the text or inputs that the student learned from."""

    name: Annotated[str, "Hub id of a data set, or a file name without its folder"]
    examples: Annotated[int, "examples that were used"]
    labels: Annotated[str, "what it learned from: the teacher's probabilities, its text, or given labels"]


@dataclass(frozen=True)
class OtherModel:
    """Another model on the same items, such as one that learned from the labels alone."""

    name: Annotated[str, "what it is, in a few words"]
    score: Annotated[Estimate, "its score, 0 to 1"]


@dataclass(frozen=True)
class StudentModel:
    """A model that takes part. bytes: of its weight files."""

    name: Annotated[str, "Hub id, or the name of its folder"]
    revision: Annotated[str | None, "commit; null for a folder"]
    parameters: Annotated[int, "weights"]
    bytes: Annotated[int, "bytes of its weight files"]
    licence: Annotated[str | None, "licence on its card; null if it names none"]


@dataclass(frozen=True)
class StudentFacts:
    """Everything a student's card states."""

    name: Annotated[str, "name of the student"]
    made_by: Annotated[str | None, "account that made it"]
    pipeline_tag: Annotated[str, "what the student does, as the Hub calls it"]
    auto_class: Annotated[str, "transformers class that loads it"]
    specialised_for: Annotated[str, "what it was taught, in a few words"]
    not_for: Annotated[str, "what it cannot do, in a few words"]
    teacher: Annotated[StudentModel, "the model it learned from"]
    start: Annotated[StudentModel, "the first weights of the student"]
    student: Annotated[StudentModel, "the student itself"]
    transfer: Annotated[tuple[TransferData, ...], "what it learned on"]
    tasks: Annotated[tuple[StudentTask, ...], "scores; at least one, on items it did not learn from"]
    others: Annotated[tuple[OtherModel, ...], "further models on the items of the first task"]
    changes: Annotated[dict[str, str], "what was removed from the first weights and added to them -> how much"]
    latency_ms: Annotated[dict[str, float], "teacher, student -> milliseconds for one item; empty if not measured"]
    command: Annotated[str | None, "what was typed; null if called as a library"]
    seed: Annotated[int, "seed of the training"]
    seconds: Annotated[float | None, "wall time of the training"]
    versions: Annotated[dict[str, str], "package -> version"]
    languages: Annotated[tuple[str, ...], "codes of the languages of the transfer data"]

    @classmethod
    def from_dict(cls, values: Any) -> StudentFacts:
        """Validate and build. Raises CardError for a missing, unknown or malformed field, or without a task."""
        try:
            facts = schema.from_json(cls, values, "student")
        except schema.SchemaError as error:
            raise CardError(f"the facts of the student are malformed: {error}") from error
        if not facts.tasks:
            raise CardError("the student was not scored on any task, so its card can promise nothing; score it first")
        return facts


def student_metadata(facts: StudentFacts, base: BaseFacts | None = None) -> Any:
    """The `ModelCardData` of a student; a distilled student is to the Hub a finetune of its first weights.

    base: facts of those weights, for the gate.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_name=task.name,
            dataset_type="text",
            metric_type=task.metric,
            metric_value=task.student.value,
            metric_name=f"{task.metric}, {task.student.n} items",
        )
        for task in facts.tasks
    ]
    on_hub = [d.name for d in facts.transfer if "/" in d.name and is_repo_id(d.name)]
    start = facts.start.name if "/" in facts.start.name and is_repo_id(facts.start.name) else None
    return ModelCardData(
        base_model=start,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        language=list(facts.languages) or None,
        license=facts.start.licence,
        tags=[TAG, "distillation", "student", "safetensors"],
        datasets=on_hub or None,
        eval_results=results,
        model_name=facts.name,
        **({"base_model_relation": "finetune"} if start else {}),
        **(base.gate_form if base else {}),
    )


def student_context(facts: StudentFacts) -> dict[str, Any]:
    """What the template of a student puts in."""
    teacher, student = facts.teacher, facts.student
    rows = [
        [
            words("{task}, {metric}, %{chance}", task=t.name, metric=t.metric,
                  chance=f", chance {percent(t.chance)}" if t.chance is not None else ""),
            shown(t.student.n), estimate(t.teacher, factor=100), _score(t.start), estimate(t.student, factor=100),
            interval(t.retention.raw), interval(t.retention.corrected),
        ]
        for t in facts.tasks
    ]  # fmt: skip
    columns = ["task", "n", "teacher", "student before", "this student", "of the teacher's", "above chance"]
    return {
        "title": facts.name,
        "facts": facts,
        "teacher": _model_link(teacher),
        "start": _model_link(facts.start),
        "sizes": table(
            ["", "weights", "weight files", "licence"],
            [
                ["teacher", shown(teacher.parameters), size(teacher.bytes), teacher.licence or "unknown"],
                ["this student", shown(student.parameters), size(student.bytes), facts.start.licence or "unknown"],
            ],
            numbers=(1, 2),
        ),
        "size_ratio": shown(teacher.bytes / student.bytes),
        "scores": table(columns, rows, numbers=range(1, len(columns))),
        "others": table(
            ["another model", "score"], [[o.name, estimate(o.score, factor=100)] for o in facts.others], numbers=(1,)
        ),
        "changes": table(["change", "how much"], [[name, text] for name, text in facts.changes.items()]),
        "speed": table(
            ["", "ms for one item"], [[who, shown(ms)] for who, ms in facts.latency_ms.items()], numbers=(1,)
        ),
        "transfer": table(
            ["transfer data", "examples", "learned from"],
            [[_data_link(d.name), shown(d.examples), d.labels] for d in facts.transfer],
            numbers=(1,),
        ),
        "snippet": block(
            f"from transformers import {facts.auto_class}\n\n"
            f"model = {facts.auto_class}.from_pretrained({json.dumps(facts.name, ensure_ascii=False)})",
            "python",
        ),
        "command": block(facts.command, "bash") if facts.command else Markdown("The command was not recorded."),
        "seconds": shown(facts.seconds) + " s" if facts.seconds is not None else NOT_MEASURED,
        "versions": table(["package", "version"], [[code(n), v] for n, v in facts.versions.items()]),
        "decisions": [decide(teacher.licence).reason, decide(facts.start.licence).reason],
    }


def _score(value: Estimate | None) -> str:
    return estimate(value, factor=100)


def _model_link(model: StudentModel) -> Markdown:
    return hub_link(model.name, model.revision) if "/" in model.name else code(model.name)


def _data_link(name: str) -> Markdown:
    return hub_link(name, kind="datasets") if "/" in name and is_repo_id(name) else code(name)
