"""What a student may cost, for which work, and what to say when nothing costs so little."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from hf_qep.errors import ConfigError

if TYPE_CHECKING:
    from hf_qep.search.costs import Cost

Item = TypeVar("Item")
UNITS = {"latency_ms": "ms", "memory_mb": "MB", "parameters": "parameters"}
"""Unit of each quantity that can be limited."""


@dataclass(frozen=True)
class Workload:
    """The work whose cost counts.

    batch: rows at once. sequence: tokens of each that are processed at once. context: tokens whose keys and values are
    kept (decoders); 0 for none. device: torch's name of it. threads: of the processor; None leaves torch's own number.
    dtype: name of the torch type of weights and activations.
    """

    batch: int = 1
    sequence: int = 128
    context: int = 0
    device: str = "cpu"
    threads: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("sequence", 1), ("context", 0), ("threads", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"`{name}` of the workload must be at least {least}, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """The most that a student may cost; None is no limit. MB are 10^6 bytes."""

    latency_ms: float | None = None
    memory_mb: float | None = None
    parameters: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not 0 < value < math.inf:
                raise ConfigError(f"the limit `{name}` must be a positive number, not {value}")

    def given(self) -> dict[str, float]:
        """The limits there are, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def margins(self, cost: Cost) -> dict[str, float]:
        """(cost - limit) / limit for every limit: above 0 it is missed. No unit, so that they can be summed."""
        return {name: (getattr(cost, name) - most) / most for name, most in self.given().items()}

    def violations(self, cost: Cost) -> dict[str, float]:
        """What is too much, by name, in the unit of the limit; empty if all limits are met."""
        over = {name: getattr(cost, name) - most for name, most in self.given().items()}
        return {name: excess for name, excess in over.items() if excess > 0}

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Limits:
        """Inverse of `to_dict`."""
        return cls(**values)


def nearest(candidates: Sequence[tuple[Item, Cost]], limits: Limits) -> tuple[Item, Cost]:
    """The candidate with the least sum of relative excesses, the first of equals. Raises ValueError without any."""
    if not candidates:
        raise ValueError("there is no candidate")
    return min(candidates, key=lambda pair: sum(max(margin, 0.0) for margin in limits.margins(pair[1]).values()))


def within(candidates: Sequence[tuple[Item, Cost]], limits: Limits) -> list[tuple[Item, Cost]]:
    """The candidates that meet the limits, in their order.

    Raises ConfigError if none does; it names the nearest one and what it misses.
    """
    found = [pair for pair in candidates if not limits.violations(pair[1])]
    if not found:
        raise ConfigError(_none_fits(candidates, limits))
    return found


def _none_fits(candidates: Sequence[tuple[Item, Cost]], limits: Limits) -> str:
    if not candidates:
        return "no student was found that could be judged against the limits; allow more trials"
    item, cost = nearest(candidates, limits)
    missed = [
        f"`{name}` {getattr(cost, name):.6g} is {excess:.3g} {UNITS[name]} ({excess / limits.given()[name]:.1%}) "
        f"above the limit of {limits.given()[name]:.6g}"
        for name, excess in limits.violations(cost).items()
    ]
    return (
        f"none of {len(candidates)} students meets the limits; the nearest one, {item}, costs {cost}: "
        f"{'; '.join(missed)}; raise the limit, or allow smaller students in the search space"
    )
