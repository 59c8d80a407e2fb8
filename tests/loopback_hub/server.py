"""`LoopbackHub`: the double as a running server, and what tests may ask and tell it."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.loopback_hub import content, history, large_files, reading, repos, spaces
from tests.loopback_hub.accounts import Role
from tests.loopback_hub.faults import ANSWERED, Fault, Faults, Kind
from tests.loopback_hub.state import Gate, HubState, Repo, RepoType
from tests.loopback_hub.wire import HubError, Reply, Request, Routes
from tests.loopback_hub.xet import XetStore

ROOT = Path(__file__).resolve().parents[2]
HUB_ROUTES = Routes()
for _module in (repos, history, content, reading, large_files, spaces):
    HUB_ROUTES.include(_module.routes)


class LoopbackHub:
    """A Hub on 127.0.0.1 with its storage on "localhost", another name of the same machine.

    endpoint: its address; storage: that of its storage.
    token, read_token: of alice, who is in the organisation acme; other_token: of bob, who is not.
    log: (method, path, status) of every answer, status 0 where the connection broke.
    leaks: tokens that were seen at the storage host. crashes: errors of the double itself. The fixture fails on both.
    home: folder for the caches of clients.
    part_size: bytes from which large files are sent in parts, None for never. xet: large files go through hf_xet.
    """

    def __init__(self, home: Path, *, part_size: int | None = None, xet: bool = False) -> None:
        self.home = home
        self.state = HubState(part_size=part_size)
        self.log: list[tuple[str, str, int]] = []
        self.crashes: list[str] = []
        self.faults = Faults()
        self._lock = threading.RLock()
        self._server = _Server(self)
        port = self._server.server_address[1]
        self.endpoint = self.state.endpoint = f"http://127.0.0.1:{port}"
        self.storage = self.state.storage = f"http://localhost:{port}"
        if xet:
            self.state.xet = XetStore(home / "xet-store")
        accounts = self.state.accounts
        accounts.organisations["acme"] = {"alice": "write"}
        self.token, self.read_token = accounts.add("alice"), accounts.add("alice", "read")
        self.other_token = accounts.add("bob")
        (home / "hf").mkdir(parents=True, exist_ok=True)
        # Without this file the client asks the Hub for a list of programs that may be calling it.
        (home / "hf" / ".agent_harnesses.json").write_text("{}")

    def start(self) -> LoopbackHub:
        """Begin to answer."""
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def leaks(self) -> list[str]:
        """Tokens that were sent to the storage host."""
        return self.state.leaks

    def new_token(
        self, user: str = "alice", role: Role = "fineGrained", scopes: Mapping[str, list[str]] | None = None
    ) -> str:
        """Another token. scopes: of a fine-grained one, e.g. {"acme/model": ["repo.write"]}."""
        return self.state.accounts.add(user, role, scopes)

    def fail(
        self,
        method: str,
        path_regex: str,
        status: int = 503,
        times: int = 1,
        *,
        kind: Kind = "status",
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        """Let the next `times` requests fail whose method ("*": any) and path with query match; see `Fault`."""
        fault = Fault(method, re.compile(path_regex), kind, status, times, headers or {})
        with self._lock:
            self.faults.add(fault)
        return fault

    def repo(self, repo_id: str, repo_type: RepoType = "model") -> Repo:
        """State of a repository. Raises KeyError if there is none."""
        return self.state.repos[repo_type, repo_id]

    def has_repo(self, repo_id: str, repo_type: RepoType = "model") -> bool:
        """Whether there is such a repository, seen or not."""
        return (repo_type, repo_id) in self.state.repos

    def files(self, repo_id: str, revision: str = "main", repo_type: RepoType = "model") -> dict[str, bytes]:
        """Content of every file of a revision by path, without what the Hub put there itself."""
        with self._lock:
            tree = self.repo(repo_id, repo_type).commit(revision).tree
            return {p: self.state.content(blob) for p, blob in sorted(tree.items()) if p != ".gitattributes"}

    def add_repo(
        self,
        repo_id: str,
        repo_type: RepoType = "model",
        files: Mapping[str, bytes] | None = None,
        private: bool = False,
        gated: Gate | bool = False,
        card: str | Mapping[str, Any] | None = None,
    ) -> Repo:
        """A repository as somebody else left it; it may belong to anybody and hold anything.

        card: text of its README, or the metadata to make one of. gated: True stands for "auto".
        """
        everything = dict(files or {})
        if card is not None:
            text = card if isinstance(card, str) else f"---\n{yaml.safe_dump(dict(card), sort_keys=False)}---\n"
            everything["README.md"] = text.encode()
        with self._lock:
            gate: Gate = "auto" if gated is True else gated
            new = Repo(repo_id, repo_type, private, gate, sdk="gradio" if repo_type == "space" else None)
            repo = repos.first_commit(new, new.namespace)
            if everything:
                tree = dict(repo.commit("main").tree)
                tree |= {path: self.state.put(repo, path, data, tree) for path, data in everything.items()}
                repo.add_commit("main", "files", tree, repo.commit("main").id, repo.namespace)
            if repo_type == "space":
                spaces.rebuild(self.state, repo)
                repo.runtime.polls = 0
            self.state.repos[repo_type, repo_id] = repo
        return repo

    def environment(self, token: str | None = "", **changes: str) -> dict[str, str]:
        """Variables of a process that talks to this Hub. token: the write token if not given, None for nobody."""
        # Cut off from the settings of the person who runs the tests.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if self.state.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            variables["HF_TOKEN"] = token or self.token
        return {**kept, **variables, **changes}

    def api(self, token: str | bool | None = None) -> Any:
        """A client of this process: with the write token if none is given, with none at all for False."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token if token is None else token)

    def run_python(self, code: str, token: str | None = "", **changes: str) -> subprocess.CompletedProcess[str]:
        """Run code in a fresh process that talks to this Hub; standard output and error as text."""
        return subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(token, **changes),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def answer(self, request: Request) -> tuple[Reply | None, Kind | None]:
        """(reply, how it goes wrong); the reply is None where nothing is to be sent."""
        with self._lock:
            at_storage = request.host == self.storage.removeprefix("http://")
            if at_storage:
                self.state.leaks += _tokens_in(request, self.state.accounts.tokens)
            fault = self.faults.take(request.method, request.target)
            reply: Reply | None = None
            if fault is None or fault.kind in ANSWERED:
                reply = self._reply(request, large_files.storage_routes if at_storage else HUB_ROUTES)
            elif fault.kind == "status":
                reply = HubError(fault.status, "injected fault", headers=fault.headers).reply()
            broken = fault is not None and fault.kind in ("reset", "after")
            self.log.append((request.method, request.path, 0 if broken or reply is None else reply.status))
            return (None if broken else reply), fault.kind if fault else None

    def _reply(self, request: Request, routes: Routes) -> Reply:
        """The answer without faults; a mistake of the double is noted, because a client may try again and hide it."""
        try:
            return routes.answer(self.state, request)
        except HubError as error:
            return error.reply()
        except Exception:
            self.crashes.append(f"{request.method} {request.target}\n{traceback.format_exc()}")
            return HubError(500, "the loopback Hub itself is broken").reply()


