"""`evaluate.Metric` classes that need no script from the Hub (extra "eval").

    from hf_qep.evaluation.metrics import QepRetention
    QepRetention().compute(predictions=quantised, references=gold, baseline_predictions=float_answers, chance=0.25)

`QepRetention`: accuracy of both models and what the quantised one retains, raw and corrected for chance.
`QepAgreement`: how often the quantised model answers as the float model does; the references are the float answers.

The classes are made when they are first asked for, because their base class comes from an optional package.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hf_qep import extras
from hf_qep.evaluation.estimates import mean
from hf_qep.evaluation.retention import paired_retention
from hf_qep.evaluation.schema import to_json

_CITATION = "Fieller, E. C. (1954). Some problems in interval estimation. J. R. Stat. Soc. B 16(2)."
_INPUTS = """
Args:
    predictions: answers of the quantised model, one integer per item.
    references: right answers, one integer per item (for QepAgreement: the float model's answers).
"""
_RETENTION_INPUTS = """    baseline_predictions: answers of the float model to the same items.
    chance: expected accuracy of guessing; None gives no corrected value.
Returns: accuracy and baseline_accuracy {value, stderr, n}; raw and corrected {value, low, high}; paired; note.
"""


def retention_of_answers(
    predictions: Sequence[int],
    references: Sequence[int],
    baseline_predictions: Sequence[int],
    chance: float | None = None,
) -> dict[str, Any]:
    """What `QepRetention` computes. Raises ValueError if the lengths differ."""
    if len(baseline_predictions) != len(references):
        raise ValueError(f"{len(baseline_predictions)} baseline predictions for {len(references)} references")
    theirs = [float(p == r) for p, r in zip(baseline_predictions, references, strict=True)]
    ours = [float(p == r) for p, r in zip(predictions, references, strict=True)]
    baseline, subject, kept = paired_retention(theirs, ours, chance)
    return {"accuracy": to_json(subject), "baseline_accuracy": to_json(baseline), **to_json(kept)}


def agreement_of_answers(predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
    """What `QepAgreement` computes."""
    same = mean([float(p == r) for p, r in zip(predictions, references, strict=True)])
    return {"agreement": same.value, "stderr": same.stderr, "n": same.n}


@cache
def _metrics() -> dict[str, type]:
    evaluate = extras.require("eval", "evaluate")
    datasets = extras.require("eval", "datasets")

    class InMemory(evaluate.Metric):
        """A metric that leaves no cache files behind."""

        inputs = _INPUTS

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
            super().__init__(*args, **kwargs)

        def _info(self) -> Any:
            integer = datasets.Value("int64")
            return evaluate.MetricInfo(
                description=type(self).__doc__,
                citation=_CITATION,
                inputs_description=self.inputs,
                features=datasets.Features({"predictions": integer, "references": integer}),
            )

    class QepRetention(InMemory):
        """Share of the float model's accuracy that a quantised model retains."""

        inputs = _INPUTS + _RETENTION_INPUTS

        def _compute(self, **answers: Any) -> dict[str, Any]:
            return retention_of_answers(**answers)

    class QepAgreement(InMemory):
        """Share of items to which a quantised model gives the float model's answer."""

        def _compute(self, **answers: Any) -> dict[str, Any]:
            return agreement_of_answers(**answers)

    return {metric.__name__: metric for metric in (QepRetention, QepAgreement)}


def __getattr__(name: str) -> type:
    if name in ("QepRetention", "QepAgreement"):
        return _metrics()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
