"""Numbers that a checkpoint states, against each other: record, card and results for leaderboards.

A number that was measured can be measured again (`remeasure.py`); one that was copied or derived can only be compared
with where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_qep.errors import CardError
from hf_qep.evaluation.divergence import TextScore
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.record import EvalRecord
from hf_qep.hub.base import MAX_CARD_BYTES, read_metadata

ROUNDING = 1e-6
"""Relative difference of numbers that were derived from each other and written in full."""


def record_contradictions(record: EvalRecord, weight_file_bytes: int) -> list[str]:
    """Numbers of a record that do not follow from its others, or from the bytes of its weight files."""
    pairs = [*(_text_pairs(record.text) if record.text is not None else ()), *_task_pairs(record)]
    if record.cost is not None and record.cost.subject.file_bytes is not None:
        pairs.append(("bytes of the weight files", record.cost.subject.file_bytes, weight_file_bytes))
    return [
        f"the record contradicts itself: {name} is {stated:.6g}, but its other numbers give {derived:.6g}"
        for name, stated, derived in pairs
        if not math.isclose(stated, derived, rel_tol=ROUNDING, abs_tol=1e-12)
    ]


def card_contradictions(card: str, record: EvalRecord) -> list[str]:
    """Results in the metadata of a card that the record does not hold for this model."""
    try:
        index = read_metadata(card).get("model-index")
    except CardError as error:
        return [f"the card: {error}"]
    return [
        f"the card gives {name!r} as {value!r}, and the record holds no such number; run: hf-qep card"
        for kind, name, value in index_values(index)
        if not any(_is_rounded(value, number) for number in _numbers_of_subject(record, f"{kind} {name}"))
    ]


def result_contradictions(path: Path, record: EvalRecord) -> list[str]:
    """Values of a file of results for leaderboards that the record does not hold for this model."""
    import yaml

    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [f"{path.name!r} is no file of results ({' '.join(str(error).split())[:200]}); run: hf-qep card"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return [f"{path.name!r} is no list of results; run: hf-qep card"]
    known = list(_numbers_of_subject(record, "acc"))
    return [
        f"{path.name!r} gives the value {entry.get('value')!r}, and the record holds no such number; run: hf-qep card"
        for entry in entries
        if not any(_is_rounded(entry.get("value"), number) for number in known)
    ]


def _text_pairs(text: TextScore) -> Iterator[tuple[str, float, float]]:
    """(name, stated, derived) for both models."""
    for model, score in (("the original", text.baseline), ("this model", text.subject)):
        if score.perplexity is not None:
            yield f"perplexity of {model}", score.perplexity.value, math.exp(min(700.0, score.nll.value))
        if score.bits_per_byte is not None and text.scored_bytes:
            derived = score.nll.value * score.nll.n / text.scored_bytes / math.log(2)
            yield f"bits per byte of {model}", score.bits_per_byte.value, derived


def _task_pairs(record: EvalRecord) -> Iterator[tuple[str, float, float]]:
    for task in record.tasks:
        for metric in task.metrics:
            kept, original = metric.retention.raw, metric.baseline.value
            if kept is not None and original:
                yield f"what is kept of {task.name} {metric.name}", kept.value, metric.subject.value / original


def _numbers_of_subject(record: EvalRecord, kind: str) -> Iterator[float]:
    """Measured numbers of the quantised model that `kind`, words of a card, can mean; all, if they say too little.

    Those of the original are no results of this repository.
    """
    text, embeddings, words = record.text, record.embeddings, kind.lower()
    scores = [metric.subject for task in record.tasks for metric in task.metrics]
    perplexity = [text.subject.perplexity] if text is not None else []
    others: list[Estimate | None] = []
    if text is not None:
        others += [text.subject.nll, text.subject.bits_per_byte, text.kl, text.top1_agreement]
    if embeddings is not None:
        others += [embeddings.cosine_distance, embeddings.neighbour_overlap]
    if "perplexity" in words:
        chosen = perplexity
    elif "acc" in words or "exact_match" in words:
        chosen = scores
    else:
        chosen = [*perplexity, *scores, *others]
        yield from (bits for bits in (record.bits.linear, record.bits.model, record.bits.file) if bits is not None)
    yield from (estimate.value for estimate in chosen if estimate is not None)


def index_values(index: Any) -> Iterator[tuple[str, str, Any]]:
    """(type, name, value) of each metric of a model-index, as far as it has the usual shape."""
    for model in _dicts(index):
        for result in _dicts(model.get("results")):
            for metric in _dicts(result.get("metrics")):
                kind = str(metric.get("type"))
                yield kind, str(metric.get("name") or kind), metric.get("value")


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_rounded(value: Any, number: float) -> bool:
    """Whether `value` is `number`, or a hundred times it, rounded to its decimals or to four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    digits = repr(value).partition("e")[0].partition(".")[2]
    exponent = int(repr(value).partition("e")[2] or 0)
    unit = 10.0 ** (exponent - len(digits))
    return any(abs(value - n) <= max(0.5001 * unit, 5e-4 * abs(n)) for n in (number, 100 * number))
