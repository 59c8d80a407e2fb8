"""A job and what becomes of it, put together from the parts of this room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_qep.config import QepConfig
from hf_qep.engine.planning.costs import CostTable, Seconds, job_operations, job_seconds, machine, matrix_rate
from hf_qep.engine.planning.decoding import CHUNK, Decoding, plan_decoding
from hf_qep.engine.planning.memory import JobMemory, job_memory
from hf_qep.engine.planning.output import OutputPlan, plan_output
from hf_qep.engine.planning.sketch import Sketch, sketch_of
from hf_qep.files import canonical_json

CONTEXTS = (2048, 8192, 32768, 131072)
"""Tokens of context that are looked at if none is named, as far as the model goes."""
_OUTPUT_OPTIONS = (
    *("bits", "method", "max_memory", "group_size", "export", "skip_modules", "embedding_bits", "head_bits"),
)


@dataclass(frozen=True)
class Request:
    """What is to be planned. recipe: options of QepConfig. chunk: tokens of a prompt that are read at a time.
    stream_room: bytes of activations that are kept in memory while quantising; None: what a job takes by itself.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    contexts: tuple[int, ...] = ()
    chunk: int = CHUNK
    stream_room: int | None = None

    def changed(self, changes: Mapping[str, Any]) -> Request:
        """The same with other values; what is no field of this is an option of the recipe."""
        own = {name: value for name, value in changes.items() if name in ("contexts", "chunk", "stream_room")}
        options = {name: value for name, value in changes.items() if name not in own}
        return replace(self, recipe={**self.recipe, **options}, **own)


@dataclass(frozen=True)
class JobPlan:
    """What a job takes and gives. on_gpu: quantising on a GPU instead. whole: with all weights in memory, whether the
    recipe needs that or not."""

    sketch: Sketch
    output: OutputPlan
    on_cpu: JobMemory
    on_gpu: JobMemory
    whole: JobMemory
    seconds: Seconds
    decoding: tuple[Decoding, ...]
    process: int

    def to_dict(self) -> dict[str, Any]:
        """JSON value; bytes, bits per weight, seconds."""
        output = {k: v for k, v in asdict(self.output).items() if k != "packed_blocks"}
        output |= {name: getattr(self.output, name) for name in ("file_bytes", "saving")}
        return {
            "model_class": self.sketch.kind,
            "parameters": self.sketch.parameters,
            "dtype": str(self.sketch.dtype).removeprefix("torch."),
            "blocks": len(self.sketch.blocks),
            "output": output,
            "bits": {name: getattr(self.output, name) for name in ("bits_linear", "bits_tables", "bits_model")},
            "quantising": {
                "on_cpu": _memory_dict(self.on_cpu),
                "on_gpu": _memory_dict(self.on_gpu),
                "whole_model": _memory_dict(self.whole),
            },
            "seconds": self.seconds.to_dict(),
            "decoding": [decoding.to_dict() for decoding in self.decoding],
        }


class Planner:
    """Plans of one model; what does not change from one request to the next is found once.

    config: of the model. dtype: of its files. process: bytes that the interpreter and its libraries take. free: bytes
    that a job may take besides; None: enough. rate: of this machine, see `costs.matrix_rate`; measured when it is
    needed first.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        table: CostTable,
        *,
        process: int = 0,
        free: int | None = None,
        rate: float | None = None,
    ) -> None:
        self.config, self.dtype, self.process, self.free = config, dtype, process, free
        self._table, self._rate = table, rate
        self._sketches: dict[str, Sketch] = {}
        self._outputs: dict[str, OutputPlan] = {}

    def plan(self, request: Request) -> JobPlan:
        """Raises ArchitectureError, BitsError and ConfigError for what cannot be had."""
        recipe = QepConfig(**request.recipe)
        sketch, output = self._sketch(recipe), self._output(recipe)
        options = {"stream_room": request.stream_room, "process": self.process, "free": self.free}
        memory = {
            name: job_memory(sketch, output, recipe, self._table.workspace_bytes, **choice, **options)
            for name, choice in (("on_cpu", {}), ("on_gpu", {"on_gpu": True}), ("whole", {"whole": True}))
        }
        contexts = self.contexts(request) if sketch.cache else (None,)
        return JobPlan(
            sketch=sketch,
            output=output,
            seconds=self._seconds(sketch, recipe, memory["on_cpu"].streaming, output.file_bytes),
            decoding=tuple(plan_decoding(sketch, output, context, request.chunk) for context in contexts),
            process=self.process,
            **memory,
        )

    def contexts(self, request: Request) -> tuple[int, ...]:
        """Of a request, or what the model can be asked for."""
        most = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None) or CONTEXTS[-1]
        return request.contexts or tuple(c for c in CONTEXTS if c <= most) or (most,)

    def _sketch(self, recipe: QepConfig) -> Sketch:
        key = canonical_json(recipe.skip_modules)
        if key not in self._sketches:
            self._sketches[key] = sketch_of(self.config, self.dtype, recipe.skip_modules or ())
        return self._sketches[key]

    def _output(self, recipe: QepConfig) -> OutputPlan:
        key = canonical_json({name: getattr(recipe, name) for name in _OUTPUT_OPTIONS})
        if key not in self._outputs:
            self._outputs[key] = plan_output(self.config, recipe, self.dtype)
        return self._outputs[key]

    def _seconds(self, sketch: Sketch, recipe: QepConfig, streaming: bool, written: int) -> Seconds:
        here, there = machine(), {name: self._table.about.get(name) for name in ("processor", "threads")}
        if not self._table.phases:
            return Seconds(
                {"all": job_operations(sketch, recipe) / self._rate_here()},
                "a guess from the rate of one matrix product on this machine; measure a table of costs for better ones",
                True,
            )
        phases = job_seconds(sketch, recipe, self._table, streaming=streaming, written=written)
        measured = f"costs measured on {there['processor']} with {there['threads']} thread(s)"
        if here == there:
            return Seconds(phases, measured, False)
        factor = self._table.rate / self._rate_here()
        scaled = {name: value * (1 if name in ("read", "write") else factor) for name, value in phases.items()}
        return Seconds(scaled, f"{measured}, times {factor:.2f} for the rate of this machine: a guess", True)

    def _rate_here(self) -> float:
        self._rate = self._rate or matrix_rate()
        return self._rate


def _memory_dict(memory: JobMemory) -> dict[str, Any]:
    return {
        "streaming": memory.streaming,
        "why": memory.why,
        "ram": memory.ram.to_dict(),
        "vram": memory.vram.to_dict() if memory.vram else None,
        "disk": memory.disk.to_dict(),
        "spilled": memory.spilled,
    }
