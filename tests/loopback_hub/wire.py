"""Requests, replies, errors and routes: HTTP as the rest of the double sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

JSON = "application/json"
BYTES = "application/octet-stream"


class HubError(Exception):
    """An answer that is an error. code: the X-Error-Code that the client turns into an exception class."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})

    def reply(self) -> Reply:
        """The answer that says so, in header and body as the Hub does."""
        headers = {**self.headers, "X-Error-Message": self.message.replace("\n", " ")}
        if self.code:
            headers["X-Error-Code"] = self.code
        return Reply({"error": self.message}, self.status, headers)


@dataclass(frozen=True)
class Reply:
    """An answer. body: bytes as they are, everything else as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = JSON

    def payload(self) -> bytes:
        """The body as it is sent."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(frozen=True)
class Request:
    """A request whose body was read. target: path and query as they were sent. host: name and port it was sent to."""

    method: str
    target: str
    host: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The path, still percent-encoded."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """Parameters of the address; of one that is given twice the first."""
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def token(self) -> str | None:
        """The token of the Authorization header."""
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises HubError 400 if it is none."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            raise HubError(400, "the body is not JSON") from None
        if not isinstance(found, dict):
            raise HubError(400, "the body is not a JSON object")
        return found

    def require(self, name: str, kind: type = str) -> Any:
        """A field of the JSON body. Raises HubError 400 if it is missing or of another type."""
        value = self.json().get(name)
        if not isinstance(value, kind):
            raise HubError(400, f'"{name}" is required and must be {kind.__name__}, got {value!r}')
        return value


def ranged(data: bytes, request: Request, headers: Mapping[str, str]) -> Reply:
    """Content, or the part of it that was asked for. Raises HubError 416 if there is no such part."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
    if match is None or match[0] == "bytes=-":
        return Reply(data, 200, headers, BYTES)
    if match[1]:
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
    else:
        first, last = max(0, len(data) - int(match[2])), len(data) - 1
    if first >= len(data) or first > last:
        raise HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    span = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
    return Reply(data[first : last + 1], 206, {**headers, **span}, BYTES)


Handler = Callable[..., Reply]
REPO = r"/api/(?P<plural>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
"""Address of a repository's API."""
FILES = r"(?:/(?P<plural>datasets|spaces))?/(?P<repo_id>[^/]+/[^/]+)"
"""Address of a repository's files; models have no prefix."""


class Routes:
    """Which function answers which address: handler(hub, request, **named groups of the pattern, decoded)."""

    def __init__(self) -> None:
        self._table: list[tuple[str, re.Pattern[str], Handler]] = []

    def __call__(self, method: str, pattern: str) -> Callable[[Handler], Handler]:
        """Decorator: answer `method` at the addresses that match `pattern` as a whole."""

        def add(handler: Handler) -> Handler:
            self._table.append((method, re.compile(pattern), handler))
            return handler

        return add

    def include(self, other: Routes) -> None:
        """Take over the routes of another table."""
        self._table += other._table

    def answer(self, hub: Any, request: Request) -> Reply:
        """Reply of the first handler that fits. Raises HubError 405 or 501 if there is none.

        501 instead of 404: what this double cannot do must not look like something that is not there.
        """
        wanted = "GET" if request.method == "HEAD" else request.method
        other_methods = set()
        for method, pattern, handler in self._table:
            if match := pattern.fullmatch(request.path):
                if method == wanted:
                    return handler(hub, request, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                other_methods.add(method)
        if other_methods:
            raise HubError(405, f"{request.method} is not allowed at {request.path}; it takes {sorted(other_methods)}")
        raise HubError(501, f"the loopback Hub has no {request.method} {request.path}")
