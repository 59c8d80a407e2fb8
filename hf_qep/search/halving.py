"""Judge many students cheaply and few of them dearly: successive halving over a ladder of proxies.

Jamieson and Talwalkar (2016), with proxies of growing cost in the place of growing budgets. Whether a rung can be
trusted is measured: its order is compared with that of the next rung on the students that both saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_qep.algorithms.ranks import bootstrap_interval, kendall, regret_at_1, spearman
from hf_qep.errors import ConfigError
from hf_qep.progress import SILENT, Bar, Progress
from hf_qep.search.costs import Choice
from hf_qep.search.journal import Journal


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    evaluate: value of a choice, less is better. keep: how many go on, as a share below 1 (rounded up) or a number.
    """

    name: str
    evaluate: Callable[[Choice], float]
    keep: float | int

    def __post_init__(self) -> None:
        if self.keep <= 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise ConfigError(f"rung {self.name!r} must keep a share below 1 or a whole number, not {self.keep}")

    def survivors(self, count: int) -> int:
        """How many of `count` go on, one at least."""
        return min(count, max(1, math.ceil(self.keep * count) if self.keep < 1 else int(self.keep)))


@dataclass(frozen=True)
class Correlation:
    """How well the order of one rung foretold that of the next.

    students: that both saw; they are those that the first rung liked, so this says less than all would. spearman,
    kendall: None where there is no order. low, high: 90 % bootstrap interval of the former. regret: what the first
    rung's favourite has more than the least value of the second, in the unit of the second.
    """

    first: str
    second: str
    students: int
    spearman: float | None
    low: float | None
    high: float | None
    kendall: float | None
    regret: float

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return asdict(self)


@dataclass(frozen=True)
class Halving:
    """values: rung -> key of a choice -> value. survivors: of the last rung, best first. failures: rung and key ->
    message. correlations: of each rung with the next."""

    values: Mapping[str, Mapping[str, float]]
    survivors: tuple[Choice, ...]
    failures: Mapping[tuple[str, str], str]
    correlations: tuple[Correlation, ...]


def halve(
    choices: Sequence[Choice], rungs: Sequence[Rung], *, journal: Journal, seed: int = 0, progress: Progress = SILENT
) -> Halving:
    """Take the choices up the ladder.

    Every value is written to the journal as soon as it is known, and read from there when it is known already. A choice
    whose evaluation raises an Exception, or gives no finite number, is out, with its message. seed: of the bootstrap.
    Raises ConfigError if a rung fails for all choices, or if there are no choices or rungs.
    """
    if not choices or not rungs or len({rung.name for rung in rungs}) < len(rungs):
        raise ConfigError(f"{len(choices)} students, {len(rungs)} rungs: give at least one each, and rungs by one name")
    values: dict[str, dict[str, float]] = {}
    failures: dict[tuple[str, str], str] = {}
    correlations: list[Correlation] = []
    here = {choice.key(): choice for choice in choices}
    for number, rung in enumerate(rungs):
        with progress.bar(f"rung {rung.name}", len(here), unit="student") as bar:
            values[rung.name], failed = _judge(rung, here, journal, bar)
        failures |= {(rung.name, key): message for key, message in failed.items()}
        if not values[rung.name]:
            raise ConfigError(
                f"rung {rung.name!r} failed for all {len(failed)} students; the first: {next(iter(failed.values()))}"
            )
        if number:
            before = rungs[number - 1].name
            correlations.append(compare(before, rung.name, values[before], values[rung.name], seed))
        ordered = sorted(values[rung.name], key=values[rung.name].__getitem__)
        here = {key: here[key] for key in ordered[: rung.survivors(len(ordered))]}
    return Halving(values, tuple(here.values()), failures, tuple(correlations))


def _judge(
    rung: Rung, choices: Mapping[str, Choice], journal: Journal, bar: Bar
) -> tuple[dict[str, float], dict[str, str]]:
    """Values and failures of one rung by key, in the order of the choices."""
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    for key, choice in choices.items():
        line = f"{rung.name}/{key}"
        if line not in journal:
            journal.add(line, **_evaluate(rung, choice))
        result = journal.get(line) or {}
        if "value" in result:
            values[key] = result["value"]
        else:
            failed[key] = result["error"]
        bar.advance()
    return values, failed


def _evaluate(rung: Rung, choice: Choice) -> dict[str, Any]:
    try:
        value = float(rung.evaluate(choice))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"value": value} if math.isfinite(value) else {"error": f"the value is {value}"}


def compare(
    first: str, second: str, early: Mapping[str, float], late: Mapping[str, float], seed: int = 0
) -> Correlation:
    """Correlation of two rungs over the keys that both have; values by key. seed: of the bootstrap.

    Raises ConfigError if they have none in common.
    """
    common = [key for key in late if key in early]
    if not common:
        raise ConfigError(f"no student was judged by both {first!r} and {second!r}")
    x, y = [early[key] for key in common], [late[key] for key in common]
    low, high = bootstrap_interval(spearman, x, y, seed=seed)
    found = [None if math.isnan(v) else v for v in (spearman(x, y), low, high, kendall(x, y))]
    return Correlation(first, second, len(x), *found, regret_at_1(x, y))
