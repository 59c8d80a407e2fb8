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

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from hf_qep.errors import CheckpointError, FormatVersionError
from hf_qep.evaluation import schema
from hf_qep.evaluation.divergence import TextScore
from hf_qep.evaluation.embeddings import EmbeddingScore
from hf_qep.evaluation.environment import Environment, ModelFacts
from hf_qep.evaluation.speed import Speed
from hf_qep.evaluation.tasks import TaskResult
from hf_qep.files import write_text_aside

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
class EvalRecord:
    """One evaluation of a quantised model against its float original."""

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `schema` and `schema_version` come first."""
        values = schema.to_json(self)
        return {"schema": values.pop("schema"), "schema_version": values.pop("schema_version"), **values}

    @classmethod
    def from_dict(cls, values: Any) -> EvalRecord:
        """Validate and build. Raises FormatVersionError for a newer schema, CheckpointError for anything malformed."""
        if not isinstance(values, dict) or values.get("schema") != "hf_qep_eval":
            raise CheckpointError("this is no evaluation record: its `schema` is not 'hf_qep_eval'")
        version = values.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise FormatVersionError(
                f"this evaluation record has schema version {version} and this hf_qep reads up to {SCHEMA_VERSION}; "
                "run: pip install --upgrade hf-qep"
            )
        try:
            return schema.from_json(cls, values)
        except schema.SchemaError as error:
            raise CheckpointError(f"the evaluation record is malformed: {error}") from error

    def write(self, path: Path) -> Path:
        """Write to the file `path`, or to `hf_qep_eval.json` in the folder `path`, in one step; returns the file."""
        path = path / FILE_NAME if path.is_dir() else path
        write_text_aside(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> EvalRecord:
        """Read a record file, or that of a folder. Raises CheckpointError or FormatVersionError."""
        path = path / FILE_NAME if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no evaluation record {path.name!r}; run: hf-qep eval") from error
        except ValueError as error:
            raise CheckpointError(f"the evaluation record {path.name!r} is not JSON: {error}") from error
        return cls.from_dict(values)


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `hf_qep_eval.json`."""
    return schema.json_schema(EvalRecord)
