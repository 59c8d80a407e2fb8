"""Deploy a Space: create or update it, wait until it runs, read back what the Hub has.

Order: a private Space; variables, secrets and hardware, so that the first build already has them; one commit with all
files; only then, if asked, public. Every step looks first whether it is done, so the same command can be repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_qep.errors import SpaceError
from hf_qep.files import sha256
from hf_qep.hub.preflight import refuse_problems
from hf_qep.hub.push_plan import differences
from hf_qep.hub.remote import HubRefusal, Remote
from hf_qep.hub.space_plan import DeployOptions, DeployPlan, plan_deploy, space_state
from hf_qep.progress import SILENT, Progress

__all__ = ["DeployOptions", "DeployPlan", "DeployResult", "deploy", "plan_deploy", "refuse"]

POLL_S = 5.0
"""Seconds between two looks at a Space that is being built."""
FAILED = ("BUILD_ERROR", "RUNTIME_ERROR", "CONFIG_ERROR", "NO_APP_FILE", "DELETING")
ASLEEP = ("PAUSED", "STOPPED", "SLEEPING")
_ADVICE = {
    "BUILD_ERROR": "look at the build log, correct requirements.txt and deploy again",
    "RUNTIME_ERROR": "look at the log of the container; a larger --hardware helps if memory was short",
    "CONFIG_ERROR": "correct the front matter of README.md, or a name that is both a variable and a secret",
    "NO_APP_FILE": "the folder must hold app.py; make it with: hf-qep space init",
}


@dataclass(frozen=True)
class DeployResult:
    """What a deployment did and found. changed: whether a commit was made. stage: None if it was not waited for."""

    repo_id: str
    url: str
    commit: str
    changed: bool
    visibility: str
    stage: str | None
    hardware: str | None
    variables: dict[str, str]
    secrets: tuple[str, ...]
    files: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; of secrets the names only."""
        return {**vars(self), "secrets": list(self.secrets)}


def refuse(plan: DeployPlan) -> None:
    """Raise for a plan with problems: UnsafeContentError if a file must not be published, else SpaceError."""
    refuse_problems(plan.problems, plan.unsafe, SpaceError)


def deploy(
    plan: DeployPlan,
    *,
    remote: Remote | None = None,
    progress: Progress = SILENT,
    sleep: Callable[[float], None] = time.sleep,
) -> DeployResult:
    """Do what `plan` says. Raises SpaceError or HubRefusal; the same call again goes on from there."""
    refuse(plan)
    remote = remote or Remote()
    try:
        _prepare(plan, remote)
        commit, changed = _send(plan, remote)
        if plan.options.public is not None:
            _show(plan, remote)
    except HubRefusal as error:
        if error.status == 402:
            raise SpaceError(
                f"{error}. The Hub wants a paid plan for this: Gradio Spaces and larger hardware may need PRO or a "
                "payment method. Choose another --hardware, or run it yourself: hf-qep space run"
            ) from None
        raise
    stage = _wait(plan, remote, progress, sleep) if plan.options.wait else None
    return _read_back(plan, remote, commit, changed, stage)


def _prepare(plan: DeployPlan, remote: Remote) -> None:
    """The Space itself, its variables, secrets and hardware."""
    api, repo_id = remote.api, plan.repo_id
    if plan.state is None:
        remote.call(
            f"create the Space {repo_id}",
            lambda: api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=True, exist_ok=True),
        )
        plan.state = space_state(remote, repo_id)
        if plan.state is None:
            raise SpaceError(f"{repo_id} was made, but the Hub does not show it to this token; check the token")
    for name, value in plan.new_variables.items():
        remote.call(f"set the variable {name}", lambda n=name, v=value: api.add_space_variable(repo_id, n, v))
    for name, value in plan.options.secrets.items():
        remote.call(f"set the secret {name}", lambda n=name, v=value: api.add_space_secret(repo_id, n, v))
    wanted = plan.options.hardware
    if wanted and wanted != plan.state.hardware:
        remote.call(f"ask for the hardware {wanted}", lambda: api.request_space_hardware(repo_id, wanted))


