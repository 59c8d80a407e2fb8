"""Pushing to the loopback Hub without waiting, and comparing what it holds with a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_qep.hub.publish import PushOptions, PushPlan, PushResult, execute, plan_push
from hf_qep.hub.remote import Remote
from tests.hub.checkpoints import BASE
from tests.loopback_hub.faults import Fault
from tests.loopback_hub.server import LoopbackHub

REPO = "alice/tiny-llama-1bit"


def client(
    hub: LoopbackHub,
    *,
    token: str | None = None,
    on_step: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] = lambda seconds: None,
) -> Remote:
    """A Remote of alice, or of the owner of `token`, that does not wait."""
    from huggingface_hub import HfApi

    return Remote(HfApi(endpoint=hub.endpoint, token=token or hub.token), sleep=sleep, on_step=on_step)


def plan(
    hub: LoopbackHub, folder: Path, repo_id: str = REPO, *, remote: Remote | None = None, **options: Any
) -> PushPlan:
    """The plan of a push."""
    return plan_push(folder, repo_id, PushOptions(**options), remote=remote or client(hub))


def push(
    hub: LoopbackHub, folder: Path, repo_id: str = REPO, *, remote: Remote | None = None, **options: Any
) -> PushResult:
    """Plan and push, as the command does."""
    remote = remote or client(hub)
    return execute(plan(hub, folder, repo_id, remote=remote, **options), remote=remote)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def add_base(hub: LoopbackHub, licence: str = "apache-2.0", **more: Any) -> None:
    """The original on the Hub."""
    hub.add_repo(BASE, card={"license": licence, "library_name": "transformers"}, **more)


def writes(hub: LoopbackHub) -> list[tuple[str, str, int]]:
    """The requests of the log that may change something; the Hub is asked for a check of the card by POST as well."""
    reads = ("/api/validate-yaml",)
    return [entry for entry in hub.log if entry[0] not in ("GET", "HEAD") and entry[1] not in reads]


class Nth:
    """In the place of the Hub's faults: the request number `at` (from 0) goes wrong, and all later ones if `dead`."""

    def __init__(self, at: int, kind: str = "reset", *, dead: bool = False) -> None:
        self.at, self.dead, self.seen = at, dead, 0
        self.fault = Fault("*", re.compile(""), kind, times=1_000_000)

    def take(self, method: str, target: str) -> Fault | None:
        """The fault of this request; called once for each."""
        number, self.seen = self.seen, self.seen + 1
        return self.fault if number == self.at or (self.dead and number > self.at) else None
