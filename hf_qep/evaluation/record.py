"""The evaluation record `hf_qep_eval.json`: the only source of numbers for model cards, tables and demos.

    schema            "hf_qep_eval"
    schema_version    2; a reader refuses a higher one. 1 had no digest of the held-out text
    created           UTC date and time, ISO 8601
    command           what was typed
    subject           the quantised model: name, revision, sha256 of each weight file, dtype, parameters
    baseline          the float model, the same facts
    environment       versions, platform, processor, cores, memory, accelerator, threads
    seeds             name -> seed
    bits              bits per weight three ways: linear (scales included), model (every stored tensor), file (bytes
                      of the weight files)
    text              causal models: perplexity and bits per byte of both, KL(float || quantised), top-1 agreement,
                      with window, stride, bos, separator and the digest of the text, which together are the protocol
    embeddings        encoders: 1 - cosine of sentence embeddings, overlap of nearest neighbours
    tasks             per task: prompt form, items, chance and majority level, scores of both models, retention
    cost              per model: weight_bytes in memory, peak_bytes above that while running, speed
    notes             sentences a reader of the numbers must know

A measured number is `{"value", "stderr", "n"}`. What was not measured is null: a record never holds an estimate, a
default or a number from elsewhere. Unknown fields are refused, so that a misspelt one cannot go unnoticed.
`json_schema()` gives the machine-readable form, made from the dataclasses below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from hf_qep.evaluation import schema
from hf_qep.evaluation.divergence import TextScore
from hf_qep.evaluation.embeddings import EmbeddingScore
from hf_qep.evaluation.environment import Environment, ModelFacts
from hf_qep.evaluation.json_file import JsonFile
from hf_qep.evaluation.speed import Speed
from hf_qep.evaluation.tasks import TaskResult

FILE_NAME = "hf_qep_eval.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Bits:
    """Stored bits per weight of the subject, always with scales."""

    linear: Annotated[float | None, "tensors of the quantised linears / their weights; null if none is quantised"]
    model: Annotated[float, "every stored tensor / all weights of the model"]
    file: Annotated[float | None, "bits of the weight files / all weights; null without files"]


@dataclass(frozen=True)
class Cost:
    """What one model takes to run."""

    weight_bytes: Annotated[int, "parameters and buffers in memory"]
    file_bytes: Annotated[int | None, "weight files; null without files"]
    peak_bytes: Annotated[int | None, "highest memory above the weights during one prefill and decode"] = None
    speed: Annotated[Speed | None, "tokens per second at batch size 1"] = None


@dataclass(frozen=True)
class PairCost:
    """Cost of both models, measured in turn on the same machine."""

    subject: Annotated[Cost, "quantised model"]
    baseline: Annotated[Cost, "float model"]


@dataclass(frozen=True)
class EvalRecord(JsonFile):
    """One evaluation of a quantised model against its float original."""

    file_name = FILE_NAME
    what = "evaluation record"

    subject: Annotated[ModelFacts, "the quantised model"]
    baseline: Annotated[ModelFacts, "the float model"]
    environment: Annotated[Environment, "software and hardware"]
    bits: Annotated[Bits, "stored bits per weight"]
    command: Annotated[str | None, "what was typed; null if called as a library"] = None
    seeds: Annotated[dict[str, int], "what was drawn with which seed"] = field(default_factory=dict)
    text: Annotated[TextScore | None, "language-model metrics on held-out text"] = None
    embeddings: Annotated[EmbeddingScore | None, "encoder metrics on held-out text"] = None
    tasks: Annotated[tuple[TaskResult, ...], "task scores"] = ()
    cost: Annotated[PairCost | None, "memory and speed"] = None
    notes: Annotated[tuple[str, ...], "what must be said beside the numbers"] = ()
    created: Annotated[str, "UTC, ISO 8601"] = field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds")
    )
    schema: Annotated[Literal["hf_qep_eval"], "kind of file"] = "hf_qep_eval"
    schema_version: Annotated[int, "raised with every change of the fields"] = SCHEMA_VERSION


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `hf_qep_eval.json`."""
    return schema.json_schema(EvalRecord)
