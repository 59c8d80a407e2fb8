"""Multiple-choice and cloze tasks through lm_eval (extra "eval"), on models in memory and without network.

Tool calls (hf_qep.evaluation.tool_calls) are tasks too; they are generated here, without lm_eval.

A task is named in one of three ways: `name=FILE` (a local file), `name` or `own:name` (a file of the tasks folder),
or `name` alone without such a file: a task of lm_eval itself, whose data lm_eval fetches from the Hub.
acc picks the likeliest option, acc_norm the likeliest per character of the option (lm_eval's definitions).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import nn

from hf_qep import extras
from hf_qep.errors import ConfigError, UnknownNameError
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.prompts import FORMS, LocalTask, load_task, own_tasks
from hf_qep.evaluation.retention import NEAR_CHANCE_STDERRS, Retention, paired_retention
from hf_qep.evaluation.tool_calls import CallTask, answer_calls
from hf_qep.progress import SILENT, Progress

SCORES = ("acc", "acc_norm", "exact_match")
"""Item scores that are kept; each is 0 or 1 per item."""


@dataclass(frozen=True)
class TaskMetric:
    """One score of both models on the same items."""

    name: Annotated[str, "acc, acc_norm or exact_match; of tool calls also tool_name and parsed"]
    baseline: Annotated[Estimate, "float model"]
    subject: Annotated[Estimate, "quantised model"]
    retention: Annotated[Retention, "what the quantised model retains"]


@dataclass(frozen=True)
class TaskResult:
    """One task."""

    name: Annotated[str, "task name"]
    prompt: Annotated[str, "own:<task> or lm_eval:<task>; scores of different prompts are not comparable"]
    form: Annotated[str | None, "how own prompts are made, see hf_qep.evaluation.prompts; null for lm_eval tasks"]
    num_fewshot: Annotated[int, "solved examples before each question"]
    items: Annotated[int, "items scored"]
    available: Annotated[int | None, "items of the task file; more than `items` if a limit drew a sample"]
    seed: Annotated[int, "seed of that sample"]
    chance: Annotated[float | None, "expected score of guessing; null if unknown"]
    majority: Annotated[float | None, "accuracy of always choosing the most frequent position; null if meaningless"]
    metrics: Annotated[tuple[TaskMetric, ...], "the scores"]
    note: Annotated[str | None, "what must be said beside the scores"] = None


@dataclass(frozen=True)
class Task:
    """A task to run: rendered items of a local file, or None for a task lm_eval brings."""

    name: str
    local: LocalTask | CallTask | None


@dataclass(frozen=True)
class Answers:
    """Item scores of one model on one task, in item order."""

    scores: dict[str, np.ndarray]
    chance: float | None


def find_tasks(
    names: Sequence[str], tasks_dir: Path | None = None, *, limit: int | None = None, seed: int = 0
) -> list[Task]:
    """Resolve what the user typed. Without names all files of `tasks_dir` are tasks.

    Raises ConfigError or UnknownNameError for a task that cannot be had.
    """
    files = own_tasks(tasks_dir) if tasks_dir is not None else {}
    tasks = [_find(name, files, limit, seed) for name in names or files]
    doubled = sorted({t.name for t in tasks if [u.name for u in tasks].count(t.name) > 1})
    if doubled:
        raise ConfigError(f"the task {doubled[0]!r} is named more than once; give each a name of its own")
    return tasks


def _find(text: str, files: dict[str, Path], limit: int | None, seed: int) -> Task:
    name, equals, path = text.partition("=")
    own = name.startswith("own:")
    name = name.removeprefix("own:").strip()
    if not name:
        raise ConfigError(f"the task {text!r} has no name; give NAME=FILE or NAME")
    if equals:
        return Task(name, load_task(name, Path(path), limit=limit, seed=seed))
    if name in files:
        return Task(name, load_task(name, files[name], limit=limit, seed=seed))
    if own:
        raise UnknownNameError(f"no file for task {text!r}; give {name}=FILE or a --tasks-dir that holds it")
    return Task(name, None)


def answer_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Answers]:
    """Let one model answer `tasks`.

    limit: first items of tasks that lm_eval brings; local tasks were cut by `find_tasks`.
    max_length: longest prompt in tokens, cut from the left; default: the model's longest input.
    Raises ConfigError for solved examples with a local file: it holds test items only, none to show.
    """
    if num_fewshot and (local := [task.name for task in tasks if task.local]):
        raise ConfigError(f"num_fewshot={num_fewshot} is not possible with the task file {local[0]!r}; use 0")
    called = {
        task.name: Answers(answer_calls(model, tokenizer, task.local, progress=progress), task.local.chance)
        for task in tasks
        if isinstance(task.local, CallTask)
    }
    tasks = [task for task in tasks if task.name not in called]
    if not tasks:
        return called
    lm_eval = extras.require("eval", "lm_eval")
    huggingface = extras.require("eval", "lm_eval.models.huggingface")
    manager, configs = _task_manager(tasks, num_fewshot)
    with _hushed(not progress.visible):
        lm = huggingface.HFLM(
            pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size, max_length=max_length
        )
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=configs,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=None if all(task.local for task in tasks) else limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    by_name = {task.name: task for task in tasks}
    return called | {name: _answers(name, rows, by_name.get(name)) for name, rows in results["samples"].items()}


def _task_manager(tasks: Sequence[Task], num_fewshot: int) -> tuple[Any, list[Any]]:
    managers = extras.require("eval", "lm_eval.tasks")
    builtin = [task.name for task in tasks if task.local is None]
    manager = managers.TaskManager(include_defaults=bool(builtin))  # listing lm_eval's own tasks takes 8 s
    for name in builtin:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UnknownNameError(f"lm_eval has no task `{name}` and no file was given for it (NAME=FILE){hint}")
    return manager, [task.name if task.local is None else _lm_eval_config(task.local) for task in tasks]


def _lm_eval_config(task: LocalTask) -> dict[str, Any]:
    form = FORMS[task.form]
    rows = [{"contexts": list(i.contexts), "continuations": list(i.continuations), "gold": i.gold} for i in task.items]

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": extras.require("eval", "datasets").Dataset.from_list(rows)}

    names = ("acc", "acc_norm") if form.kind == "choice" else ("acc",)
    config = {
        "task": task.name,
        "custom_dataset": dataset,
        "test_split": "test",
        "target_delimiter": form.delimiter,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
        "metadata": {"version": 1},
    }
    if form.kind == "cloze":
        return config | {"output_type": "loglikelihood", "doc_to_text": _context, "doc_to_target": _continuation}
    if form.kind == "choice":
        fields = {"doc_to_text": _context, "doc_to_choice": _continuations, "doc_to_target": _gold}
    else:  # lm_eval compares contexts when doc_to_text gives a number
        fields = {"doc_to_text": _gold, "doc_to_choice": _contexts, "doc_to_target": _continuation}
    return config | {"output_type": "multiple_choice"} | fields


def _context(doc: dict[str, Any]) -> str:
    return doc["contexts"][0]


def _contexts(doc: dict[str, Any]) -> list[str]:
    return doc["contexts"]


def _continuation(doc: dict[str, Any]) -> str:
    return doc["continuations"][0]


def _continuations(doc: dict[str, Any]) -> list[str]:
    return doc["continuations"]


def _gold(doc: dict[str, Any]) -> int:
    return doc["gold"]


def _answers(name: str, rows: list[dict[str, Any]], task: Task | None) -> Answers:
    rows = sorted(rows, key=lambda row: row["doc_id"])
    scores = {key: np.array([float(row[key]) for row in rows]) for key in SCORES if key in rows[0]}
    if not scores:
        raise ConfigError(f"the task {name!r} has none of the item scores {', '.join(SCORES)}; choose another task")
    if task is not None and task.local is not None:
        return Answers(scores, task.local.chance)
    options = [len(row["resps"]) for row in rows]
    is_choice = "acc" in scores and min(options) > 1
    return Answers(scores, sum(1 / n for n in options) / len(options) if is_choice else None)


def compare_answers(
    tasks: Sequence[Task],
    baseline: dict[str, Answers],
    subject: dict[str, Answers],
    *,
    num_fewshot: int = 0,
    seed: int = 0,
) -> tuple[TaskResult, ...]:
    """Put the answers of both models side by side."""
    local = {task.name: task.local for task in tasks}
    return tuple(
        _result(name, local.get(name), theirs, subject[name], num_fewshot, seed) for name, theirs in baseline.items()
    )


def _result(
    name: str, local: LocalTask | CallTask | None, baseline: Answers, subject: Answers, num_fewshot: int, seed: int
) -> TaskResult:
    metrics = tuple(
        TaskMetric(key, *paired_retention(scores, subject.scores[key], baseline.chance))
        for key, scores in baseline.scores.items()
    )
    return TaskResult(
        name=name,
        prompt=local.prompt if local else f"lm_eval:{name}",
        form=local.form if local else None,
        num_fewshot=num_fewshot,
        items=metrics[0].baseline.n,
        available=local.rows_in_file if local else None,
        seed=seed,
        chance=baseline.chance,
        majority=local.majority if local else None,
        metrics=metrics,
        note=_majority_note(metrics, local),
    )


def _majority_note(metrics: Sequence[TaskMetric], local: LocalTask | CallTask | None) -> str | None:
    if local is None or local.majority is None:
        return None
    weak = [
        m.name for m in metrics if m.baseline.value - NEAR_CHANCE_STDERRS * (m.baseline.stderr or 0) < local.majority
    ]
    if not weak:
        return None
    return (
        f"always choosing the most frequent position gives {local.majority:.3f}, and the float model is not "
        f"{NEAR_CHANCE_STDERRS:g} standard errors above that in {' and '.join(weak)}"
    )


@contextlib.contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """Keep lm_eval's log and progress bars away while it runs."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            yield
    finally:
        log.setLevel(level)
