"""Other methods on the same original, from records that were measured the same way; all others are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.errors import CardError
from hf_qep.evaluation import schema
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.record import EvalRecord

SAME = 2e-3
"""Relative difference up to which two scores of the original count as the same: other machines round otherwise."""
_TEXT = ("perplexity", "kl", "top1_agreement", "bits_per_byte")
_PROTOCOL = ("source", "windows", "window", "stride", "bos", "separator", "documents", "scored_bytes")
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Baseline:
    """Scores of another way to quantise the same original. tasks: (task, metric) -> score."""

    name: str
    bits: float | None
    text: dict[str, Estimate] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Estimate] = field(default_factory=dict)


def read_baselines(paths: Sequence[Path], record: EvalRecord) -> tuple[Baseline, ...]:
    """Baselines of record files and of what `hf-qep compare --json` printed.

    Raises CardError for a file that is neither, or whose text, windows, tasks or original are not those of `record`.
    """
    return tuple(baseline for path in paths for baseline in _read(path, record))


def _read(path: Path, record: EvalRecord) -> list[Baseline]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CardError(f"{path.name!r} has more than {_MAX_BYTES} bytes; it is no record")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"the baseline record {path.name!r} cannot be read: {error}") from error
    if isinstance(values, dict) and values.get("schema") == "hf_qep_eval":
        return [_comparable(_of_record(EvalRecord.from_dict(values), record, path.name), path.name)]
    if isinstance(values, dict) and isinstance(values.get("rows"), list):
        rows = [row for row in values["rows"] if isinstance(row, dict) and row.get("status") == "ok"]
        return [_comparable(_of_row(row, values, record, path.name), path.name) for row in rows]
    raise CardError(f"{path.name!r} is neither a record of hf-qep eval nor the output of hf-qep compare --json")


def _comparable(baseline: Baseline, name: str) -> Baseline:
    if not baseline.text and not baseline.tasks:
        raise CardError(f"the baseline record {name!r} has no score that this record has too; leave it out")
    return baseline


def _of_record(other: EvalRecord, record: EvalRecord, name: str) -> Baseline:
    if other.baseline.sha256 and record.baseline.sha256 and other.baseline.sha256 != record.baseline.sha256:
        raise _differs(name, "another original", other.baseline.name, record.baseline.name)
    if other.subject.sha256 and other.subject.sha256 == record.subject.sha256:
        raise CardError(f"the baseline record {name!r} is about the same weights as the card; leave it out")
    text: dict[str, Estimate] = {}
    if other.text is not None and record.text is not None:
        for key in _PROTOCOL:
            if getattr(other.text, key) != getattr(record.text, key):
                raise _differs(name, f"another {key}", getattr(other.text, key), getattr(record.text, key))
        digests = (other.text.text_sha256, record.text.text_sha256)
        if None not in digests and digests[0] != digests[1]:
            raise _differs(name, "another text of the same name", *digests)
        _check_same(name, "original's perplexity", other.text.baseline.perplexity, record.text.baseline.perplexity)
        scores = other.text.subject
        found = {
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "kl": other.text.kl,
            "top1_agreement": other.text.top1_agreement,
        }
        text = {key: value for key, value in found.items() if value is not None}
    tasks = {
        (task.name, metric.name): metric.subject
        for task in other.tasks
        for metric in task.metrics
        if _same_task(name, task, metric, record)
    }
    return Baseline(other.subject.name, other.bits.linear, text, tasks)


def _same_task(name: str, task: Any, metric: Any, record: EvalRecord) -> bool:
    """Whether the record has this score too. Raises CardError if it was taken otherwise."""
    for own in record.tasks:
        for score in own.metrics:
            if (own.name, score.name) == (task.name, metric.name):
                for key in ("prompt", "form", "num_fewshot", "items", "seed"):
                    if getattr(task, key) != getattr(own, key):
                        raise _differs(name, f"another {key} in {task.name}", getattr(task, key), getattr(own, key))
                _check_same(name, f"original's {metric.name} in {task.name}", metric.baseline, score.baseline)
                return True
    return False


def _of_row(row: dict[str, Any], whole: dict[str, Any], record: EvalRecord, name: str) -> Baseline:
    """One recipe of a comparison. It has no protocol of its own: the original's scores must be those of the record."""
    scores = {key: _estimate(row.get(key), name) for key in (*_TEXT, "float_perplexity")}
    text: dict[str, Estimate] = {}
    if record.text is not None and scores["float_perplexity"] is not None:
        if whole.get("text") != record.text.source:
            raise _differs(name, "another text", whole.get("text"), record.text.source)
        _check_same(name, "original's perplexity", scores["float_perplexity"], record.text.baseline.perplexity)
        text = {key: value for key in _TEXT if (value := scores[key]) is not None}
    known = {(t.name, m.name): m for t in record.tasks for m in t.metrics}
    tasks = {}
    listed = row.get("tasks")
    for label, entry in (listed if isinstance(listed, dict) else {}).items():
        task, _, metric = label.rpartition("/")
        if (task, metric) in known and isinstance(entry, dict):
            theirs, ours = _estimate(entry.get("float"), name), _estimate(entry.get("quantized"), name)
            _check_same(name, f"original's {metric} in {task}", theirs, known[task, metric].baseline)
            if ours is not None:
                tasks[task, metric] = ours
    bits = row.get("bits_linear")
    return Baseline(_label(row), bits if isinstance(bits, float) and math.isfinite(bits) else None, text, tasks)


def _label(row: dict[str, Any]) -> str:
    """A recipe in a few words."""
    words = [str(row.get("method"))]
    if row.get("method") == "factored":
        words.append(f"{row.get('bits')} bits")
    if row.get("group_size"):
        words.append(f"groups of {row['group_size']}")
    words.append("QEP" if row.get("propagation") else "without QEP")
    return ", ".join(words)


def _estimate(value: Any, name: str) -> Estimate | None:
    if value is None:
        return None
    try:
        return schema.from_json(Estimate, value, "a score")
    except schema.SchemaError as error:
        raise CardError(f"the baseline record {name!r} is malformed: {error}") from error


def _check_same(name: str, what: str, theirs: Estimate | None, ours: Estimate | None) -> None:
    """The original must have scored the same on the same number of things, else something was measured otherwise."""
    if theirs is None or ours is None:
        same = theirs is ours
    else:
        same = theirs.n == ours.n and math.isclose(theirs.value, ours.value, rel_tol=SAME)
    if not same:
        said = [None if x is None else f"{x.value:.5g} (n = {x.n})" for x in (theirs, ours)]
        raise _differs(name, f"another {what}", *said)


def _differs(name: str, what: str, theirs: Any, ours: Any) -> CardError:
    return CardError(
        f"the baseline record {name!r} has {what}, {theirs!r} instead of {ours!r}, so the numbers cannot stand side by "
        "side; measure it on the same text with the same options"
    )