def _tokens_in(request: Request, tokens: Mapping[str, Any]) -> list[str]:
    """Tokens anywhere in a request: the Authorization header whatever it holds, known ones in all other places."""
    places = " ".join([request.target, *(request.headers.get(name) or "" for name in request.headers)])
    known = [token for token in tokens if token in places or token.encode() in request.body]
    return known or ([request.token] if request.token else [])


def _spoilt(payload: bytes, fault: Kind | None) -> bytes:
    if fault == "garbled" and payload:
        return payload[:-1] + bytes([payload[-1] ^ 1])
    return payload[: len(payload) // 2] if fault == "short" else payload


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # clients with many threads wait a second for a place in a full queue

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def shutdown_request(self, request: Any) -> None:
        """Only close: the orderly end that comes first otherwise would hide a broken connection."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 between the sockets and `LoopbackHub.answer`."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def _body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _handle(self) -> None:
        request = Request(self.command, self.path, self.headers.get("Host") or "", self.headers, self._body())
        reply, fault = self.server.hub.answer(request)
        if reply is None:
            self._break()
            return
        payload = _spoilt(reply.payload(), fault)
        self.send_response(reply.status)
        headers = {"Content-Type": reply.content_type, "Content-Length": str(len(payload)), **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload[: len(payload) // 2] if fault in ("truncate", "cut") else payload)
        self.wfile.flush()
        if fault == "truncate":
            self.close_connection = True
        if fault == "cut":
            self._break()

    def _break(self) -> None:
        """Close at once, with a reset instead of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle
