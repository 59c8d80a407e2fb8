"""Two students under one budget: the usual one, the teacher shrunk alike everywhere, and the one our search finds."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.samples import EMBEDDING, TaskData
from hf_qep.errors import ConfigError
from hf_qep.files import write_text_aside
from hf_qep.progress import SILENT, Progress
from hf_qep.search.analysis import analyse
from hf_qep.search.latency import Bench
from hf_qep.search.limits import Limits, Workload
from hf_qep.search.proxies import ProxyContext
from hf_qep.search.results import ACCURATE
from hf_qep.search.run import SearchPlan, ladder_of, run_search
from hf_qep.search.space import SearchSpace
from hf_qep.search.study import StudyOptions
from hf_qep.search.workload import bench_for
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import count_parameters
from hf_qep.students.saving import load_student, save_student
from hf_qep.students.spec import CandidateSpec
from unseen.presets import SearchSizes
from unseen.vit import Size

START = "start"
"""Folder of the student that the search chose: cut and healed, not yet taught."""
NOISE = 1.03
"""What a measured latency may be above the limit, for no two rounds measure alike."""


@dataclass(frozen=True)
class Shrunk:
    """usual: sizes of the hand-made student. spec: of the searched one. costs: per model (`teacher`, `usual`, `ours`)
    `parameters` and `latency_ms` of a step of `batch` images on one thread, as measured in turn."""

    usual: Size
    spec: CandidateSpec
    costs: dict[str, dict[str, float]]
    batch: int

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return {
            "usual": self.usual.to_dict(),
            "spec": self.spec.to_dict(),
            "costs": self.costs,
            "batch": self.batch,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shrunk:
        """Inverse of `to_dict`."""
        spec = CandidateSpec.from_dict(values["spec"])
        return cls(Size(**values["usual"]), spec, values["costs"], values["batch"])


def shrink(
    teacher: Any, pixels: Tensor, sizes: SearchSizes, folder: Path, *, relation: float, progress: Progress = SILENT
) -> Shrunk:
    """Both students; the searched one lies in `folder / START` as it is before it learns. A folder that holds the
    result of such a call is read instead.

    pixels: seen images (rows, channels, side, side) in any order, of which `sizes.rows` are used.
    """
    if (folder / "shrunk.json").exists():
        return Shrunk.from_dict(json.loads((folder / "shrunk.json").read_text(encoding="utf-8")))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: sizes.rows]
    fit, judge = TaskData(EMBEDDING, {"pixel_values": pixels[order]}).split(0.25)
    bench = bench_for(teacher, fit, Workload(batch=sizes.batch, threads=1), repeats=sizes.repeats)
    whole = teacher_shape(teacher).identity()
    limits = Limits(
        latency_ms=bench.medians([whole])[0] * sizes.latency, parameters=teacher.num_parameters() * sizes.parameters
    )
    spec = searched(teacher, fit, judge, sizes, limits, folder, relation, progress)
    usual, costs = uniform(teacher, bench, spec, limits)
    found = Shrunk(size_of(usual, teacher.config.patch_size), spec, costs, sizes.batch)
    write_text_aside(folder / "shrunk.json", json.dumps(found.to_dict(), indent=2) + "\n")
    return found


def uniform(
    teacher: Any, bench: Bench, ours: CandidateSpec, limits: Limits
) -> tuple[CandidateSpec, dict[str, dict[str, float]]]:
    """The teacher shrunk alike everywhere, as wide as the budget allows, and what all of them cost.

    It keeps all layers, and each has as many heads, units and channels fewer. All are timed in turn, and the budget is
    the limits or what `ours` takes in the same rounds, whichever is more. Raises ConfigError if even the narrowest
    student is too dear.
    """
    shape = teacher_shape(teacher)
    whole, heads = shape.identity(), shape.layers[0].heads
    places = teacher.embeddings.position_embeddings.shape[1]  # each needs a channel in the beginning, see `vit`
    candidates = [_narrowed(whole, count, heads) for count in range(heads - 1, 0, -1)]
    candidates = [spec for spec in candidates if spec.hidden_size > places]
    whole_ms, ours_ms, *times = bench.medians([whole, ours, *candidates])
    costs = {"teacher": _cost(teacher, whole, whole_ms), "ours": _cost(teacher, ours, ours_ms)}
    for spec, ms in zip(candidates, times, strict=True):
        cost = _cost(teacher, spec, ms)
        if cost["parameters"] <= limits.parameters and ms <= max(limits.latency_ms, ours_ms) * NOISE:
            return spec, costs | {"usual": cost}
    raise ConfigError(
        f"no uniformly shrunk student meets {limits.latency_ms:.3g} ms and {limits.parameters:.0f} parameters"
    )


def size_of(spec: CandidateSpec, patch: int) -> Size:
    """Sizes of a student whose layers are alike."""
    layer = spec.layers[0]
    return Size(spec.hidden_size, len(spec.layers), layer.heads, layer.intermediate_size, patch)


def searched(
    teacher: Any,
    fit: TaskData,
    judge: TaskData,
    sizes: SearchSizes,
    limits: Limits,
    folder: Path,
    relation: float,
    progress: Progress,
) -> CandidateSpec:
    """What the search finds most accurate within the limits; cut and healed in `folder / START`."""
    loss = DistillLoss(alpha=0.0, relation=relation)
    analysis = analyse(teacher, fit, batch_size=64, progress=progress)
    context = ProxyContext(teacher, analysis, fit, judge, loss=loss, batch_size=sizes.batch)
    space = SearchSpace.around(teacher_shape(teacher), hidden_sizes=_widths(teacher, sizes), ffn=_step(teacher))
    plan = SearchPlan(
        Workload(batch=sizes.batch, threads=1),
        limits,
        StudyOptions(trials=sizes.trials),
        ladder=ladder_of(sizes.steps),
        climbers=sizes.climbers,
        repeats=sizes.repeats,
    )
    spec = run_search(context, space, plan, folder / "search", progress=progress).pick(ACCURATE).choice.spec
    student = context.student(spec)
    save_student(
        student, folder / START, spec=spec, teacher_name="teacher", shape=teacher_shape(teacher), overwrite=True
    )
    return spec


def start_of(folder: Path) -> Any:
    """A fresh copy of the searched student as it begins to learn."""
    return load_student(folder / START)


def _widths(teacher: Any, sizes: SearchSizes) -> tuple[int, ...]:
    return tuple(width for width in sizes.hidden if width <= teacher.config.hidden_size)


def _step(teacher: Any) -> int:
    return teacher.config.intermediate_size // 4


def _narrowed(whole: CandidateSpec, count: int, heads: int) -> CandidateSpec:
    layers = tuple(
        replace(layer, kv_heads=count, intermediate_size=layer.intermediate_size * count // heads)
        for layer in whole.layers
    )
    return replace(whole, layers=layers, hidden_size=whole.hidden_size * count // heads)


def _cost(teacher: Any, spec: CandidateSpec, ms: float) -> dict[str, float]:
    return {"parameters": sum(count_parameters(teacher, spec).values()), "latency_ms": ms}
