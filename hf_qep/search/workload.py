"""The step that a student's costs are those of: what it is given, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hf_qep.distill.samples import CAUSAL_LM, TaskData
from hf_qep.errors import ConfigError
from hf_qep.search.latency import Bench, forward
from hf_qep.search.limits import Workload
from hf_qep.students.materialize import blank_student
from hf_qep.students.spec import CandidateSpec


def bench_for(teacher: PreTrainedModel, data: TaskData, workload: Workload, *, repeats: int = 7) -> Bench:
    """How students of a teacher are timed under a workload.

    A step runs forward over `sequence` tokens of each row, behind a cache of `context` tokens if there are any (one
    token behind a context is a step of decoding), or over images of the size of the rows. Raises ConfigError for a
    context of a model that does not generate.
    """
    if workload.context and data.task != CAUSAL_LM:
        raise ConfigError(f"the workload has a context of {workload.context} tokens, and {data.task} keeps no cache")

    def build(spec: CandidateSpec) -> nn.Module:
        dtype = getattr(torch, workload.dtype)
        return blank_student(teacher, spec, device=workload.device, dtype=dtype)

    def inputs(spec: CandidateSpec) -> dict[str, Tensor]:
        return example(data, workload, teacher, spec)

    step = CachedStep(workload.context) if workload.context else forward
    return Bench(build, inputs, step, repeats=repeats, threads=workload.threads)


def example(data: TaskData, workload: Workload, teacher: PreTrainedModel, spec: CandidateSpec) -> dict[str, Tensor]:
    """Inputs of one step, like the rows of the task but of the workload's size; tokens are drawn at random."""
    if "input_ids" not in data.inputs:
        rows = {name: value[:1].expand(workload.batch, *value.shape[1:]) for name, value in data.inputs.items()}
        dtype = getattr(torch, workload.dtype)
        return {name: (v.to(dtype) if v.is_floating_point() else v).to(workload.device) for name, v in rows.items()}
    most = teacher.config.vocab_size if spec.vocabulary is None else len(spec.vocabulary)
    ids = torch.randint(most, (workload.batch, workload.sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(workload.device)}


@dataclass
class CachedStep:
    """Tokens behind a context, whose keys and values are computed once per model."""

    context: int
    _caches: WeakKeyDictionary[nn.Module, Any] = field(default_factory=WeakKeyDictionary, repr=False)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Run the step and take what it added off the cache."""
        ids = inputs["input_ids"]
        if model not in self._caches:
            filled = model(input_ids=ids[:, :1].expand(-1, self.context).contiguous(), use_cache=True)
            self._caches[model] = filled.past_key_values
        cache = self._caches[model]
        model(**inputs, past_key_values=cache, use_cache=True)
        cache.crop(-ids.shape[1])


@torch.no_grad()
def peak_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """Most bytes of tensors alive at once while `step` runs, the model's own included.

    On a GPU what its allocator says; elsewhere every storage that an operation returns is counted until it is freed.
    What a library allocates inside an operation is not seen.
    """
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    device = next((t.device for t in _tensors(model)), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with _Storages(set(owned)) as seen:
        step()
    return sum(owned.values()) + seen.peak


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return [*model.parameters(), *model.buffers()]


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that are alive; `peak` is the most there were."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known, self._alive, self.peak = known, {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place not in self._known and storage.nbytes():
                    self._alive[place] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {place: pair for place, pair in self._alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
