"""The work of `hf-qep distill search`."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from hf_qep.cli.distill_job import SEARCH
from hf_qep.cli.distill_opened import Opened
from hf_qep.distill.samples import CAUSAL_LM
from hf_qep.errors import ConfigError
from hf_qep.files import canonical_json, write_text_aside
from hf_qep.progress import Progress
from hf_qep.search.costs import Choice, Cost
from hf_qep.search.limits import Limits, Workload
from hf_qep.search.results import SearchResult
from hf_qep.search.run import SearchPlan, cost_model, ladder_of, measure, run_search
from hf_qep.search.space import SearchSpace
from hf_qep.search.study import StudyOptions
from hf_qep.search.workload import bench_for
from hf_qep.students.vocabulary import used_tokens

TEACHER_COST = "teacher.json"
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Wishes:
    """What was asked for: fields of Limits, Workload, SearchSpace.around, StudyOptions and ProxyContext, by group.

    proxy_steps: of the last rung of the ladder. climbers, storage: as in SearchPlan. again: forget the search of the
    folder.
    """

    limits: dict[str, float | None]
    workload: dict[str, Any]
    space: dict[str, Any]
    options: dict[str, Any]
    proxy: dict[str, Any]
    proxy_steps: int
    climbers: int
    trim_vocabulary: bool
    storage: str | None
    again: bool = False


def search(opened: Opened, wishes: Wishes, progress: Progress) -> tuple[SearchResult, Cost]:
    """Search, and measure the teacher under the same work.

    What was measured in the folder serves searches under other limits too. Raises ConfigError without a limit, and for
    work that the teacher cannot do.
    """
    limits = Limits(**wishes.limits)
    if not limits.given():
        raise ConfigError(
            "without a limit the teacher is the best student; give --latency-ms, --memory-mb or --parameters"
        )
    space = space_for(opened, wishes)
    workload = Workload(**wishes.workload, device=opened.job.device)
    _check_positions(opened, workload)
    options = StudyOptions(**wishes.options, name=_study_name(limits, wishes.options))
    plan = SearchPlan(
        workload,
        limits,
        options,
        ladder=ladder_of(wishes.proxy_steps),
        climbers=wishes.climbers,
        storage=wishes.storage,
    )
    context, folder = opened.context(**wishes.proxy), opened.folder / SEARCH
    if wishes.again:
        shutil.rmtree(folder, ignore_errors=True)
    result = run_search(context, space, plan, folder, progress=progress)
    teacher, bench = Choice(opened.shape.identity()), bench_for(opened.teacher, context.fit, workload)
    cost = measure(bench, [teacher], cost_model(context, space, workload, None))[teacher.key()]
    write_text_aside(folder / TEACHER_COST, canonical_json(cost.to_dict()))
    return result, cost


def _study_name(limits: Limits, options: dict[str, Any]) -> str:
    """One study for each set of limits, which may have any number of trials."""
    own = canonical_json({"limits": limits.to_dict()} | {name: options[name] for name in ("sampler", "seed")})
    return f"search-{hashlib.sha256(own.encode()).hexdigest()[:8]}"


def _check_positions(opened: Opened, workload: Workload) -> None:
    most = getattr(opened.teacher.config, "max_position_embeddings", None)
    asked = workload.sequence + workload.context
    if "input_ids" in opened.train.inputs and most is not None and asked > most:
        raise ConfigError(
            f"the teacher has {most} positions, and the work has {asked}; give a smaller --sequence or --context"
        )


def space_for(opened: Opened, wishes: Wishes) -> SearchSpace:
    """The search space that was asked for."""
    vocabularies: tuple[tuple[int, ...] | None, ...] = (None,)
    if wishes.trim_vocabulary:
        if "input_ids" not in opened.train.inputs:
            raise ConfigError(f"{opened.job.task} reads no tokens, so there is no vocabulary to trim")
        ids = [part.inputs["input_ids"] for part in opened.parts.values()]
        if opened.job.task == CAUSAL_LM:
            ids += [part.labels for part in opened.parts.values()]
            ids += [torch.tensor(opened.train.answers or [])]
        vocabularies = (used_tokens(opened.processor, ids, multiple=VOCABULARY_MULTIPLE),)
    return SearchSpace.around(opened.shape, vocabularies=vocabularies, **wishes.space)
