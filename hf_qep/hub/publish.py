"""Send a checked plan to the Hub so that the repository is never half there.

Order: a private repository; the gate; the large files, which no commit holds yet; one commit with everything; all
names, sizes and digests read back; only then, if asked, the repository is made public.
One commit instead of "config last", because a commit is the only thing on the Hub that happens as a whole: before it a
reader finds nothing of this push, after it all of it, and files of an older push vanish in the same moment. Killed
anywhere, the same command goes on: stored content is not sent again, and what is done is seen by looking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_qep.errors import PublishError
from hf_qep.hub.preflight import LocalFile, refuse_problems
from hf_qep.hub.push_plan import (
    MAX_PULL_REQUESTS,
    PushOptions,
    PushPlan,
    differences,
    plan_push,
    stale_files,
)
from hf_qep.hub.remote import HubRefusal, Remote
from hf_qep.progress import SILENT, Progress

__all__ = ["PushOptions", "PushPlan", "PushResult", "execute", "plan_push"]


@dataclass(frozen=True)
class PushResult:
    """What a push did. changed: whether a commit was made. pull_request: its reference."""

    repo_id: str
    url: str
    commit: str
    changed: bool
    visibility: str
    gate: str
    files: tuple[LocalFile, ...]
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "repo_id": self.repo_id,
            "url": self.url,
            "commit": self.commit,
            "changed": self.changed,
            "visibility": self.visibility,
            "gate": self.gate,
            "pull_request": self.pull_request,
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files],
        }


def refuse(plan: PushPlan) -> None:
    """Raise for a plan with problems: UnsafeContentError if one is unsafe, else PublishError."""
    refuse_problems(plan.problems, plan.unsafe, PublishError)


def execute(plan: PushPlan, *, remote: Remote | None = None, progress: Progress = SILENT) -> PushResult:
    """Do what `plan` says. Raises PublishError that names the step and the files that are not there yet."""
    refuse(plan)
    remote = remote or Remote()
    todo = _Todo([file.path for file in plan.sends])
    with todo.named_in_errors(plan):
        if not plan.options.create_pr:
            _prepare(plan, remote)
        found = _commit_with(plan, remote)
        commit, reference = found or _send(plan, remote, todo, progress)
        todo.files.clear()
        todo.steps = ["read back what the Hub has"]
        _read_back(plan, remote, commit)
        if not plan.options.create_pr:
            _settle(plan, remote, todo)
    where = reference or plan.options.revision
    return PushResult(
        plan.repo_id,
        f"{plan.endpoint}/{plan.repo_id}" + (f"/tree/{where}" if where != "main" else ""),
        commit,
        found is None,
        plan.visibility,
        plan.gate or "none",
        tuple(plan.files),
        reference,
    )


class _Todo:
    """What is not done yet, for the message of a push that stops."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.steps = ["commit", "read back what the Hub has"]
        self.commit_tried = False
        """whether a commit was asked for, which the Hub may have made without being heard"""

    @contextmanager
    def named_in_errors(self, plan: PushPlan) -> Iterator[None]:
        """Add to a refusal of the Hub what is missing because of it."""
        try:
            yield
        except HubRefusal as error:
            where = f"Not {'confirmed to be ' if self.commit_tried else ''}in {plan.repo_id} yet"
            missing = f"{where}: {', '.join(self.files)}" if self.files else f"All files are in {plan.repo_id}"
            steps = ", ".join(self.steps)
            advice = "run the same command again, it goes on from here"
            raise HubRefusal(f"{error}. {missing}; not done: {steps}; {advice}", error.status) from None


def _prepare(plan: PushPlan, remote: Remote) -> None:
    """Repository, gate and branch, before any content: what is gated later was open for a while."""
    if plan.state is None:
        remote.create(plan.repo_id)
    state = remote.repo(plan.repo_id, plan.options.revision)
    if state is None:
        raise PublishError(f"{plan.repo_id} was made, but the Hub does not show it to this token; check the token")
    if not state.private and not plan.shown_to_all:
        raise PublishError(f"{plan.repo_id} is public although a private one was asked for; nothing was sent")
    if state.gated != plan.gate and (plan.gate or plan.options.gated):
        remote.set_gate(plan.repo_id, plan.gate)
    if state.head is None and not plan.options.revision.startswith("refs/"):
        remote.branch(plan.repo_id, plan.options.revision)


