"""Routes of accounts and repositories: who am I, create, delete, settings, and what a repository says of itself."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.loopback_hub import cards
from tests.loopback_hub.state import ATTRIBUTES, Blob, Commit, HubState, Repo
from tests.loopback_hub.wire import REPO, HubError, Reply, Request, Routes

routes = Routes()
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?")
SPACE_README = """---
title: {title}
emoji: 🚀
colorFrom: green
colorTo: blue
sdk: {sdk}
sdk_version: "6.16.0"
app_file: app.py
pinned: false
---
"""


@routes("GET", "/api/whoami-v2")
def whoami(hub: HubState, request: Request) -> Reply:
    """The account of a token."""
    return Reply(hub.accounts.whoami(hub.accounts.needed(request)))


@routes("POST", "/api/repos/create")
def create(hub: HubState, request: Request) -> Reply:
    """A new repository with its first commit; 409 with its address if it is there already."""
    token, wanted = hub.accounts.needed(request), request.json()
    namespace, name = wanted.get("organization") or token.user, request.require("name")
    repo_id, kind = f"{namespace}/{name}", wanted.get("type") or "model"
    if kind not in ("model", "dataset", "space"):
        raise HubError(400, f'"type" must be one of [dataset, model, space], got {kind!r}')
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise HubError(400, f"Invalid repo name: {name}")
    if not hub.accounts.may(token, repo_id, "write"):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    if old := hub.repos.get((kind, repo_id)):
        said = f"You already created this {kind} repo"
        return Reply({"error": said, "url": hub.endpoint + old.address}, 409, {"X-Error-Message": said})
    sdk, hardware = wanted.get("sdk"), wanted.get("hardware")
    if kind == "space" and sdk not in cards.SDKS:
        raise HubError(400, f'"sdk" must be one of [{", ".join(cards.SDKS)}], got {sdk!r}')
    if kind == "space" and (refused := {sdk, hardware} & hub.unpaid):
        raise HubError(402, f"A paid subscription is required for: {', '.join(sorted(map(str, refused)))}")
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    repo = first_commit(Repo(repo_id, kind, private, sdk=sdk), token.user)
    repo.variables = {item["key"]: item["value"] for item in wanted.get("variables") or []}
    repo.secrets = {item["key"]: item["value"] for item in wanted.get("secrets") or []}
    repo.runtime.requested_hardware = hardware or repo.runtime.requested_hardware
    repo.runtime.sleep_time = wanted.get("sleepTimeSeconds")
    hub.repos[kind, repo_id] = repo
    return Reply({"url": hub.endpoint + repo.address, "name": repo_id, "id": "3" * 24, "private": private})


def first_commit(repo: Repo, author: str) -> Repo:
    """Add what the Hub itself puts into a new repository."""
    tree = {".gitattributes": Blob.regular(ATTRIBUTES.encode())}
    if repo.type == "space":
        title = repo.id.partition("/")[2]
        tree["README.md"] = Blob.regular(SPACE_README.format(title=title, sdk=repo.sdk).encode())
    repo.add_commit("main", "initial commit", tree, None, author)
    return repo


@routes("DELETE", "/api/repos/delete")
def delete(hub: HubState, request: Request) -> Reply:
    """Remove a repository for good."""
    token, wanted, name = hub.accounts.needed(request), request.json(), request.require("name")
    repo_id = f"{wanted.get('organization') or token.user}/{name}"
    repo = hub.open(request, f"{wanted.get('type') or 'model'}s", repo_id, "write")
    del hub.repos[repo.type, repo.id]
    return Reply({})


@routes("PUT", REPO + "/settings")
def settings(hub: HubState, request: Request, plural: str, repo_id: str) -> Reply:
    """Change who sees a repository and whether readers must ask first."""
    repo, wanted = hub.open(request, plural, repo_id, "write"), request.json()
    visibility = wanted.get("visibility")
    if visibility not in (None, "public", "private"):
        raise HubError(400, f'"visibility" must be one of [private, public], got {visibility!r}')
    if wanted.get("gated") not in (None, False, "auto", "manual"):
        raise HubError(400, f'"gated" must be one of [auto, manual, false], got {wanted["gated"]!r}')
    if wanted.get("gated") and repo.type == "space":
        raise HubError(400, "Spaces cannot be gated")
    if visibility or isinstance(wanted.get("private"), bool):
        repo.private = visibility == "private" if visibility else wanted["private"]
    repo.gated = wanted.get("gated", repo.gated)
    return Reply({"private": repo.private, "gated": repo.gated})


@routes("POST", "/api/validate-yaml")
def validate_yaml(hub: HubState, request: Request) -> Reply:
    """What the Hub would say to a README; 400 if it refuses it."""
    hub.accounts.of(request)
    errors, warnings = cards.validate(request.require("content"), request.json().get("repoType") or "model")
    said = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return Reply(said, 400 if errors else 200)


@routes("GET", REPO + "/auth-check")
def may_read(hub: HubState, request: Request, plural: str, repo_id: str) -> Reply:
    """Whether the token may read the files."""
    hub.open(request, plural, repo_id, "read")
    return Reply({})


@routes("GET", REPO + "/auth-check/write")
def may_write(hub: HubState, request: Request, plural: str, repo_id: str) -> Reply:
    """Whether the token may write files."""
    hub.open(request, plural, repo_id, "write")
    return Reply({})


@routes("GET", REPO)
def info(hub: HubState, request: Request, plural: str, repo_id: str) -> Reply:
    """What a repository says of itself."""
    return _info(hub, request, plural, repo_id, "main")


@routes("GET", REPO + r"/revision/(?P<revision>[^/]+)")
def info_at(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    """The same at a revision."""
    return _info(hub, request, plural, repo_id, revision)


def _info(hub: HubState, request: Request, plural: str, repo_id: str, revision: str) -> Reply:
    repo = hub.open(request, plural, repo_id)
    commit = repo.commit(revision)
    card = _card(commit)
    sizes = request.query.get("blobs", "").lower() in ("1", "true")
    said: dict[str, Any] = {
        "_id": "4" * 24,
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
        "cardData": card,
        "siblings": [_sibling(path, blob, sizes) for path, blob in sorted(commit.tree.items())],
        "usedStorage": sum(blob.size for blob in commit.tree.values()),
    }
    if repo.type == "model":
        said |= {"modelId": repo.id, "pipeline_tag": card.get("pipeline_tag"), "spaces": []}
        said |= {"library_name": card.get("library_name"), **_model_details(commit, card)}
    if repo.type == "space":
        subdomain = re.sub(r"[^a-z0-9]+", "-", repo.id.lower())
        said |= {"sdk": card.get("sdk", repo.sdk), "runtime": repo.runtime.look(), "subdomain": subdomain}
        said |= {"host": f"https://{subdomain}.hf.space", "models": card.get("models") or []}
    return Reply(said, headers={"X-Repo-Commit": commit.id})


def _card(commit: Commit) -> dict[str, Any]:
    """Metadata of the README; empty if there is none that can be read."""
    readme = commit.tree.get("README.md")
    try:
        return json.loads(
            json.dumps(cards.front_matter((readme.data or b"").decode()) if readme else {}, default=str)  # dates
        )
    except ValueError:
        return {}


def _tags(card: dict[str, Any]) -> list[str]:
    """Tags of the card, and those that the Hub makes of other fields."""
    tags = [tag for tag in card.get("tags") or [] if isinstance(tag, str)]
    tags += [card[name] for name in ("library_name", "pipeline_tag") if isinstance(card.get(name), str)]
    relation = card.get("base_model_relation")
    for base in _listed(card.get("base_model")):
        tags += [f"base_model:{base}", *([f"base_model:{relation}:{base}"] if relation else [])]
    tags += [f"dataset:{name}" for name in _listed(card.get("datasets"))] + _listed(card.get("language"))
    tags += [f"license:{card['license']}"] if isinstance(card.get("license"), str) else []
    return list(dict.fromkeys([*tags, "region:us"]))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in value or [] if isinstance(v, str)]


def _sibling(path: str, blob: Blob, sizes: bool) -> dict[str, Any]:
    if not sizes:
        return {"rfilename": path}
    large = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.sha256 else {}
    return {"rfilename": path, "size": blob.size, "blobId": blob.oid, **large}


def _model_details(commit: Commit, card: dict[str, Any]) -> dict[str, Any]:
    """What the Hub reads in the files of a model."""
    found: dict[str, Any] = {}
    config = commit.tree.get("config.json")
    if config and config.data:
        try:
            loaded = json.loads(config.data)
        except ValueError:
            loaded = {}
        kept = ("architectures", "model_type", "quantization_config", "auto_map")
        found["config"] = {name: loaded[name] for name in kept if name in loaded}
    if card.get("model-index"):
        found["model-index"] = card["model-index"]
    results = [
        {"data": entry, "filename": path, "verified": False}
        for path, blob in sorted(commit.tree.items())
        if re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", path)
        for entry in yaml.safe_load(blob.data or b"") or []
    ]
    return {**found, "evalResults": results} if results else found
