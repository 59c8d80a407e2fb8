"""The search itself: an Optuna study over students, with a cheap proxy, latency and memory to be minimised.

A trial is proposed, priced, and only if it meets the limits also judged by the proxy; a student that is too dear needs
no judging, since only how much it exceeds the limits decides what the sampler makes of it (constrained domination, Deb
et al. 2002). Every result is in the storage before the next trial begins.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hf_qep.errors import ConfigError
from hf_qep.extras import require
from hf_qep.files import canonical_json
from hf_qep.progress import SILENT, Bar, Progress
from hf_qep.search.costs import Choice, Cost
from hf_qep.search.journal import refuse_other
from hf_qep.search.limits import Limits, within
from hf_qep.search.space import SearchSpace
from hf_qep.search.store import NSGA2, SLOT, open_study, quiet

POLL = 0.2
"""Seconds between two looks at what other processes still evaluate."""
_TOO_DEAR = 0.0
"""In the place of the proxy of a student that is not judged."""


@dataclass(frozen=True)
class StudyOptions:
    """How the search goes.

    trials: of all processes together, repeated students included. seed: of the sampler. sampler: `nsga2` or `tpe`.
    population: students of a generation; before TPE begins. stale_after: seconds after which a trial of another
    machine counts as lost (of the same machine it does as soon as its process is gone). name: of the study in its
    storage.
    """

    trials: int = 64
    seed: int = 0
    sampler: str = NSGA2
    population: int = 16
    stale_after: float = 3600.0
    name: str = "search"

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"the search needs at least 1 trial, not {self.trials}")


@dataclass(frozen=True)
class Evaluated:
    """A student with its cost, and its proxy value unless it exceeds the limits; slot: its place in the search."""

    choice: Choice
    cost: Cost
    value: float | None
    slot: int


@dataclass(frozen=True)
class StudyResult:
    """What a study holds: every student once, in the order of the search, and what failed, by key of the choice."""

    evaluated: tuple[Evaluated, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    trials: int = 0

    def judged(self) -> list[Evaluated]:
        """The students within the limits, best first by their proxy."""
        return sorted((e for e in self.evaluated if e.value is not None), key=lambda e: (e.value, e.slot))


def search(
    space: SearchSpace,
    evaluate: Callable[[Choice], float],
    cost: Callable[[Choice], Cost],
    *,
    storage: str | Path,
    limits: Limits | None = None,
    seeds: Sequence[Choice] = (),
    options: StudyOptions | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> StudyResult:
    """Propose, price and judge students until there are `options.trials`, or go on with a search that was stopped.

    evaluate: proxy value, less is better. storage: see `store.open_study`; processes that give the same one share the
    work, and each returns when all trials are done. seeds: students that are tried first. fingerprint: JSON values of
    what else the values depend on, such as the data. In one process the same seed gives the same students.

    An evaluation that raises an Exception, or gives no finite number, is recorded with its message and the search goes
    on. Raises ConfigError if all failed, if no student meets the limits, or if the storage holds another search.
    """
    limits, options = limits or Limits(), options or StudyOptions()
    study = open_study(storage, options.name, options.sampler, options.population, options.seed)
    asked = _fingerprint(space, limits, seeds, options) | dict(fingerprint or {})
    stored = study.user_attrs.get("fingerprint")
    if stored is None:
        study.set_user_attr("fingerprint", asked)
    else:
        refuse_other(str(storage), stored, asked)
    worker = _Worker(study, space, evaluate, cost, limits, seeds, options)
    with progress.bar("searching", options.trials, unit="trial") as bar, quiet(require("distill", "optuna")):
        worker.work(bar)
    return worker.result()


class _Worker:
    """One process's part in a study."""

    def __init__(
        self,
        study: Any,
        space: SearchSpace,
        evaluate: Callable[[Choice], float],
        cost: Callable[[Choice], Cost],
        limits: Limits,
        seeds: Sequence[Choice],
        options: StudyOptions,
    ) -> None:
        self.study, self.space, self.limits, self.options = study, space, limits, options
        self._evaluate, self._cost = evaluate, cost
        self._seeds = [space.params_of_choice(choice) for choice in seeds]
        optuna = require("distill", "optuna")
        self._states = optuna.trial.TrialState
        self._finished_by_others = optuna.exceptions.UpdateFinishedTrialError
        self._owner = f"{socket.gethostname()} {os.getpid()}"

    def work(self, bar: Bar) -> None:
        """Until every slot has a trial that ended."""
        bar.advance(sum(t.state != self._states.RUNNING for t in self._taken().values()))
        while True:
            self._give_up_lost()
            taken = self._taken()
            slot = next((n for n in range(self.options.trials) if n not in taken), None)
            if slot is not None:
                if (trial := self._ask(slot)) is not None:
                    self._run(trial)
                    bar.advance()
            elif any(trial.state == self._states.RUNNING for trial in taken.values()):
                time.sleep(POLL)
            else:
                return

    def result(self) -> StudyResult:
        """All that is known. Raises ConfigError if nothing is, or nothing is within the limits."""
        found: dict[str, Evaluated] = {}
        failures: dict[str, str] = {}
        taken = self._taken()
        for slot, trial in sorted(taken.items()):
            key = trial.user_attrs.get("key", f"trial {trial.number}")
            if trial.state == self._states.COMPLETE and key not in found:
                choice = Choice(self.space.decode(trial.params), trial.params["bits"])
                cost = Cost.from_dict(trial.user_attrs["cost"])
                found[key] = Evaluated(choice, cost, trial.user_attrs["value"], slot)
            elif trial.state == self._states.FAIL:
                failures.setdefault(key, trial.user_attrs["error"])
        if not found:
            raise ConfigError(f"all {len(taken)} evaluations failed; the first: {next(iter(failures.values()))}")
        within([(e.choice, e.cost) for e in found.values()], self.limits)
        return StudyResult(tuple(found.values()), failures, len(taken))

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def _taken(self) -> dict[int, Any]:
        """Slot -> its trial, which runs or has ended. One that failed without an error was lost, and frees its slot."""
        found: dict[int, Any] = {}
        for trial in self._trials():
            lost = trial.state == self._states.FAIL and "error" not in trial.user_attrs
            if trial.state != self._states.WAITING and not lost and SLOT in trial.user_attrs:
                found.setdefault(trial.user_attrs[SLOT], trial)
        return found

    def _ask(self, slot: int) -> Any:
        """A trial for a slot that was free a moment ago; None if another process was faster.

        The slot is part of the trial from its creation on, so of two trials with one slot the older one counts.
        """
        waiting = {t.user_attrs.get(SLOT) for t in self._trials() if t.state == self._states.WAITING}
        if slot not in waiting:
            params = self._seeds[slot] if slot < len(self._seeds) else {}
            self.study.enqueue_trial(params, user_attrs={SLOT: slot})
        trial = self.study.ask()
        mine = trial.user_attrs.get(SLOT)
        if mine is None or self._taken()[mine].number != trial.number:
            self.study.tell(trial, state=self._states.FAIL)
            return None
        trial.set_user_attr("owner", self._owner)
        return trial

    def _run(self, trial: Any) -> None:
        """Judge a trial. Whatever ends the process ends the trial as lost; its slot is tried again."""
        try:
            self._record(trial)
        except self._finished_by_others:  # it was given up while it ran
            return
        except BaseException:
            self.study.tell(trial, state=self._states.FAIL, skip_if_finished=True)
            raise

    def _record(self, trial: Any) -> None:
        try:
            cost, value = self._judge(trial)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            self.study.tell(trial, state=self._states.FAIL, skip_if_finished=True)
            return
        for name, margin in self.limits.margins(cost).items():
            trial.set_constraint(name, margin)
        trial.set_user_attr("cost", cost.to_dict())
        trial.set_user_attr("value", value)
        values = [_TOO_DEAR if value is None else value, cost.latency_ms, cost.memory_mb]
        self.study.tell(trial, values, skip_if_finished=True)

    def _judge(self, trial: Any) -> tuple[Cost, float | None]:
        """Cost and proxy value; those of the same student if it was tried before, be it with a failure."""
        choice = self.space.suggest_choice(trial)
        key = choice.key()
        trial.set_user_attr("key", key)
        for other in self._taken().values():
            if other.number != trial.number and other.user_attrs.get("key") == key and other.state.is_finished():
                if "error" in other.user_attrs:
                    raise ConfigError(f"as before: {other.user_attrs['error']}")
                return Cost.from_dict(other.user_attrs["cost"]), other.user_attrs["value"]
        cost = self._cost(choice)
        if self.limits.violations(cost):
            return cost, None
        value = float(self._evaluate(choice))
        if not math.isfinite(value):
            raise ConfigError(f"the proxy is {value}")
        return cost, value

    def _give_up_lost(self) -> None:
        """End trials of processes that are gone, so that somebody else takes their slots."""
        for trial in self._trials():
            if trial.state == self._states.RUNNING and self._is_lost(trial):
                self.study.tell(trial.number, state=self._states.FAIL, skip_if_finished=True)

    def _is_lost(self, trial: Any) -> bool:
        host, _, process = trial.user_attrs.get("owner", " ").rpartition(" ")
        if host == socket.gethostname() and os.name == "posix":
            # A trial of this very process is over whenever it looks here; its number can be that of a dead one.
            return int(process) == os.getpid() or not _lives(int(process))
        return (datetime.now() - trial.datetime_start).total_seconds() > self.options.stale_after


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fingerprint(space: SearchSpace, limits: Limits, seeds: Sequence[Choice], options: StudyOptions) -> dict[str, Any]:
    """What the trials of a study depend on."""
    room = hashlib.sha256(canonical_json(space.to_dict()).encode()).hexdigest()
    own = {"space": room, "limits": limits.to_dict(), "seeds": [choice.key() for choice in seeds]}
    return own | {name: getattr(options, name) for name in ("seed", "sampler", "population")}
