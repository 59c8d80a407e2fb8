"""The step that a student's costs are those of: what it is given, and what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
from hf_qep.students.modeling_student import LAYOUTS
from hf_qep.students.spec import KEEP, CandidateSpec, LayerSpec, TeacherShape

FEW_TOKENS = 64
"""Tokens in the vocabulary of students whose layers alone are measured."""


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

    def inputs(spec: CandidateSpec) -> dict[str, Any]:
        return example(data, workload, teacher, spec)

    step = CachedStep(workload.context) if workload.context else forward
    return Bench(build, inputs, step, repeats=repeats, threads=workload.threads)


def example(data: TaskData, workload: Workload, teacher: PreTrainedModel, spec: CandidateSpec) -> dict[str, Any]:
    """Inputs of one step, like the rows of the task but of the workload's size; tokens are drawn at random."""
    if "input_ids" not in data.inputs:
        rows = {name: value[:1].expand(workload.batch, *value.shape[1:]) for name, value in data.inputs.items()}
        dtype = getattr(torch, workload.dtype)
        return {name: (v.to(dtype) if v.is_floating_point() else v).to(workload.device) for name, v in rows.items()}
    most = teacher.config.vocab_size if spec.vocabulary is None else len(spec.vocabulary)
    more = {} if workload.context or data.task != CAUSAL_LM else {"use_cache": False}
    ids = torch.randint(most, (workload.batch, workload.sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(workload.device)} | more


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


@dataclass
class Activations:
    """Bytes that the layers of a student need at once, from real layers one at a time.

    What one layer needs is free again when the next one runs, so the peak of a student is that of the layer that needs
    most. Each form of a layer is measured once, in a student of its own with few tokens in its vocabulary: the logits
    are counted elsewhere.
    """

    bench: Bench
    teacher: TeacherShape
    tokens: tuple[int, ...] | None = None
    """Vocabulary of the students that are measured, None for the teacher's."""
    _known: dict[Any, float] = field(default_factory=dict, repr=False)

    def __call__(self, spec: CandidateSpec) -> float:
        """Bytes at the peak, without weights and logits."""
        types = self.teacher.layer_types
        most = 0.0
        for stack, layers in spec.stacks():
            for number, layer in enumerate(layers):
                # what comes into the first layer is the residual stream itself; behind it the model holds both
                plain, first = self._without_gate(layer), number == 0
                kind = types[layer.source] if types and not stack else None
                key = (stack, kind, plain.sizes(), plain.kind, spec.hidden_size, first)
                if key not in self._known:
                    form = (plain,) if first else self._pair(stack, plain)
                    self._known[key] = self._measured(spec, stack, form)
                most = max(most, self._known[key])
        return most

    def _without_gate(self, layer: LayerSpec) -> LayerSpec:
        """An added layer that runs as one of the teacher's does is one, for this purpose."""
        gated = layer.added and LAYOUTS[self.teacher.model_type].normalised_after
        return layer if gated else replace(layer, kind=KEEP)

    def _pair(self, stack: int, layer: LayerSpec) -> tuple[LayerSpec, ...]:
        """The layer and one more of its form, so that the one that needs most is not the first."""
        theirs = (self.teacher.layers, self.teacher.decoder_layers)[stack]
        twins = [
            replace(layer, source=n) for n in range(len(theirs)) if theirs[n].sizes() == theirs[layer.source].sizes()
        ]
        twin = next((twin for twin in twins if twin.source != layer.source), None)
        if twin is None or layer.added:
            return (layer,)
        return (layer, twin) if layer.source < twin.source else (twin, layer)

    def _measured(self, spec: CandidateSpec, stack: int, layers: tuple[LayerSpec, ...]) -> float:
        stacks = [(self.teacher.layers[0],), self.teacher.decoder_layers[:1]]
        stacks[stack] = layers
        alone = replace(spec, layers=stacks[0], decoder_layers=stacks[1], vocabulary=self.tokens)
        model, inputs = self.bench.build(alone).eval(), self.bench.inputs(alone)
        own = sum(t.untyped_storage().nbytes() for t in _tensors(model))
        with torch.inference_mode():
            return peak_bytes(model, lambda: self.bench.step(model, inputs)) - own


def few_tokens(teacher: PreTrainedModel) -> tuple[int, ...] | None:
    """The least vocabulary that a configuration can have: some tokens, and all that it names. None without tokens."""
    size = getattr(teacher.config, "vocab_size", None)
    if size is None:
        return None
    values = teacher.config.to_dict() | (teacher.generation_config.to_dict() if teacher.can_generate() else {})
    named = [value for name, value in values.items() if name.endswith("_token_id") and value is not None]
    flat = {token for value in named for token in (value if isinstance(value, list) else [value])}
    return tuple(sorted({*range(min(FEW_TOKENS, size)), *(t for t in flat if 0 <= t < size)}))


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