def _send(plan: DeployPlan, remote: Remote) -> tuple[str, bool]:
    """One commit with what differs; returns its name and whether one was needed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if plan.state is None:
        raise SpaceError(f"{plan.repo_id} is gone; deploy again")
    sends, deletes = plan.sends, plan.deletes  # each look compares all files
    if not sends and not deletes:
        return plan.state.head, False
    digests = {file.path: file.sha256 for file in plan.files}
    operations: list[Any] = []
    for name in sends:
        path = plan.folder / name
        if path.is_symlink() or sha256(path) != digests[name]:
            raise SpaceError(f"{name!r} changed after it was checked; nothing was sent, deploy again")
        operations.append(CommitOperationAdd(name, path.read_bytes()))
    operations += [CommitOperationDelete(name) for name in deletes]
    tried = False

    def commit() -> str:
        nonlocal tried
        state = space_state(remote, plan.repo_id) if tried else None
        if state and not differences(plan.files, plan.folder, state.files):
            return state.head  # the answer to the first try was lost after it had worked
        tried = True
        info = remote.api.create_commit(
            plan.repo_id, operations, repo_type="space", commit_message="Deploy with hf-qep space deploy"
        )
        return str(info.oid)

    return remote.call("commit the files of the Space", commit), True


def _show(plan: DeployPlan, remote: Remote) -> None:
    """Public or private, as asked."""
    if plan.state is not None and plan.state.private != (not plan.public):
        remote.call(
            f"make {plan.repo_id} {'public' if plan.public else 'private'}",
            lambda: remote.api.update_repo_settings(plan.repo_id, private=not plan.public, repo_type="space"),
        )


def _wait(plan: DeployPlan, remote: Remote, progress: Progress, sleep: Callable[[float], None]) -> str:
    """Until it runs. Raises SpaceError if it fails, or is not ready in time."""
    limit, waited, woken, seen = plan.options.timeout_s, 0.0, False, ""
    with progress.bar(f"waiting for {plan.repo_id}", int(limit), "s") as bar:
        while True:
            runtime = remote.call("ask how the Space is", lambda: remote.api.get_space_runtime(plan.repo_id))
            stage = str(getattr(runtime.stage, "value", runtime.stage))
            if stage == "RUNNING":
                return stage
            if stage in FAILED and stage == seen:  # the state before the last change can be shown once
                raise SpaceError(_failure(plan, stage, str(runtime.raw.get("errorMessage") or "")))
            if stage in ASLEEP and not woken:
                woken = True
                remote.call("wake the Space", lambda: remote.api.restart_space(plan.repo_id))
            seen = stage
            if waited >= limit:
                raise SpaceError(
                    f"the Space is still {stage} after {limit:g} seconds; it goes on by itself, look at {plan.url}, or "
                    "wait longer with --timeout"
                )
            sleep(POLL_S)
            waited += POLL_S
            bar.advance(int(POLL_S), stage)


def _failure(plan: DeployPlan, stage: str, message: str) -> str:
    """One sentence about a Space that does not run."""
    said = f" ({' '.join(message.split())[:300]})" if message.strip() else ""
    log = f"{plan.url}?logs={'build' if stage == 'BUILD_ERROR' else 'container'}"
    return f"the Space ended in {stage}{said}; {_ADVICE.get(stage, 'look at its log')}: {log}"


def _read_back(plan: DeployPlan, remote: Remote, commit: str, changed: bool, stage: str | None) -> DeployResult:
    """Compare files, variables, secrets and visibility on the Hub with what was wanted. Raises SpaceError."""
    state = space_state(remote, plan.repo_id)
    if state is None:
        raise SpaceError(f"{plan.repo_id} cannot be read back; look at {plan.url}")
    wrong = [f"{name!r} {what}" for name, what in sorted(differences(plan.files, plan.folder, state.files).items())]
    there = state.variables
    wrong += [f"the variable {n} is {there.get(n)!r}" for n, v in plan.variables.items() if there.get(n) != v]
    wrong += [f"the secret {name} is missing" for name in plan.options.secrets if name not in state.secrets]
    wanted = plan.options.hardware
    if wanted and state.hardware != wanted:
        wrong.append(f"the hardware is {state.hardware}")
    if state.private == plan.public:
        wrong.append(f"it is {'private' if state.private else 'public'}")
    if wrong:
        raise SpaceError(f"{plan.repo_id} is not as it was deployed: {'; '.join(wrong)}. Deploy again")
    return DeployResult(
        plan.repo_id,
        plan.url,
        commit,
        changed,
        "private" if state.private else "public",
        stage,
        state.hardware,
        state.variables,
        state.secrets,
        len(plan.files),
    )
