"""Cards of distilled students: a small model that learned one thing from a large one.

The facts come from whoever distils, as a dict with the fields of `StudentFacts`; unknown and missing ones are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from hf_qep.errors import CardError
from hf_qep.evaluation import schema
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.retention import Retention
from hf_qep.hub.base import BaseFacts
from hf_qep.hub.cards.escape import HUB, Markdown, block, bullets, code, hub_link, is_repo_id, table, words
from hf_qep.hub.cards.lint import TAG
from hf_qep.hub.cards.metadata import licence_gate
from hf_qep.hub.cards.numbers import NOT_MEASURED, estimate, interval, percent, shown, size
from hf_qep.hub.licences import decide

_SMALLER = 1.05
"""A ratio below this is not called smaller."""


@dataclass(frozen=True)
class StudentTask:
    """One task, answered by all models on the same items."""

    name: Annotated[str, "task name"]
    metric: Annotated[str, "what the scores are"]
    chance: Annotated[float | None, "score of guessing, or of the commonest answer; null if unknown"]
    teacher: Annotated[Estimate, "score of the teacher, 0 to 1"]
    start: Annotated[Estimate | None, "score of the student before it was taught; null if not measured"]
    student: Annotated[Estimate, "score of the student"]
    retention: Annotated[Retention, "what the student has of the teacher's score"]
    scored: Annotated[str | None, "what an item asks, in words; null: its class"] = None


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
class TeacherPrompt:
    """A prompt that the teacher read before every item, and the student never did."""

    tokens: Annotated[int, "tokens of the teacher"]
    sha256: Annotated[str, "SHA-256 of its UTF-8 text, 64 digits"]


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
    changes: Annotated[dict[str, str], "what was removed from the teacher and added to it -> how much"]
    latency_ms: Annotated[dict[str, float], "teacher, student -> median milliseconds of one item; empty: not measured"]
    command: Annotated[str | None, "what was typed; null if called as a library"]
    seed: Annotated[int, "seed of the training"]
    seconds: Annotated[float | None, "wall time of the training"]
    versions: Annotated[dict[str, str], "package -> version"]
    languages: Annotated[tuple[str, ...], "codes of the languages of the transfer data"]
    remote_code: Annotated[bool, "whether it carries modeling_student.py, since no stock class can load it"] = False
    prompt: Annotated[TeacherPrompt | None, "what the teacher read before every item; null: nothing"] = None

    @classmethod
    def from_dict(cls, values: Any) -> StudentFacts:
        """Validate and build.

        Raises CardError for a missing, unknown or malformed field, sizes that are not positive, a prompt without tokens
        or digest, or without a task.
        """
        try:
            facts = schema.from_json(cls, values, "student")
        except schema.SchemaError as error:
            raise CardError(f"the facts of the student are malformed: {error}") from error
        if not facts.tasks:
            raise CardError("the student was not scored on any task, so its card can promise nothing; score it first")
        if not re.fullmatch(r"[A-Z][A-Za-z]+", facts.auto_class, re.ASCII):
            raise CardError(f"auto_class is {facts.auto_class!r}; it must be a class of transformers")
        sizes = [n for model in (facts.teacher, facts.start, facts.student) for n in (model.parameters, model.bytes)]
        if min(sizes) < 1:
            raise CardError("a model of no weights or no bytes cannot be compared; the facts of the student are wrong")
        if (prompt := facts.prompt) and (prompt.tokens < 1 or not re.fullmatch("[0-9a-f]{64}", prompt.sha256)):
            raise CardError(f"the teacher's prompt is no number of tokens with a SHA-256: {prompt}")
        return facts


def base_names(facts: StudentFacts) -> list[str]:
    """Hub id of what the student is a finetune of: its first weights, or the teacher where only that is on the Hub."""
    return [name for model in (facts.start, facts.teacher) if (name := _on_hub(model.name))][:1]


def student_metadata(facts: StudentFacts, base: BaseFacts | None = None) -> Any:
    """The `ModelCardData` of a student; a distilled student is to the Hub a finetune of its first weights.

    base: facts of those weights, for the gate.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_name=task.name,
            dataset_type=_on_hub(task.name.partition(":")[0]) or "local",
            metric_type=task.metric,
            metric_value=task.student.value,
            metric_name=", ".join(filter(None, (task.metric, task.scored, f"{task.student.n} items"))),
        )
        for task in facts.tasks
    ]
    on_hub = [name for data in facts.transfer if (name := _on_hub(data.name))]
    licence = facts.start.licence
    bases = base_names(facts)
    more: dict[str, Any] = {"base_model_relation": "finetune"} if bases else {}
    if licence == "other" and bases:
        more["license_link"] = f"{HUB}/{bases[0]}"
    return ModelCardData(
        base_model=bases[0] if bases else None,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        language=list(facts.languages) or None,
        license=licence,
        tags=[TAG, "distillation", "student", "safetensors"],
        datasets=list(dict.fromkeys(on_hub)) or None,
        eval_results=results,
        model_name=facts.name,
        **more,
        **licence_gate(base or BaseFacts(), decide(licence)),
    )


