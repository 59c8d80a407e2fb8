"""Routes of the history: references, commits, branches, tags. Pull requests are opened by a commit."""

from __future__ import annotations

from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import REPO, HubError, Reply, Request, Routes

routes = Routes()
PROTECTED = "main"


@routes("GET", REPO + "/refs")
def refs(hub: HubState, request: Request, plural: str, repo_id: str) -> Reply:
    """Branches and tags, and pull requests if asked for."""
    repo = hub.open(request, plural, repo_id)

    def listed(found: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in found.items()]

    said = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    if request.query.get("include_prs"):
        pulls = {ref.removeprefix("refs/"): commit for ref, commit in repo.pulls.items()}
        said["pullRequests"] = listed(pulls, "refs/")
    return Reply(said)


@routes("GET", REPO + r"/commits/(?P<revision>[^/]+)")
def commits(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    """The history of a revision, newest first."""
    repo = hub.open(request, plural, repo_id)
    at = repo.commit(revision)
    chain = [at]
    while at.parent:
        at = repo.commit(at.parent)
        chain.append(at)
    said = [
        {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in chain
    ]
    return Reply(said)


@routes("POST", REPO + r"/branch/(?P<name>[^/]+)")
def create_branch(hub: HubState, request: Request, plural: str, repo_id: str, name: str) -> Reply:
    """A branch that starts at main or at the given point."""
    repo = hub.open(request, plural, repo_id, "write")
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid branch name: {name}")
    repo.branches[name] = repo.commit(request.json().get("startingPoint")).id
    return Reply({})


@routes("DELETE", REPO + r"/branch/(?P<name>[^/]+)")
def delete_branch(hub: HubState, request: Request, plural: str, repo_id: str, name: str) -> Reply:
    """Remove a branch; the main one stays."""
    repo = hub.open(request, plural, repo_id, "write")
    if name == PROTECTED:
        raise HubError(403, f"Cannot delete the branch {name}")
    _remove(repo.branches, name)
    return Reply({})


@routes("POST", REPO + r"/tag/(?P<revision>[^/]+)")
def create_tag(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    """A tag at a revision."""
    repo = hub.open(request, plural, repo_id, "write")
    name = request.require("tag")
    if name in repo.tags:
        raise HubError(409, f"Tag already exists: refs/tags/{name}")
    repo.tags[name] = repo.commit(revision).id
    return Reply({})


@routes("DELETE", REPO + r"/tag/(?P<name>[^/]+)")
def delete_tag(hub: HubState, request: Request, plural: str, repo_id: str, name: str) -> Reply:
    """Remove a tag."""
    repo = hub.open(request, plural, repo_id, "write")
    _remove(repo.tags, name)
    return Reply({})


def _remove(refs: dict[str, str], name: str) -> None:
    if refs.pop(name, None) is None:
        raise HubError(404, f"Reference not found: {name}", "RevisionNotFound")