def _commit_with(plan: PushPlan, remote: Remote) -> tuple[str, str | None] | None:
    """(commit, pull request or None) that holds exactly this push already: on the branch, or in one of the newest pull
    requests if one is to be opened. None if there is none."""
    places = [plan.options.revision]
    if plan.options.create_pr:
        places += remote.pull_requests(plan.repo_id)[:MAX_PULL_REQUESTS]
    for place in places:
        state = remote.repo(plan.repo_id, place)
        if state is None or state.head is None:
            continue
        there = remote.files(plan.repo_id, state.head)
        if not differences(plan.files, plan.folder, there) and not stale_files(plan.files, there):
            return state.head, place if place.startswith("refs/pr/") and plan.options.create_pr else None
    return None


def _send(plan: PushPlan, remote: Remote, todo: _Todo, progress: Progress) -> tuple[str, str | None]:
    """Store the weights, then commit everything; returns the commit and the reference of its pull request."""
    from huggingface_hub import CommitOperationDelete

    create_pr, revision = plan.options.create_pr, plan.options.revision
    state = remote.repo(plan.repo_id, revision)
    parent = state.head if state else None
    there = remote.files(plan.repo_id, parent) if parent else {}
    operations = [_addition(plan, file) for file in plan.files]
    weights = [(file, op) for file, op in zip(plan.files, operations, strict=True) if file.is_weights]
    with progress.bar("upload", len(weights) + 1, "file") as bar:
        for file, operation in weights:
            remote.store(plan.repo_id, operation, revision=revision, create_pr=create_pr)
            if operation.upload_info.is_hashed and operation.upload_info.sha256.hex() != file.sha256:
                raise PublishError(f"{file.path!r} changed while it was sent; nothing is visible, run the push again")
            bar.advance(detail=file.path)
        todo.commit_tried = True
        deletions = [CommitOperationDelete(name) for name in stale_files(plan.files, there)]
        commit = remote.commit(
            plan.repo_id,
            [*operations, *deletions],
            message=plan.message,
            revision=revision,
            parent=parent,
            create_pr=create_pr,
            is_done=lambda: _commit_with(plan, remote),
        )
        bar.advance(detail="commit")
    return commit


def _addition(plan: PushPlan, file: LocalFile) -> Any:
    """Upload of one file. Small ones are taken as the bytes that were checked, so that what is sent was scanned."""
    from huggingface_hub import CommitOperationAdd

    path = plan.folder / file.path
    changed = f"{file.path!r} changed after it was checked; nothing was sent, run the push again"
    if path.is_symlink() or not path.is_file():
        raise PublishError(changed)
    if file.is_weights:
        return CommitOperationAdd(file.path, str(path))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise PublishError(changed)
    return CommitOperationAdd(file.path, content)


def _read_back(plan: PushPlan, remote: Remote, commit: str) -> None:
    """Compare names, sizes and digests on the Hub with those that were checked here."""
    wrong = differences(plan.files, plan.folder, remote.files(plan.repo_id, commit))
    if wrong:
        said = "; ".join(f"{name!r} {what}" for name, what in sorted(wrong.items()))
        raise PublishError(f"the Hub does not hold what was sent: {said}. Run the same command again")


def _settle(plan: PushPlan, remote: Remote, todo: _Todo) -> None:
    """Make it public if asked, as the very last thing, and read the settings back."""
    state = remote.repo(plan.repo_id)
    todo.steps = ["make the repository public"] if plan.options.public and state and state.private else []
    todo.steps.append("read the settings back")
    if plan.options.public and state is not None and state.private:
        if state.gated != plan.gate:
            raise PublishError(f"the gate of {plan.repo_id} is {state.gated} instead of {plan.gate}; it stays private")
        remote.make_public(plan.repo_id)
        state = remote.repo(plan.repo_id)
    if state is None or state.private == plan.shown_to_all or state.gated != plan.gate:
        found = "gone" if state is None else f"{'private' if state.private else 'public'}, gate {state.gated or 'none'}"
        raise PublishError(
            f"all files of {plan.repo_id} are there, but it is {found} instead of {plan.visibility}, gate "
            f"{plan.gate or 'none'}; check its settings on the Hub"
        )
