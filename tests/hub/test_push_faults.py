"""Every request of a push fails once in every way, and the push is killed at every step and every request.

Which requests there are is taken from a push that goes well, so no list can be incomplete.
"""

from __future__ import annotations

import re

import pytest

from hf_qep.errors import PublishError
from hf_qep.hub import remote
from hf_qep.hub.publish import execute
from tests.hub.pushing import REPO, Nth, add_base, client, content, plan, push, writes
from tests.loopback_hub.faults import Faults

NEW_PRIVATE = "a new private repository"
NEW_GATED = "a new public repository behind a gate"
UPDATE = "an update that replaces and deletes files"
BRANCH = "a new branch"
PULL_REQUEST = "a pull request"
OPTIONS = {
    NEW_PRIVATE: {},
    NEW_GATED: {"public": True, "accept_license": True},
    UPDATE: {},
    BRANCH: {"revision": "smaller"},
    PULL_REQUEST: {"create_pr": True},
}
KINDS = ("reset", "status", "truncate", "after")


class Case:
    """One way to push, and what must be there before and after."""

    def __init__(self, hub, name, folder):
        self.hub, self.name, self.folder, self.options = hub, name, folder, OPTIONS[name]
        self.wanted = content(folder)
        if name == NEW_GATED:
            card = self.wanted["README.md"].decode().replace("license: apache-2.0", "license: cc-by-nc-4.0")
            self.card = card
        self.before = {}

    def reset(self):
        """The Hub as it is before this push."""
        state = self.hub.state
        state.repos.clear()
        state.store.clear()
        self.hub.faults = Faults()
        add_base(self.hub, "cc-by-nc-4.0" if self.name == NEW_GATED else "apache-2.0")
        if self.name in (UPDATE, PULL_REQUEST):
            old = dict(self.wanted) | {"config.json": b"{}", "vocab.txt": b"old", "note.dat": b"of the user"}
            old["model.safetensors"] = b"old weights"
            self.hub.add_repo(REPO, files=old, private=True)
        elif self.name == BRANCH:
            self.hub.add_repo(REPO, files={"README.md": b"# main\n"}, private=True)
        self.before = self.everything()
        self.hub.log.clear()

    def everything(self):
        """(files by branch or pull request), empty without a repository."""
        if not self.hub.has_repo(REPO):
            return {}
        repo = self.hub.repo(REPO)
        return {ref: self.hub.files(REPO, ref) for ref in [*repo.branches, *repo.pulls]}

    def push(self, remote=None):
        """The push of this case."""
        return push(self.hub, self.folder, remote=remote, **self.options)

    def is_nothing_half(self):
        """Each branch is as it was before, or complete; what everybody can see is complete and behind its gate."""
        for ref, files in self.everything().items():
            assert files in ({}, self.before.get(ref), self.before.get("main"), self.after(ref)), f"{ref} is half there"
        if self.name == NEW_GATED and self.hub.has_repo(REPO) and not self.hub.repo(REPO).private:
            assert self.hub.files(REPO) == self.wanted
            assert self.hub.repo(REPO).gated == "auto"

    def after(self, ref):
        """What a complete push leaves at this place."""
        kept = {"note.dat": b"of the user"} if self.name in (UPDATE, PULL_REQUEST) else {}
        main_stays = self.name in (BRANCH, PULL_REQUEST) and ref == "main"
        return self.before["main"] if main_stays else self.wanted | kept

    def is_done(self, result):
        """Exactly one commit holds everything, and settings are those that were asked for."""
        repo = self.hub.repo(REPO)
        self.is_nothing_half()
        place = {BRANCH: "smaller", PULL_REQUEST: "refs/pr/1"}.get(self.name, "main")
        assert self.hub.files(REPO, place) == self.after(place)
        assert result.commit == repo.commit(place).id
        assert sum(commit.title.startswith("Upload tiny-llama-1bit") for commit in repo.commits) == 1
        assert len(repo.pulls) == (self.name == PULL_REQUEST)
        assert repo.private == (self.name != NEW_GATED)
        assert repo.gated == ("auto" if self.name == NEW_GATED else False)
        assert self.hub.leaks == []


