"""Answers that go wrong on purpose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["status", "reset", "truncate", "cut", "short", "garbled", "after"]
KINDS = ("status", "reset", "truncate", "cut", "short", "garbled", "after")
ANSWERED = ("truncate", "cut", "short", "garbled", "after")
"""Kinds in which what was asked for is done."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match.

    status: nothing is done, the answer is `status`. reset: nothing is done, the connection breaks. truncate: it is
    done, half of the answer arrives. cut: the same, and the connection breaks. short: the half claims to be all.
    garbled: the last byte of the answer is another one. after: it is done, the connection breaks before the answer.
    """

    method: str
    path: re.Pattern[str]
    kind: Kind = "status"
    status: int = 503
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of fault {self.kind!r}; one of {KINDS}")

    def fits(self, method: str, target: str) -> bool:
        """Whether a request is hit; `target` is path and query, "*" stands for every method."""
        return self.times > 0 and self.method in ("*", method) and self.path.search(target) is not None


class Faults:
    """The faults that are still to come. Used under the lock of the Hub."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Let a fault happen; of several that fit the oldest comes first."""
        self._waiting.append(fault)

    def take(self, method: str, target: str) -> Fault | None:
        """The fault of this request, used up by it."""
        for fault in self._waiting:
            if fault.fits(method, target):
                fault.times -= 1
                return fault
        return None

    @property
    def pending(self) -> list[Fault]:
        """Faults that did not happen yet: a test can see that its fault was met."""
        return [fault for fault in self._waiting if fault.times > 0]
