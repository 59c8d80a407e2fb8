"""Stop that reaches the loop which writes tokens, in this process or in a forked one."""

from __future__ import annotations

import itertools
from multiprocessing.sharedctypes import RawArray
from threading import Lock

_SLOTS = 4096


class Stops:
    """One flag per run, in memory that forked workers share (ZeroGPU runs the models in one).

    A visitor has one run at a time: a new ticket replaces the old one.
    """

    def __init__(self) -> None:
        self._flags = RawArray("b", _SLOTS)
        self._tickets: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._lock = Lock()

    def issue(self, session: str) -> int:
        """A ticket for a run that is about to wait in the queue; a run of the same visitor is stopped."""
        with self._lock:
            if session in self._tickets:
                self.stop(self._tickets[session])
            ticket = next(self._numbers)
            self._tickets[session] = ticket
            self._flags[ticket % _SLOTS] = 0
        return ticket

    def ticket_of(self, session: str) -> int | None:
        """The ticket of a visitor's waiting or running comparison."""
        return self._tickets.get(session)

    def stop(self, ticket: int) -> None:
        """Ask the run to end; it does so after the token it is at."""
        self._flags[ticket % _SLOTS] = 1

    def is_stopped(self, ticket: int) -> bool:
        """Whether the run was asked to end."""
        return bool(self._flags[ticket % _SLOTS])

    def stop_session(self, session: str) -> bool:
        """Stop what a visitor has waiting or running; False if there is nothing."""
        ticket = self._tickets.get(session)
        if ticket is None:
            return False
        self.stop(ticket)
        return True

    def finish(self, session: str, ticket: int) -> None:
        """The run is over, for whatever reason."""
        self.stop(ticket)
        with self._lock:
            if self._tickets.get(session) == ticket:
                del self._tickets[session]