@pytest.fixture(params=list(OPTIONS))
def case(request, loopback_hub, checkpoint):
    if request.param == NEW_GATED:
        card = checkpoint / "README.md"
        card.write_text(card.read_text().replace("license: apache-2.0", "license: cc-by-nc-4.0"))
    case = Case(loopback_hub, request.param, checkpoint)
    case.reset()
    return case


def requests_of(case) -> list[tuple[str, str]]:
    """Method and path of every request of a push that goes well."""
    case.reset()
    case.is_done(case.push())
    requests = [(method, path) for method, path, _ in case.hub.log]
    assert len(requests) >= 15
    case.reset()
    return requests


@pytest.mark.parametrize("kind", KINDS)
def test_a_push_outlives_each_of_its_requests_failing_once(case, kind):
    for number, request in enumerate(requests_of(case)):
        case.reset()
        case.hub.faults = Nth(number, kind)
        try:
            result = case.push()
        except PublishError as error:
            pytest.fail(f"request {number} {request} failing with {kind!r} stopped the push: {error}")
        assert case.hub.faults.seen > number, "the fault was never met"
        case.is_done(result)


def test_a_push_that_dies_with_any_request_goes_on_from_there(case, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)  # the Hub will not come back, however often it is asked
    for number, request in enumerate(requests_of(case)):
        case.reset()
        case.hub.faults = Nth(number, "after", dead=True)
        with pytest.raises(PublishError) as caught:
            case.push()
        case.hub.faults = Faults()
        case.is_nothing_half()
        says_what_is_missing(case, str(caught.value), request)
        stored = set(case.hub.state.store)
        case.hub.log.clear()
        case.is_done(case.push())
        sent = {path.rpartition("/")[2] for method, path, _ in case.hub.log if method == "PUT"}
        assert not (sent & stored), f"after {number} {request} weights were sent twice"


def says_what_is_missing(case, sentence, request):
    """The message names every file that is not there, and no other; or it was refused before anything was changed."""
    if "not done:" not in sentence:
        assert writes(case.hub) == [], (request, sentence)
        return
    assert "run the same command again" in sentence
    place = {BRANCH: "smaller", PULL_REQUEST: "refs/pr/1"}.get(case.name, "main")
    base = case.before.get("main", {})
    there = case.everything().get(place, base)
    missing = [name for name, data in case.wanted.items() if there.get(name) != data]
    named = re.search(rf"Not (confirmed to be )?in {REPO} yet: (.*?); not done", sentence)
    if named is None:
        assert missing == []
        assert f"All files are in {REPO}" in sentence
    elif missing or not named[1]:
        assert named[2].split(", ") == missing, (request, sentence)


class Killed(BaseException):
    """As sudden as a signal: no handler of the program sees it."""


def test_a_push_that_is_killed_before_any_step_goes_on_from_there(case):
    steps: list[str] = []
    case.push(client(case.hub, on_step=steps.append))
    assert len(steps) >= 10

    for number, step in enumerate(steps):
        case.reset()
        seen = []

        def kill(at, number=number, seen=seen):
            seen.append(at)
            if len(seen) > number:
                raise Killed

        with pytest.raises(Killed):
            case.push(client(case.hub, on_step=kill))
        assert seen[-1] == step
        case.is_nothing_half()
        case.is_done(case.push())


PROCESS = """
import os, sys
from pathlib import Path
from hf_qep.hub.publish import PushOptions, execute, plan_push
from hf_qep.hub.remote import Remote

def step(name):
    print(name, flush=True)
    if name.startswith({step!r}):
        os._exit(9)

remote = Remote(on_step=step)
execute(plan_push(Path({folder!r}), {repo!r}, PushOptions(public=True), remote=remote), remote=remote)
"""


@pytest.mark.parametrize("step", ["upload model.safetensors", "commit", "make the repository public"])
def test_a_process_that_ends_without_warning_leaves_nothing_half(loopback_hub, finished, step):
    add_base(loopback_hub)
    code = PROCESS.format(step=step, folder=str(finished), repo=REPO)
    done = loopback_hub.run_python(code)
    assert done.returncode == 9, done.stderr
    assert loopback_hub.repo(REPO).private
    assert loopback_hub.files(REPO) in ({}, content(finished))
    push(loopback_hub, finished, public=True)
    assert loopback_hub.files(REPO) == content(finished)
    assert not loopback_hub.repo(REPO).private
    assert len(loopback_hub.repo(REPO).commits) == 2


