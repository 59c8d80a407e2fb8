"""An Optuna study that several processes share and whose proposals depend on nothing but its seed and its history."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_qep.errors import ConfigError
from hf_qep.extras import require

NSGA2, TPE = "nsga2", "tpe"
SAMPLERS = (NSGA2, TPE)
OBJECTIVES = ("proxy", "latency_ms", "memory_mb")
SLOT = "slot"
"""Attribute of a trial: its place in the search. A place whose trial was lost is given to another trial."""


def open_study(storage: str | Path, name: str, sampler: str, population: int, seed: int) -> Any:
    """The study `name` of a storage, made if it is not there; all objectives are minimised.

    storage: URL for Optuna such as `sqlite:///search.db`, or a file that is then a journal; processes on several
    machines can share both, the file over NFS too. population: of NSGA-II, or random trials before TPE begins.
    Raises ConfigError for an unknown sampler or a population below 2.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"the sampler must be {' or '.join(SAMPLERS)}, not {sampler!r}")
    if population < 2:
        raise ConfigError(f"the population must be at least 2, not {population}")
    optuna = require("distill", "optuna")
    with quiet(optuna):
        return optuna.create_study(
            study_name=name,
            storage=storage if isinstance(storage, str) and "://" in storage else _journal(Path(storage)),
            sampler=_sampler(optuna, sampler, population, seed),
            directions=["minimize"] * len(OBJECTIVES),
            load_if_exists=True,
        )


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Optuna says nothing below a warning in here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _journal(path: Path) -> Any:
    """Storage in a file. A last line that a crash cut off is taken off it, or nobody could read on."""
    storages = require("distill", "optuna.storages")
    journal = require("distill", "optuna.storages.journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The default lock is a link to a relative path, whose age nobody can see once its owner is dead.
    lock = journal.JournalFileOpenLock(str(path))
    backend = journal.JournalFileBackend(str(path), lock_obj=lock)
    lock.acquire()
    try:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    finally:
        lock.release()
    return storages.JournalStorage(backend)


def _sampler(optuna: Any, name: str, population: int, seed: int) -> Any:
    """A sampler with a fresh state for every slot: a search that is stopped goes on as if it had not been."""

    shared = optuna.search_space.IntersectionSearchSpace()

    class Evolution(optuna.samplers.NSGAIISampler):  # type: ignore[misc]
        """NSGA-II that keeps what it knows of the parameters, and its parents always in the order of their trials.

        Optuna would look through all trials for each new sampler, and leave the parents of a generation unsorted the
        first time it uses them, but not when it reads them back.
        """

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {name: values for name, values in shared.calculate(study).items() if not values.single()}

        def select_parent(self, study: Any, generation: int) -> list[Any]:
            return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    def fresh(slot: int) -> Any:
        own = int.from_bytes(hashlib.sha256(f"{seed} {slot}".encode()).digest()[:4], "big")
        if name == TPE:
            return optuna.samplers.TPESampler(n_startup_trials=population, seed=own)
        return Evolution(population_size=population, seed=own)

    class BySlot(optuna.samplers.BaseSampler):  # type: ignore[misc]
        """Hands proposals on to the sampler of the trial's slot; neither kind needs to hear of the end of a trial."""

        def before_trial(self, study: Any, trial: Any) -> None:
            self._inner = fresh(trial.user_attrs.get(SLOT, 0))
            self._inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self._inner.sample_independent(study, trial, param_name, param_distribution)

    return BySlot()
