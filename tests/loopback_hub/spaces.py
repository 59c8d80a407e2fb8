"""Routes of Spaces: runtime, hardware, variables, secrets, logs."""

from __future__ import annotations

import json
from typing import Any

from tests.loopback_hub import cards
from tests.loopback_hub.state import FREE_HARDWARE, HubState, Repo, now
from tests.loopback_hub.wire import HubError, Reply, Request, Routes

routes = Routes()
SPACE = r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)"
HARDWARE = ("cpu-basic", "cpu-upgrade", "zero-a10g", "t4-small", "t4-medium", "l4x1", "l40sx1", "a10g-small")
HARDWARE += ("a10g-large", "a100-large", "rtx-pro-6000")


def rebuild(hub: HubState, repo: Repo, stage: str = "BUILDING") -> None:
    """Start a Space again after a change. It ends where its files or `hub.space_goal` say."""
    repo.runtime.builds += 1
    tree = repo.commit("main").tree
    readme = tree.get("README.md")
    text = ((readme.data if readme else None) or b"").decode(errors="replace")
    errors, _ = cards.validate(text, "space")
    app = cards.front_matter(text).get("app_file", "app.py") if not errors else None
    repo.runtime.start(stage, hub.space_goal, hub.space_polls)
    if both := sorted(repo.variables.keys() & repo.secrets.keys()):
        errors.append(f"Collision on variables and secrets names: {', '.join(both)}")
    if errors:
        repo.runtime.stage, repo.runtime.error = "CONFIG_ERROR", errors[0]
    elif repo.sdk in ("gradio", "streamlit") and app not in tree:
        repo.runtime.stage, repo.runtime.error = "NO_APP_FILE", None


def _changed(hub: HubState, repo: Repo) -> Reply:
    """Answer after a change that makes a running Space start again."""
    if repo.runtime.stage not in ("NO_APP_FILE", "PAUSED"):
        rebuild(hub, repo, "APP_STARTING")
    return Reply(repo.runtime.shown())


@routes("GET", SPACE + "/runtime")
def runtime(hub: HubState, request: Request, repo_id: str) -> Reply:
    """What the Space is at."""
    return Reply(hub.open(request, "spaces", repo_id).runtime.look())


@routes("POST", SPACE + "/hardware")
def hardware(hub: HubState, request: Request, repo_id: str) -> Reply:
    """Ask for other hardware."""
    repo, flavor = hub.open(request, "spaces", repo_id, "write"), request.require("flavor")
    if flavor not in HARDWARE:
        raise HubError(400, f'"flavor" must be one of [{", ".join(HARDWARE)}], got {flavor!r}')
    if flavor in hub.unpaid:
        raise HubError(402, f"Payment method required for the hardware {flavor}")
    repo.runtime.requested_hardware = flavor
    repo.runtime.sleep_time = request.json().get("sleepTimeSeconds", repo.runtime.sleep_time)
    return _changed(hub, repo)


@routes("POST", SPACE + "/sleeptime")
def sleep_time(hub: HubState, request: Request, repo_id: str) -> Reply:
    """After how many seconds without a visitor it sleeps."""
    repo = hub.open(request, "spaces", repo_id, "write")
    if repo.runtime.requested_hardware == FREE_HARDWARE:
        raise HubError(400, f"the sleep time of {FREE_HARDWARE} cannot be changed")
    repo.runtime.sleep_time = request.require("seconds", int)
    return Reply(repo.runtime.shown())


@routes("POST", SPACE + "/pause")
def pause(hub: HubState, request: Request, repo_id: str) -> Reply:
    """Stop it until it is started again."""
    repo = hub.open(request, "spaces", repo_id, "write")
    repo.runtime.stage = "PAUSED"
    repo.runtime.hardware = None
    return Reply(repo.runtime.shown())


@routes("POST", SPACE + "/restart")
def restart(hub: HubState, request: Request, repo_id: str) -> Reply:
    """Start it again, built anew if `factory` is given."""
    repo = hub.open(request, "spaces", repo_id, "write")
    rebuild(hub, repo, "BUILDING" if request.query.get("factory") == "true" else "APP_STARTING")
    return Reply(repo.runtime.shown())


def _listed(values: dict[str, str], *, shown: bool) -> dict[str, Any]:
    """Variables with their values, or secrets without."""
    said = {"description": None, "updatedAt": now()}
    return {key: {"key": key, **said, **({"value": value} if shown else {})} for key, value in values.items()}


@routes("GET", SPACE + "/(?P<what>variables|secrets)")
def list_values(hub: HubState, request: Request, repo_id: str, what: str) -> Reply:
    """Variables or secrets; the values of secrets are never told."""
    repo = hub.open(request, "spaces", repo_id, "write")
    return Reply(_listed(getattr(repo, what), shown=what == "variables"))


@routes("POST", SPACE + "/(?P<what>variables|secrets)")
def set_value(hub: HubState, request: Request, repo_id: str, what: str) -> Reply:
    """Set a variable or a secret."""
    repo = hub.open(request, "spaces", repo_id, "write")
    key = request.require("key")
    if not key.isidentifier():
        raise HubError(400, f"Invalid name of a variable: {key!r}")
    values: dict[str, str] = getattr(repo, what)
    values[key] = request.require("value")
    _changed(hub, repo)
    return Reply(_listed(values, shown=what == "variables"))


@routes("DELETE", SPACE + "/(?P<what>variables|secrets)")
def delete_value(hub: HubState, request: Request, repo_id: str, what: str) -> Reply:
    """Remove a variable or a secret."""
    repo = hub.open(request, "spaces", repo_id, "write")
    values: dict[str, str] = getattr(repo, what)
    if values.pop(request.require("key"), None) is None:
        raise HubError(404, f"no such name in {what}: {request.require('key')}")
    _changed(hub, repo)
    return Reply(_listed(values, shown=what == "variables"))


@routes("GET", SPACE + "/logs/(?P<kind>build|run)")
def logs(hub: HubState, request: Request, repo_id: str, kind: str) -> Reply:
    """Lines of the log as a stream of events."""
    repo = hub.open(request, "spaces", repo_id, "write")
    events = [f"data: {json.dumps({'data': line, 'timestamp': now()})}\n\n" for line in repo.logs[kind]]
    return Reply("".join(events).encode(), content_type="text/event-stream")
