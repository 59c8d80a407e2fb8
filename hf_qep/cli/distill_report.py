"""What a training has found, in a file beside the student, and the card that is written from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import write_text_aside
from hf_qep.search.costs import Cost
from hf_qep.search.results import SearchResult

if TYPE_CHECKING:
    from hf_qep.cli.distill_job import Opened

FACTS = "distillation.json"


def is_student(folder: Path) -> bool:
    """Whether a folder holds a student that was trained."""
    return (folder / FACTS).is_file()


def read_search(folder: Path) -> tuple[SearchResult, Cost]:
    """The search of a folder, and the teacher's costs. Raises CheckpointError if there was none."""
    from hf_qep.cli.distill_job import SEARCH
    from hf_qep.cli.distill_search import TEACHER_COST

    result = SearchResult.read(folder / SEARCH)
    return result, Cost.from_dict(json.loads((folder / SEARCH / TEACHER_COST).read_text(encoding="utf-8")))


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_facts` wrote. Raises CheckpointError."""
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(folder / FACTS)!r} cannot be read: {error}") from error


def write_facts(path: Path, facts: dict[str, Any], opened: Opened) -> None:
    """Write what was found, with what a card needs to know of the teacher besides."""
    from hf_qep.engine.manifest import versions
    from hf_qep.engine.source import licence_of, snapshot_revision

    weights = sum(p.stat().st_size for p in opened.source.glob("*.safetensors"))
    more = {
        "made_of": {
            "revision": snapshot_revision(opened.source),
            "licence": licence_of(opened.source),
            "teacher_bytes": weights,
            "student_bytes": sum(p.stat().st_size for p in path.parent.glob("*.safetensors")),
            "auto_class": auto_class(opened.job.task),
        },
        "seed": facts["schedule"]["seed"],
        "versions": versions(),
    }
    write_text_aside(path, json.dumps(facts | more, indent=1, ensure_ascii=False) + "\n")


def auto_class(task: str) -> str:
    """Class of transformers that loads a model of a task."""
    return {
        "causal-lm": "AutoModelForCausalLM",
        "text-classification": "AutoModelForSequenceClassification",
        "image-classification": "AutoModelForImageClassification",
        "image-embedding": "AutoModel",
        "object-detection": "AutoModelForObjectDetection",
    }[task]


PIPELINES = {"causal-lm": "text-generation", "image-embedding": "image-feature-extraction"}


def write_student_card(
    folder: Path, facts: dict[str, Any], repo_id: str | None, specialised_for: str | None, *, overwrite: bool
) -> Path:
    """Write README.md of a student. Raises CardError, and OutputExistsError for a card that was changed by hand."""
    from hf_qep.errors import OutputExistsError
    from hf_qep.hub.cards.card import is_generated, render_student_card

    target = folder / "README.md"
    if target.exists() and not overwrite and not is_generated(target.read_text(encoding="utf-8")):
        raise OutputExistsError(f"{str(target)!r} was written or changed by hand; move it away, or pass --overwrite")
    write_text_aside(target, render_student_card(card_values(folder, facts, repo_id, specialised_for)))
    return target


def card_values(
    folder: Path, facts: dict[str, Any], repo_id: str | None, specialised_for: str | None
) -> dict[str, Any]:
    """Fields of `StudentFacts`. Raises ConfigError for a task without a score."""
    models, made = facts["models"], facts["made_of"]
    if not models["student"]["score"]:
        raise ConfigError(
            f"a student of {facts['task']} has no score by items, and a card without one promises nothing"
        )
    n = models["student"]["score"]["answers"]

    def estimate(who: str) -> dict[str, Any]:
        found = models[who]["score"]
        return {"value": found["accuracy"], "stderr": found["accuracy_stderr"], "n": n}

    def party(name: str, who: str, size: int) -> dict[str, Any]:
        revision = made["revision"] if who == "teacher" else None
        parameters = models[who]["parameters"]
        return {"name": name, "revision": revision, "parameters": parameters, "bytes": size, "licence": made["licence"]}

    name = repo_id or folder.name
    data = facts["data"] if "/" not in facts["data"] or not Path(facts["data"]).exists() else Path(facts["data"]).name
    return {
        "name": name,
        "made_by": repo_id.partition("/")[0] if repo_id else None,
        "pipeline_tag": PIPELINES.get(facts["task"], facts["task"]),
        "auto_class": made["auto_class"],
        "specialised_for": specialised_for or f"the task of {data}",
        "not_for": "anything that is unlike the rows it learned from",
        "teacher": party(facts["teacher"], "teacher", made["teacher_bytes"]),
        "start": party(facts["start"], "teacher", made["teacher_bytes"]),
        "student": party(name, "student", made["student_bytes"]),
        "transfer": [{"name": data, "examples": facts["rows"]["train"], "labels": _taught_by(facts["loss"])}],
        "tasks": [
            {
                "name": data,
                "metric": "accuracy",
                "chance": models["student"]["score"]["majority"],
                "teacher": estimate("teacher"),
                "start": estimate("student, before"),
                "student": estimate("student"),
                "retention": facts["retention"],
            }
        ],
        "others": [
            {"name": who, "score": estimate(who)}
            for who in models
            if who not in ("teacher", "student, before", "student")
        ],
        "changes": {name: _text(change) for name, change in facts["changes"].items()},
        "latency_ms": {who: models[who]["latency_ms"] for who in ("teacher", "student")},
        "command": None,
        "seed": facts["seed"],
        "seconds": facts["training"]["seconds"],
        "versions": facts["versions"],
        "languages": [],
    }


def _taught_by(loss: dict[str, Any]) -> str:
    """What a student learned from, in words."""
    parts = ["given labels"] if loss["alpha"] > 0 else []
    parts += ["the teacher's probabilities"] if loss["alpha"] < 1 else []
    return " and ".join(parts)


def _text(change: Any) -> str:
    return f"{change[0]} before, {change[1]} now" if isinstance(change, list) else str(change)
