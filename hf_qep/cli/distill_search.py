"""The work of `hf-qep distill search`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_qep.cli.distill_job import SEARCH, Opened
from hf_qep.distill.samples import CAUSAL_LM
from hf_qep.errors import ConfigError
from hf_qep.files import canonical_json, write_text_aside
from hf_qep.progress import Progress
from hf_qep.search.costs import Choice, Cost
from hf_qep.search.limits import Limits, Workload
from hf_qep.search.results import SearchResult
from hf_qep.search.run import SearchPlan, cost_model, measure, run_search
from hf_qep.search.space import SearchSpace
from hf_qep.search.study import StudyOptions
from hf_qep.search.workload import bench_for
from hf_qep.students.vocabulary import used_tokens

TEACHER_COST = "teacher.json"
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Wishes:
    """What was asked for: fields of Limits, Workload, SearchSpace.around, StudyOptions and ProxyContext, by group."""

    limits: dict[str, float | None]
    workload: dict[str, Any]
    space: dict[str, Any]
    options: dict[str, Any]
    proxy: dict[str, Any]
    climbers: int
    trim_vocabulary: bool
    storage: str | None


def search(opened: Opened, wishes: Wishes, progress: Progress) -> tuple[SearchResult, Cost]:
    """Search, and measure the teacher under the same work."""
    limits = Limits(**wishes.limits)
    if not limits.given():
        raise ConfigError(
            "without a limit the teacher is the best student; give --latency-ms, --memory-mb, --parameters"
        )
    space = space_for(opened, wishes)
    workload = Workload(**wishes.workload, device=opened.job.device)
    plan = SearchPlan(
        workload, limits, StudyOptions(**wishes.options), climbers=wishes.climbers, storage=wishes.storage
    )
    context = opened.context(**wishes.proxy)
    result = run_search(context, space, plan, opened.folder / SEARCH, progress=progress)
    teacher = Choice(opened.shape.identity())
    cost = measure(
        bench_for(opened.teacher, context.fit, workload), [teacher], cost_model(context, space, workload, None)
    )[teacher.key()]
    write_text_aside(opened.folder / SEARCH / TEACHER_COST, canonical_json(cost.to_dict()))
    return result, cost


def space_for(opened: Opened, wishes: Wishes) -> SearchSpace:
    """The search space that was asked for."""
    vocabularies: tuple[tuple[int, ...] | None, ...] = (None,)
    if wishes.trim_vocabulary:
        if "input_ids" not in opened.train.inputs:
            raise ConfigError(f"{opened.job.task} reads no tokens, so there is no vocabulary to trim")
        ids = [part.inputs["input_ids"] for part in (opened.train, opened.judge, opened.test)]
        if opened.job.task == CAUSAL_LM:
            ids += [part.labels for part in (opened.train, opened.judge, opened.test)]
        kept = used_tokens(opened.processor, ids, multiple=VOCABULARY_MULTIPLE)
        vocabularies = (kept,)
    return SearchSpace.around(opened.shape, vocabularies=vocabularies, **wishes.space)
