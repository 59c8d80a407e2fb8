"""What a search found: every candidate with its costs and values, what to take, and files that say so."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_qep.algorithms.pareto import knee, non_dominated
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.files import write_text_aside
from hf_qep.search.costs import Choice, Cost
from hf_qep.search.halving import Correlation, Halving, compare
from hf_qep.search.limits import Limits, within
from hf_qep.search.report import draw, markdown
from hf_qep.search.study import StudyResult

BALANCED, FAST, ACCURATE = "balanced", "fast", "accurate"
PICKS = (BALANCED, FAST, ACCURATE)
STUDY = "search"
"""Name of the proxy that the study minimised, before the rungs of the ladder."""
CANDIDATES, RESULT, REPORT, PLOT = "candidates.jsonl", "result.json", "report.md", "pareto.svg"


@dataclass(frozen=True)
class Candidate:
    """A student that was considered.

    predicted: by the cost model. measured: of the real student, if it was. values: proxy by rung, less is better, of
    those rungs that it came to. pareto: whether none of those that came as far is better in value, latency and memory
    at once; only within the limits.
    """

    choice: Choice
    predicted: Cost
    values: Mapping[str, float]
    measured: Cost | None = None
    pareto: bool = False

    def __str__(self) -> str:
        return str(self.choice)

    @property
    def cost(self) -> Cost:
        """As measured, else as predicted."""
        return self.measured or self.predicted

    def errors(self) -> dict[str, float]:
        """(predicted - measured) / measured of every quantity that was measured and is not 0."""
        if self.measured is None:
            return {}
        both = {name: (getattr(self.predicted, name), value) for name, value in self.measured.to_dict().items()}
        return {name: (guess - true) / true for name, (guess, true) in both.items() if true}


@dataclass(frozen=True)
class SearchResult:
    """Everything a search found.

    candidates: in the order in which they were found. limits: that it kept to. rungs: names of the proxies, cheapest
    first, which begin with the study's own. correlations: of each rung with the next. failures: rung, key of the choice
    and message. settings: JSON values of what it was made with.
    """

    candidates: tuple[Candidate, ...]
    limits: Limits
    rungs: tuple[str, ...]
    correlations: tuple[Correlation, ...] = ()
    failures: tuple[tuple[str, str, str], ...] = ()
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        study: StudyResult,
        limits: Limits,
        ladder: Halving | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> SearchResult:
        """Put together what a study and a ladder found."""
        rungs = (STUDY, *(ladder.values if ladder else ()))
        if len(set(rungs)) < len(rungs):
            raise ConfigError(f"no rung may be called {STUDY!r}, which is the name of the first")
        failures = [(STUDY, key, message) for key, message in study.failures.items()]
        failures += [(*place, message) for place, message in (ladder.failures if ladder else {}).items()]
        candidates = []
        for found in study.evaluated:
            values = {} if found.value is None else {STUDY: found.value}
            for rung, known in (ladder.values if ladder else {}).items():
                values |= {rung: known[found.choice.key()]} if found.choice.key() in known else {}
            candidates.append(Candidate(found.choice, found.cost, values))
        correlations = ladder.correlations if ladder else ()
        if ladder:
            cheapest = {c.choice.key(): c.values[STUDY] for c in candidates if STUDY in c.values}
            correlations = (compare(STUDY, rungs[1], cheapest, ladder.values[rungs[1]]), *correlations)
        return cls(tuple(candidates), limits, rungs, correlations, tuple(failures), settings)._flagged()

    def finalists(self) -> list[Candidate]:
        """Candidates that came furthest: values of different rungs cannot be compared."""
        for rung in reversed(self.rungs):
            if found := [c for c in self.candidates if rung in c.values]:
                return found
        return []

    def value(self, candidate: Candidate) -> float:
        """Value of a candidate on the furthest rung that it came to."""
        return next(candidate.values[rung] for rung in reversed(self.rungs) if rung in candidate.values)

    def front(self) -> list[Candidate]:
        """The finalists on the Pareto front, fastest first."""
        return sorted((c for c in self.candidates if c.pareto), key=lambda c: (c.cost.latency_ms, self.value(c)))

    def pick(self, rule: str = BALANCED, limits: Limits | None = None) -> Candidate:
        """One finalist within the limits (by default those of the search).

        accurate: the least value. fast: the least latency of the Pareto front. balanced: the knee of that front. Costs
        are the measured ones where there are some; where all of them miss the limits that the predicted ones met, the
        machine is slower than it was, and the predicted ones count, with a warning. Raises ConfigError for another
        rule, or if none meets the limits.
        """
        if rule not in PICKS:
            raise ConfigError(f"pick one of {', '.join(PICKS)}, not {rule!r}")
        asked = limits or self.limits
        fitting = self._fitting(asked)
        if not fitting:
            within([(c, c.cost) for c in self.finalists()], asked)
        elif asked.violations(fitting[0].cost):
            warnings.warn(
                "no student that was measured meets the limits, though by the model of costs some do: the machine was "
                "busier than when its parts were timed",
                stacklevel=2,
            )
        points = [self._objectives(c) for c in fitting]
        if rule == ACCURATE:
            return fitting[min(range(len(fitting)), key=lambda k: points[k])]
        if rule == BALANCED:
            return fitting[knee(points)]
        kept = [k for k, stays in enumerate(non_dominated(points)) if stays]
        return fitting[min(kept, key=lambda k: (points[k][1], points[k][0], points[k][2]))]

    def measured(self, costs: Mapping[str, Cost]) -> SearchResult:
        """The same with what was measured, by key of the choice."""
        changed = [replace(c, measured=costs.get(c.choice.key(), c.measured)) for c in self.candidates]
        return replace(self, candidates=tuple(changed))._flagged()

    def write(self, folder: Path) -> None:
        """Write candidates.jsonl, result.json, report.md and pareto.svg; the same result gives the same bytes.

        Raises ExtraMissingError without matplotlib.
        """
        values = self.to_dict()
        lines = [json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in values["candidates"]]
        write_text_aside(folder / CANDIDATES, "".join(lines))
        write_text_aside(folder / RESULT, json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        picks = {rule: self.pick(rule) for rule in PICKS} if self._fitting(self.limits) else {}
        write_text_aside(folder / REPORT, markdown(self, picks, PLOT))
        write_text_aside(folder / PLOT, draw(self, picks))

    @classmethod
    def read(cls, folder: Path) -> SearchResult:
        """What `write` wrote. Raises CheckpointError if there is no readable result in the folder."""
        try:
            return cls.from_dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{str(folder / RESULT)!r} is no result of a search: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON value. Vocabularies are long and shared, so each is there once and specifications give its number."""
        vocabularies = list(dict.fromkeys(c.choice.spec.vocabulary for c in self.candidates))
        rows = []
        for c in self.candidates:
            # The ids need not be turned into lists for every candidate.
            row = Choice(replace(c.choice.spec, vocabulary=None), c.choice.bits).to_dict()
            row["spec"]["vocabulary"] = vocabularies.index(c.choice.spec.vocabulary)
            row |= {"key": c.choice.key(), "predicted": c.predicted.to_dict(), "values": dict(c.values)}
            row |= {"measured": c.measured and c.measured.to_dict(), "pareto": c.pareto}
            rows.append(row)
        return {
            "candidates": rows,
            "vocabularies": [None if ids is None else list(ids) for ids in vocabularies],
            "limits": self.limits.to_dict(),
            "rungs": list(self.rungs),
            "correlations": [c.to_dict() for c in self.correlations],
            "failures": [list(failure) for failure in self.failures],
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchResult:
        """Inverse of `to_dict`."""
        candidates = []
        for row in values["candidates"]:
            spec = row["spec"] | {"vocabulary": values["vocabularies"][row["spec"]["vocabulary"]]}
            choice, measured = Choice.from_dict({"spec": spec, "bits": row["bits"]}), row["measured"]
            predicted, cost = Cost.from_dict(row["predicted"]), measured and Cost.from_dict(measured)
            candidates.append(Candidate(choice, predicted, row["values"], cost, row["pareto"]))
        return cls(
            tuple(candidates),
            Limits.from_dict(values["limits"]),
            tuple(values["rungs"]),
            tuple(Correlation(**c) for c in values["correlations"]),
            tuple((rung, key, message) for rung, key, message in values["failures"]),
            values["settings"],
        )

    def _objectives(self, candidate: Candidate) -> tuple[float, float, float]:
        return self.value(candidate), candidate.cost.latency_ms, candidate.cost.memory_mb

    def _fitting(self, limits: Limits) -> list[Candidate]:
        """Finalists whose costs meet the limits; if none does as measured, those that were foretold to."""
        measured = [c for c in self.finalists() if not limits.violations(c.cost)]
        return measured or [c for c in self.finalists() if not limits.violations(c.predicted)]

    def _flagged(self) -> SearchResult:
        """With the Pareto flags that follow from values and costs."""
        fitting = self._fitting(self.limits)
        front: Sequence[bool] = non_dominated([self._objectives(c) for c in fitting]).tolist() if fitting else []
        keys = {c.choice.key() for c, stays in zip(fitting, front, strict=True) if stays}
        return replace(self, candidates=tuple(replace(c, pareto=c.choice.key() in keys) for c in self.candidates))