# --- waits and refusals


def test_waits_grow_and_end(loopback_hub, finished):
    waits: list[float] = []
    loopback_hub.fail("GET", "/api/whoami-v2", times=1000)
    slow = client(loopback_hub, sleep=waits.append)
    problem = next(p for p in plan(loopback_hub, finished, remote=slow).problems if "503" in p)
    assert "cannot ask who you are: the Hub answered 503" in problem
    assert "again later" in problem
    assert waits == sorted(waits) == [1.0 * 2**i for i in range(remote.TRIES - 1)]


@pytest.mark.parametrize("status", [400, 403, 404, 409, 413])
def test_a_refusal_is_not_tried_again(loopback_hub, finished, status):
    add_base(loopback_hub)
    loopback_hub.fail("POST", "/commit/", status, times=1000)
    with pytest.raises(PublishError) as caught:
        push(loopback_hub, finished)
    assert f"cannot commit: the Hub answered {status}" in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert sum("/commit/" in path for _, path, _ in loopback_hub.log) == 1
    assert loopback_hub.files(REPO) == {}


def test_somebody_elses_commit_in_between_is_noticed(loopback_hub, finished):
    add_base(loopback_hub)

    def disturb(step):
        if step == "commit":
            repo = loopback_hub.repo(REPO)
            head = repo.commit("main")
            repo.add_commit("main", "in between", head.tree, head.id, "bob")

    with pytest.raises(PublishError, match="somebody else changed alice/tiny-llama-1bit at the same time.*again"):
        push(loopback_hub, finished, remote=client(loopback_hub, on_step=disturb))
    assert loopback_hub.files(REPO) == {}
    push(loopback_hub, finished)
    assert loopback_hub.files(REPO) == content(finished)


def test_the_same_push_by_somebody_else_in_between_is_as_good(loopback_hub, finished):
    add_base(loopback_hub)
    twice = []

    def disturb(step):
        if step == "commit" and not twice:
            twice.append(push(loopback_hub, finished))

    result = push(loopback_hub, finished, remote=client(loopback_hub, on_step=disturb))
    assert result.commit == twice[0].commit


def test_what_the_hub_holds_is_read_back_and_compared(loopback_hub, finished, monkeypatch):
    """A Hub that stores something else than it was sent."""
    add_base(loopback_hub)
    from tests.loopback_hub.state import Blob, Repo

    honest = Repo.add_commit

    def lie(self, ref, title, tree, *more, **other):
        if title.startswith("Upload"):
            tree = dict(tree) | {"config.json": Blob.regular(b"{}")}
            del tree["README.md"]
        return honest(self, ref, title, tree, *more, **other)

    monkeypatch.setattr(Repo, "add_commit", lie)
    with pytest.raises(PublishError) as caught:
        push(loopback_hub, finished, public=True)
    assert "'README.md' is missing" in str(caught.value)
    assert "'config.json' has 2 bytes instead of" in str(caught.value)
    assert loopback_hub.repo(REPO).private


def test_a_weight_file_that_changes_while_it_is_sent_becomes_visible_nowhere(loopback_hub, checkpoint):
    add_base(loopback_hub)
    weights = checkpoint / "model.safetensors"

    def change(step):
        if step.startswith("upload"):
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    with pytest.raises(PublishError):
        push(loopback_hub, checkpoint, remote=client(loopback_hub, on_step=change))
    assert loopback_hub.files(REPO) == {}


@pytest.mark.parametrize("how", ["changed", "removed", "linked"])
def test_a_file_that_changes_after_it_was_checked_is_not_sent(loopback_hub, checkpoint, tmp_path, how):
    add_base(loopback_hub)
    card, other = checkpoint / "README.md", tmp_path / "other.md"
    checked = plan(loopback_hub, checkpoint)
    other.write_bytes(card.read_bytes())
    if how == "changed":
        card.write_bytes(card.read_bytes().replace(b"a", b"b"))
    else:
        card.unlink()
    if how == "linked":
        card.symlink_to(other)
    with pytest.raises(PublishError, match=r"'README\.md' changed after it was checked; nothing was sent"):
        execute(checked, remote=client(loopback_hub))
    assert loopback_hub.files(REPO) == {}