def student_context(facts: StudentFacts) -> dict[str, Any]:
    """What the template of a student puts in."""
    teacher, student = facts.teacher, facts.student
    smaller = _smaller(facts)
    return {
        "title": facts.name,
        "facts": facts,
        "teacher": _model_link(teacher),
        "start": _model_link(facts.start),
        "same_start": facts.start.name == teacher.name,
        "smaller": smaller,
        "saves_disk": teacher.bytes / student.bytes > _SMALLER,
        "sizes": table(
            ["", "weights", "weight files", "licence"],
            [
                ["teacher", shown(teacher.parameters), size(teacher.bytes), teacher.licence or "unknown"],
                ["this student", shown(student.parameters), size(student.bytes), facts.start.licence or "unknown"],
            ],
            numbers=(1, 2),
        ),
        "scores": Markdown("\n\n".join(_scores(t, facts.others if not i else ()) for i, t in enumerate(facts.tasks))),
        "remarks": bullets(_remarks(facts)) if _remarks(facts) else "",
        "changes": table(["what", "how much"], [[name, text] for name, text in facts.changes.items()]),
        "speed": table(
            ["", "ms for one item"], [[who, shown(ms)] for who, ms in facts.latency_ms.items()], numbers=(1,)
        ),
        "transfer": table(
            ["transfer data", "examples", "learned from"],
            [[_data_link(d.name), shown(d.examples), d.labels] for d in facts.transfer],
            numbers=(1,),
        ),
        "prompt": _prompt(facts.prompt) if facts.prompt else "",
        "snippet": _snippet(facts),
        "command": block(facts.command, "bash") if facts.command else Markdown("The command was not recorded."),
        "seconds": shown(facts.seconds) + " s" if facts.seconds is not None else NOT_MEASURED,
        "versions": table(["package", "version"], [[code(n), v] for n, v in facts.versions.items()]),
        "decisions": list(dict.fromkeys([decide(teacher.licence).reason, decide(facts.start.licence).reason])),
    }


def _prompt(prompt: TeacherPrompt) -> Markdown:
    """That the teacher was told more than the student is."""
    how = "The teacher read a prompt of {tokens} before every item (sha256 {digest}); the student reads none."
    tokens = f"{prompt.tokens} token{'s' if prompt.tokens > 1 else ''}"
    return words(how, tokens=tokens, digest=code(prompt.sha256))


def _smaller(facts: StudentFacts) -> Markdown:
    """How much smaller than the teacher it is, in weights and in bytes: they differ where the dtypes do."""
    teacher, student = facts.teacher, facts.student
    pairs = (
        (teacher.parameters / student.parameters, "{} times fewer weights", "no fewer weights"),
        (teacher.bytes / student.bytes, "{} times smaller weight files", "weight files no smaller"),
    )
    fewer, smaller = (how.format(shown(ratio)) if ratio > _SMALLER else otherwise for ratio, how, otherwise in pairs)
    return words("{fewer} and {smaller}", fewer=fewer, smaller=smaller)


def _scores(task: StudentTask, others: tuple[OtherModel, ...]) -> Markdown:
    """All models on the items of one task, one row each."""
    nothing = ["", ""]
    kept = [interval(task.retention.raw), interval(task.retention.corrected)]
    rows = [
        ["teacher", shown(task.teacher.n), _score(task.teacher), *nothing],
        ["student, before it was taught", shown(task.start.n) if task.start else "", _score(task.start), *nothing],
        *([other.name, shown(other.score.n), _score(other.score), *nothing] for other in others),
        [Markdown("**this student**"), shown(task.student.n), _score(task.student), *kept],
    ]
    chance = f"; chance: {percent(task.chance)}" if task.chance is not None else ""
    asked = f"; {task.scored}" if task.scored else ""
    head = words("{task}, {metric} in %{asked}{chance}", task=task.name, metric=task.metric, asked=asked, chance=chance)
    return table([head, "items", "score", "of the teacher's", "of it above chance"], rows, numbers=range(1, 5))


def _remarks(facts: StudentFacts) -> list[Markdown]:
    """What a reader of the scores should not miss."""
    first, found = facts.tasks[0], []
    rivals = [(other.name, other.score) for other in facts.others]
    if first.start is not None:
        rivals.append(("the student before it was taught", first.start))
    for name, score in rivals:
        if score.value >= first.student.value:
            found.append(words("No worse than this student: {name}.", name=name))
    guessing = "On {task} it may be guessing: it is not two standard errors above chance."
    unknown = "On {task} what is kept above chance cannot be computed: the teacher is too near to it."
    for task in facts.tasks:
        score = task.student
        if task.chance is None:
            continue
        if score.value - task.chance <= 2 * (score.stderr or 0.0):
            found.append(words(guessing, task=task.name))
        if task.retention.corrected is None:
            found.append(words(unknown, task=task.name))
    return found


def _snippet(facts: StudentFacts) -> Markdown:
    """How to load it; where its layers are not those of a stock class, with this package or with its own code."""
    name, kind = json.dumps(facts.name, ensure_ascii=False), facts.auto_class
    if not facts.remote_code:
        return block(f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({name})", "python")
    return block(
        f"import hf_qep  # pip install hf-qep; it knows the classes of students\nfrom transformers import {kind}\n\n"
        f"model = {kind}.from_pretrained({name})\n\n"
        "# Without hf_qep, by modeling_student.py of the repository, which is run then:\n"
        f"# model = {kind}.from_pretrained({name}, trust_remote_code=True)",
        "python",
    )


def _on_hub(name: str) -> str | None:
    """The name if it can be that of a repository with an owner."""
    return name if "/" in name and is_repo_id(name) else None


def _score(value: Estimate | None) -> str:
    return estimate(value, factor=100)


def _model_link(model: StudentModel) -> Markdown:
    return hub_link(model.name, model.revision) if "/" in model.name else code(model.name)


def _data_link(name: str) -> Markdown:
    return hub_link(name, kind="datasets") if _on_hub(name) else code(name)
