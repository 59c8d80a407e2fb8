"""Routes that list and serve files: tree, paths-info, resolve."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlencode

from tests.loopback_hub.large_files import download_address
from tests.loopback_hub.state import Blob, Commit, HubState, git_oid
from tests.loopback_hub.wire import FILES, REPO, HubError, Reply, Request, Routes, ranged

routes = Routes()


def _entry(hub: HubState, path: str, blob: Blob, commit: Commit, expand: bool) -> dict[str, Any]:
    """A file as it is listed."""
    said: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.sha256:
        said["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        if found := hub.xet_content(blob.sha256):
            said["xetHash"] = found.name
    return said | _last_commit(commit, expand)


def _folder(path: str, commit: Commit, expand: bool) -> dict[str, Any]:
    said = {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path}
    return said | _last_commit(commit, expand)


def _last_commit(commit: Commit, expand: bool) -> dict[str, Any]:
    return {"lastCommit": {"id": commit.id, "title": commit.title, "date": commit.date}} if expand else {}


def _true(request: Request, name: str) -> bool:
    return request.query.get(name, "").lower() in ("1", "true")


@routes("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(hub: HubState, request: Request, plural: str, repo_id: str, revision: str, folder: str | None = None) -> Reply:
    """Files and folders below a folder, a page at a time."""
    commit = hub.open(request, plural, repo_id).commit(revision)
    expand, prefix = _true(request, "expand"), f"{folder.strip('/')}/" if folder else ""
    listed: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.tree.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        depth = len(parts) if _true(request, "recursive") else 1
        for level in range(1, min(depth + 1, len(parts))):
            name = prefix + "/".join(parts[:level])
            listed.setdefault(name, _folder(name, commit, expand))
        if len(parts) <= depth:
            listed[path] = _entry(hub, path, blob, commit, expand)
    if prefix and not listed:
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound", {"X-Repo-Commit": commit.id})
    start, entries = int(request.query.get("cursor") or 0), list(listed.values())
    end, headers = start + hub.page_size, {"X-Repo-Commit": commit.id}
    if end < len(entries):
        query = urlencode({**request.query, "cursor": end})
        headers["Link"] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return Reply(entries[start:end], headers=headers)


@routes("POST", REPO + r"/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    """The same of given files and folders; those that are not there are left out."""
    commit = hub.open(request, plural, repo_id).commit(revision)
    if "json" in (request.headers.get("Content-Type") or ""):
        wanted, expand = request.require("paths", list), bool(request.json().get("expand"))
    else:
        form = parse_qs(request.body.decode())
        wanted, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
    said = []
    for path in wanted:
        if path in commit.tree:
            said.append(_entry(hub, path, commit.tree[path], commit, expand))
        elif any(name.startswith(f"{path}/") for name in commit.tree):
            said.append(_folder(path, commit, expand))
    return Reply(said)


@routes("GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(
    hub: HubState, request: Request, repo_id: str, revision: str, path: str, plural: str | None = None
) -> Reply:
    """A file: small ones at once, large ones by a signed address of the storage host."""
    repo = hub.open(request, plural, repo_id, "read")
    commit = repo.commit(revision)
    blob = commit.tree.get(path)
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    name = f'"{blob.sha256 or blob.oid}"'
    headers |= {"ETag": name}
    if blob.sha256 is None:
        return ranged(blob.data or b"", request, headers)
    headers |= {"X-Linked-Etag": name, "X-Linked-Size": str(blob.size), "Location": download_address(hub, blob.sha256)}
    if found := hub.xet_content(blob.sha256):
        headers["X-Xet-Hash"] = found.name
        route = f"{hub.endpoint}/api/{repo.plural}/{repo.id}/xet-read-token/{commit.id}"
        headers["Link"] = f'<{route}>; rel="xet-auth"'
    return Reply(b"", 302, headers, "text/plain")
