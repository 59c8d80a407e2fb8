"""Routes of large files: the agreement at the Hub, the bytes at the storage host, which must never see a token.

Signed addresses name what their holder may do; the storage host asks for nothing else.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from tests.loopback_hub.state import Blob, HubState
from tests.loopback_hub.wire import FILES, REPO, HubError, Reply, Request, Routes, ranged

routes = Routes()
storage_routes = Routes()
"""Those of the storage host."""
OID = r"(?P<oid>[0-9a-f]{64})"


def _sign(hub: HubState, host: str, path: str) -> str:
    """An address that may be used by whoever knows it."""
    ticket = secrets.token_hex(16)
    hub.tickets[ticket] = path
    return f"{host}{path}?ticket={ticket}"


def _check(hub: HubState, request: Request) -> None:
    if hub.tickets.get(request.query.get("ticket", "")) != request.path:
        raise HubError(403, "the signature of the address is missing or wrong")


def download_address(hub: HubState, sha256: str) -> str:
    """Where the content of a large file can be fetched."""
    return _sign(hub, hub.storage, f"/content/{sha256}")


@routes("POST", FILES + r"\.git/info/lfs/objects/batch")
def batch(hub: HubState, request: Request, repo_id: str, plural: str | None = None) -> Reply:
    """How to send each file: not at all, in one piece, or in parts."""
    hub.open(request, plural, repo_id, "contribute")
    if request.require("operation") != "upload":
        raise HubError(400, "only uploads are supported")
    multipart = hub.part_size is not None and "multipart" in (request.json().get("transfers") or ["basic"])
    said = []
    for item in request.require("objects", list):
        oid, size = item["oid"], item["size"]
        actions: dict[str, Any] = {}
        if hub.size_of(oid) is None:
            upload = _parts(hub, oid, size) if multipart and size > (hub.part_size or 0) else _piece(hub, oid)
            verify = {"href": f"{hub.endpoint}/{repo_id}.git/info/lfs/verify/{oid}"}
            actions = {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
        said.append({"oid": oid, "size": size, **actions})
    transfer = "multipart" if multipart else "basic"
    return Reply({"transfer": transfer, "objects": said}, content_type="application/vnd.git-lfs+json")


def _piece(hub: HubState, oid: str) -> dict[str, Any]:
    return {"href": _sign(hub, hub.storage, f"/upload/{oid}")}


def _parts(hub: HubState, oid: str, size: int) -> dict[str, Any]:
    length = hub.part_size or size
    hub.parts[oid] = {}
    count = -(-size // length)
    addresses = {f"{n:05d}": _sign(hub, hub.storage, f"/upload/{oid}/{n}") for n in range(1, count + 1)}
    return {
        "href": _sign(hub, hub.endpoint, f"/api/complete_multipart/{oid}"),
        "header": {"chunk_size": str(length), **addresses},
    }


def _keep(hub: HubState, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"the content does not have the name {oid}")
    hub.store[oid] = data


@routes("POST", r"/api/complete_multipart/" + OID)
def complete(hub: HubState, request: Request, oid: str) -> Reply:
    """Join the parts of a file."""
    _check(hub, request)
    got = hub.parts.get(oid, {})
    wanted = [(part["partNumber"], part["etag"]) for part in request.require("parts", list)]
    for number, etag in wanted:
        if number not in got or hashlib.md5(got[number]).hexdigest() != etag.strip('"'):
            raise HubError(400, f"part {number} of {oid} is missing or damaged")
    _keep(hub, oid, b"".join(got[number] for number, _ in wanted))
    del hub.parts[oid]
    return Reply({})


@routes("POST", FILES + r"\.git/info/lfs/verify/" + OID)
def verify(hub: HubState, request: Request, repo_id: str, oid: str, plural: str | None = None) -> Reply:
    """Whether a file has arrived."""
    hub.accounts.needed(request)
    if hub.size_of(oid) != request.require("size", int):
        raise HubError(404, f"the content of {oid} did not arrive")
    return Reply({})


@routes("GET", REPO + r"/xet-(?P<kind>read|write)-token/(?P<revision>.+)")
def xet_token(hub: HubState, request: Request, plural: str, repo_id: str, kind: str, revision: str) -> Reply:
    """Where hf_xet finds its store."""
    if hub.xet is None:
        raise HubError(404, "this Hub does not offer xet")
    hub.open(request, plural, repo_id, "read" if kind == "read" else "contribute")
    said = hub.xet.access()
    headers = {
        "X-Xet-Cas-Url": said["casUrl"],
        "X-Xet-Access-Token": said["accessToken"],
        "X-Xet-Token-Expiration": str(said["exp"]),
    }
    return Reply(said, headers=headers)


@storage_routes("PUT", "/upload/" + OID)
def upload(hub: HubState, request: Request, oid: str) -> Reply:
    """A file in one piece."""
    _check(hub, request)
    _keep(hub, oid, request.body)
    return Reply(b"")


@storage_routes("PUT", "/upload/" + OID + r"/(?P<number>\d+)")
def upload_part(hub: HubState, request: Request, oid: str, number: str) -> Reply:
    """A part of a file."""
    _check(hub, request)
    if oid not in hub.parts:
        raise HubError(404, f"no upload of {oid} was begun")
    hub.parts[oid][int(number)] = request.body
    return Reply(b"", headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@storage_routes("GET", "/content/" + OID)
def download(hub: HubState, request: Request, oid: str) -> Reply:
    """The content of a file."""
    _check(hub, request)
    if hub.size_of(oid) is None:
        raise HubError(404, f"no content {oid}")
    return ranged(hub.content(Blob.large(oid, 0)), request, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
