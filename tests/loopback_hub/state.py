"""What the Hub stores: repositories with their history, the content of large files, and the state of Spaces."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from tests.loopback_hub.accounts import Accounts, Need
from tests.loopback_hub.wire import HubError, Request
from tests.loopback_hub.xet import XetContent, XetStore

RepoType = Literal["model", "dataset", "space"]
Gate = Literal["auto", "manual", False]
PLURAL = {"models": "model", "datasets": "dataset", "spaces": "space", None: "model"}
MAX_REGULAR = 10 * 2**20
"""Bytes from which a file must be stored as a large one."""
LARGE_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.npz", "*.onnx", "*.parquet", "*.model", "*.zip")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_PATTERNS)
FREE_HARDWARE = "cpu-basic"
_ids = itertools.count(1)


def now() -> str:
    """This moment as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def git_oid(data: bytes) -> str:
    """Name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit. oid: git's name, of the pointer if large. data: None if large. sha256: None if not."""

    oid: str
    size: int
    data: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Blob:
        """A file that git holds itself."""
        return cls(git_oid(data), len(data), data)

    @classmethod
    def large(cls, sha256: str, size: int) -> Blob:
        """A file of which git holds a pointer only."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(git_oid(pointer.encode()), size, None, sha256)


@dataclass(frozen=True)
class Commit:
    """A commit. tree: every file by path."""

    id: str
    title: str
    message: str
    parent: str | None
    author: str
    tree: Mapping[str, Blob]
    date: str = field(default_factory=now)


@dataclass
class Runtime:
    """A Space at work. stage: what it is at. goal: stage that it will reach after `polls` more looks at it."""

    stage: str = "NO_APP_FILE"
    goal: str = "RUNNING"
    polls: int = 0
    hardware: str | None = None
    requested_hardware: str = FREE_HARDWARE
    sleep_time: int | None = None
    error: str | None = None
    builds: int = 0

    def start(self, stage: str, goal: str, polls: int) -> None:
        """Go through `stage` to `goal`."""
        self.stage, self.goal, self.polls, self.error = stage, goal, polls, None

    def look(self) -> dict[str, Any]:
        """What a look shows; it brings the Space one step on."""
        if self.stage in ("BUILDING", "APP_STARTING", "RUNNING_BUILDING"):
            if self.polls <= 0:
                self.stage = self.goal
                self.hardware = self.requested_hardware if self.goal == "RUNNING" else None
                self.error = None if self.goal == "RUNNING" else self.error or f"the Space ended in {self.goal}"
            self.polls -= 1
        return self.shown()

    def shown(self) -> dict[str, Any]:
        """The runtime as the Hub describes it."""
        shown = {
            "stage": self.stage,
            "hardware": {"current": self.hardware, "requested": self.requested_hardware},
            "gcTimeout": self.sleep_time,
            "storage": None,
            "replicas": {"requested": 1, "current": 1 if self.stage == "RUNNING" else 0},
        }
        return {**shown, "errorMessage": self.error} if self.error else shown


@dataclass
class Repo:
    """A repository. commits: all of them, oldest first. variables and secrets: by name, of a Space.

    granted: users let in through the gate. logs: lines by kind, "build" and "run".
    """

    id: str
    type: RepoType = "model"
    private: bool = False
    gated: Gate = False
    sdk: str | None = None
    created: str = field(default_factory=now)
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)
    variables: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)
    logs: dict[str, list[str]] = field(default_factory=lambda: {"build": [], "run": []})

    @property
    def namespace(self) -> str:
        """The user or organisation it belongs to."""
        return self.id.partition("/")[0]

    @property
    def plural(self) -> str:
        """Its type in addresses of the API."""
        return f"{self.type}s"

    @property
    def address(self) -> str:
        """Its path on the Hub."""
        return f"/{self.id}" if self.type == "model" else f"/{self.plural}/{self.id}"

    def find(self, revision: str | None) -> Commit | None:
        """The commit of a branch, tag, pull request, full or shortened name; None if there is none."""
        name = revision or "main"
        places = (self.branches, self.tags, self.pulls)
        short = name.removeprefix("refs/heads/").removeprefix("refs/tags/")
        wanted = next((refs[n] for refs in places for n in (name, short) if n in refs), name)
        found = [c for c in self.commits if c.id == wanted or (len(wanted) >= 7 and c.id.startswith(wanted))]
        return found[0] if len(found) == 1 else None

    def commit(self, revision: str | None) -> Commit:
        """The same. Raises HubError 404 if there is none."""
        found = self.find(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def add_commit(
        self, ref: str, title: str, tree: Mapping[str, Blob], parent: str | None, author: str, message: str = ""
    ) -> Commit:
        """A new commit at the end of a branch or pull request."""
        seed = f"{self.type} {self.id} {parent} {title} {next(_ids)} {time.time_ns()}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, message, parent, author, dict(tree))
        self.commits.append(commit)
        (self.pulls if ref.startswith("refs/pr/") else self.branches)[ref] = commit.id
        return commit

    def is_large(self, path: str, size: int, sample: bytes, tree: Mapping[str, Blob]) -> bool:
        """Whether a file has to be stored as a large one: by .gitattributes, by size, or because it is not text."""
        rules = tree.get(".gitattributes")
        lines = ((rules.data if rules else None) or b"").decode(errors="replace").splitlines()
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = PurePosixPath(path).name
        matches = any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(path, p) for p in patterns)
        return matches or size > MAX_REGULAR or b"\0" in sample


class HubState:
    """Everything the Hub knows. Tests may change the settings.

    endpoint and storage: addresses of the Hub and of the host of large files. store: content of large files by sha256.
    tickets: what the holder of a signed address may do. leaks: tokens that were seen at the storage host.
    Settings: part_size, bytes from which large files are sent in parts, None for never; page_size, entries of a tree
    in one answer; space_polls, looks at a Space until it is built; space_goal, the stage in which it ends then; unpaid,
    kinds of Spaces and of hardware that are refused with 402.
    """

    def __init__(self, *, part_size: int | None = None, page_size: int = 1000) -> None:
        self.accounts = Accounts()
        self.repos: dict[tuple[RepoType, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tickets: dict[str, str] = {}
        self.leaks: list[str] = []
        self.endpoint = self.storage = ""
        self.part_size = part_size
        self.page_size = page_size
        self.space_polls = 2
        self.space_goal = "RUNNING"
        self.unpaid: set[str] = set()
        self.xet: XetStore | None = None

    def open(self, request: Request, plural: str | None, repo_id: str, need: Need = "see") -> Repo:
        """A repository that the request may use in this way.

        Raises HubError: 401 or 404 if there is none to be seen, 403 if the token is not good enough or the gate shut.
        """
        token = self.accounts.of(request)
        repo = self.repos.get((PLURAL[plural], repo_id))
        if repo is None or (repo.private and not self.accounts.may(token, repo_id, "see")):
            raise HubError(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if need == "read" and repo.gated and not self.accounts.may(token, repo_id, "read"):
            if token is None:
                message = f"Access to {repo.type} {repo_id} is restricted. You must be authenticated to access it."
                raise HubError(401, message, "GatedRepo")
            if token.user not in repo.granted:
                message = f"Access to {repo.type} {repo_id} is restricted and you are not in the authorized list."
                raise HubError(403, message, "GatedRepo")
        if need in ("contribute", "write") and not self.accounts.may(token, repo_id, need):
            if token is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(403, f"Your token or your role does not allow you to {need} here: {repo_id}")
        return repo

    def size_of(self, sha256: str) -> int | None:
        """Bytes of a large file, None if its content is not there."""
        if sha256 in self.store:
            return len(self.store[sha256])
        found = self.xet_content(sha256)
        return found.size if found else None

    def xet_content(self, sha256: str | None) -> XetContent | None:
        """What hf_xet has of a file, None without xet."""
        return self.xet.index().get(sha256) if self.xet and sha256 else None

    def content(self, blob: Blob) -> bytes:
        """The bytes of a file."""
        if blob.sha256 is None:
            return blob.data or b""
        if blob.sha256 not in self.store and self.xet is not None:
            self.store[blob.sha256] = self.xet.read(blob.sha256)
        return self.store[blob.sha256]

    def put(self, repo: Repo, path: str, data: bytes, tree: Mapping[str, Blob]) -> Blob:
        """Content as the repository stores it; large files go to the store."""
        if not repo.is_large(path, len(data), data[:512], tree):
            return Blob.regular(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.store[sha256] = data
        return Blob.large(sha256, len(data))
