"""Routes that write files: preupload and commit."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
from pathlib import PurePosixPath
from typing import Any

from tests.loopback_hub import cards
from tests.loopback_hub.spaces import rebuild
from tests.loopback_hub.state import MAX_REGULAR, Blob, Commit, HubState, Repo
from tests.loopback_hub.wire import REPO, HubError, Reply, Request, Routes

routes = Routes()


def _wants_pull(request: Request) -> bool:
    return request.query.get("create_pr", "").lower() in ("1", "true")


def _open(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Repo:
    """The repository, for who may write to this revision of it: to a pull request everybody who opened it may."""
    pull = revision.startswith("refs/pr/")
    repo = hub.open(request, plural, repo_id, "contribute" if pull or _wants_pull(request) else "write")
    if pull and repo.commit(revision).author != hub.accounts.needed(request).user:
        hub.open(request, plural, repo_id, "write")
    return repo


@routes("POST", REPO + r"/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    """How each file is to be sent, and the name of the content that is there already."""
    repo = _open(hub, request, plural, repo_id, revision)
    commit = repo.commit(revision)
    ignored = str(request.json().get("gitIgnore") or "").split()
    said = []
    for file in request.require("files", list):
        path = _checked(file["path"])
        large = repo.is_large(path, file["size"], base64.b64decode(file["sample"]), commit.tree)
        old = commit.tree.get(path)
        said.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                **({"oid": old.sha256 or old.oid} if old else {}),
            }
        )
    return Reply({"files": said, "commitOid": commit.id})


@routes("POST", REPO + r"/commit/(?P<revision>[^/]+)")
def commit(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    """All operations in one commit, or none of them."""
    repo = _open(hub, request, plural, repo_id, revision)
    header, operations = _lines(request.body)
    parent = _parent(repo, revision, header.get("parentCommit"), _wants_pull(request))
    tree = dict(parent.tree)
    for kind, value in operations:
        _apply(hub, repo, tree, kind, value)
    _check_card(repo, parent, tree)
    ref = f"refs/pr/{len(repo.pulls) + 1}" if _wants_pull(request) else revision
    author = hub.accounts.needed(request).user
    made = repo.add_commit(ref, header["summary"], tree, parent.id, author, header.get("description") or "")
    if repo.type == "space" and ref == "main":
        rebuild(hub, repo)
    said = {"success": True, "commitOid": made.id, "hookOutput": ""}
    said["commitUrl"] = f"{hub.endpoint}{repo.address}/commit/{made.id}"
    if _wants_pull(request):
        said["pullRequestUrl"] = f"{hub.endpoint}{repo.address}/discussions/{len(repo.pulls)}"
    return Reply(said)


def _parent(repo: Repo, revision: str, wanted: str | None, new_pull: bool) -> Commit:
    """The commit to build on. Raises HubError 412 if that is not the one the client expects."""
    head = repo.commit(revision)
    if not new_pull and revision not in repo.branches and revision not in repo.pulls:
        raise HubError(400, f"{revision} is not a branch: commits can only be added to branches and pull requests")
    if wanted is None or repo.find(wanted) is head:
        return head
    known = repo.find(wanted)
    if new_pull and known is not None:
        return known
    raise HubError(412, "A commit has happened since. Please refresh and try again.")


def _lines(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """(header, operations) of the lines of a commit."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        found = [(line["key"], line["value"]) for line in lines]
    except (ValueError, TypeError, KeyError):
        raise HubError(400, "each line of a commit must be a JSON object with key and value") from None
    if not found or found[0][0] != "header" or not found[0][1].get("summary"):
        raise HubError(400, "a commit begins with a header that has a summary")
    return found[0][1], found[1:]


def _checked(path: Any) -> str:
    """A path that may be in a repository. Raises HubError 400."""
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if not parts or path.startswith("/") or path != "/".join(parts) or {"..", ".", ".git"} & set(parts):
        raise HubError(400, f"Invalid path: {path!r}")
    return str(path)


def _apply(hub: HubState, repo: Repo, tree: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
    """One operation of a commit on its files."""
    path = _checked(str(value.get("path")).rstrip("/"))
    if kind == "file":
        tree[path] = _regular(path, value)
    elif kind == "lfsFile":
        tree[path] = _large(hub, path, value)
    elif kind == "deletedFile":
        if tree.pop(path, None) is None:
            raise HubError(404, f"A file with the name {path} does not exist", "EntryNotFound")
    elif kind == "deletedFolder":
        inside = [name for name in tree if name.startswith(f"{path}/")]
        if not inside:
            raise HubError(404, f"A folder with the name {path} does not exist", "EntryNotFound")
        for name in inside:
            del tree[name]
    else:
        raise HubError(400, f"unknown operation {kind!r} in a commit of {repo.id}")


def _regular(path: str, value: dict[str, Any]) -> Blob:
    try:
        data = base64.b64decode(value["content"], validate=True)
    except (KeyError, binascii.Error, TypeError):
        raise HubError(400, f"{path} is not base64") from None
    if len(data) > MAX_REGULAR:
        raise HubError(400, f"Your push was rejected because {path} is larger than 10 MiB and not a large file")
    if b"\0" in data[:512]:
        raise HubError(400, f"Your push was rejected because it contains binary files: {path}")
    return Blob.regular(data)


def _large(hub: HubState, path: str, value: dict[str, Any]) -> Blob:
    sha256 = str(value.get("oid"))
    size = hub.size_of(sha256)
    if value.get("algo") != "sha256" or size is None:
        message = f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}"
        raise HubError(400, message)
    if value.get("size") not in (None, size):
        raise HubError(400, f"{path} has {size} bytes, the commit says {value['size']}")
    return Blob.large(sha256, size)


def _check_card(repo: Repo, parent: Commit, tree: dict[str, Blob]) -> None:
    """Refuse a commit with a README that the Hub cannot use."""
    readme = tree.get("README.md")
    if readme is None or readme == parent.tree.get("README.md"):
        return
    errors, _ = cards.validate((readme.data or b"").decode(errors="replace"), repo.type)
    if errors:
        raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
