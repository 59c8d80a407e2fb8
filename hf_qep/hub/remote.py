"""The Hub as a push and a check see it: few verbs, each retried, every refusal one sentence without a secret.

The client retries some requests and not others, so everything goes through `Remote.call`. Every verb may be repeated:
it sets a state instead of changing one, or looks first whether it was done already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hf_qep.errors import PublishError
from hf_qep.hub import secrets

T = TypeVar("T")
Gate = Literal["auto", "manual"] | None

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds before the second try, doubled each time."""
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_KINDS = ("TransportError", "DecodingError", "JSONDecodeError", "ConnectionError", "TimeoutError")


class HubRefusal(PublishError):
    """The Hub answered with an error. status: HTTP status, None if it could not be reached or understood."""

    def __init__(self, message: str, status: int | None = None, *, transient: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient


@dataclass(frozen=True)
class RemoteFile:
    """One file on the Hub. sha256 is known for large files, oid is the name git gives to the others."""

    path: str
    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class RepoState:
    """What a repository says of itself. head: commit of the revision asked for, None if there is no such branch."""

    id: str
    private: bool
    gated: Gate
    head: str | None


@dataclass(frozen=True)
class Account:
    """Who the token belongs to. can_write: None where the token's rights cannot be read from the answer."""

    name: str
    namespaces: tuple[str, ...]
    role: str
    scoped: tuple[tuple[str, bool], ...] = ()

    def can_write(self, repo_id: str) -> bool | None:
        """Whether the token may write to `repo_id`."""
        if self.role == "fineGrained":
            if not self.scoped:
                return None
            return any(writes for name, writes in self.scoped if name in (repo_id, repo_id.partition("/")[0]))
        return self.role != "read"


class Remote:
    """A Hub client with retries. sleep: called with the seconds to wait. on_step: called before each verb."""

    def __init__(
        self,
        api: Any = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        self.api = api or HfApi()
        self._sleep = sleep
        self._on_step = on_step or (lambda step: None)

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return str(self.api.endpoint)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens in use; they must not be shown or published."""
        return secrets.own_tokens(self.api.token)

    def call(self, step: str, function: Callable[[], T]) -> T:
        """`function()`, again after a failure that may pass. Raises HubRefusal."""
        self._on_step(step)
        for attempt in range(TRIES):
            try:
                return function()
            except PublishError:
                raise
            except (
                Exception
            ) as error:  # the client, its http library and its upload extension each have their own kinds
                refusal = self._refusal(step, error)
                if not refusal.transient or attempt == TRIES - 1:
                    raise refusal from None  # the original may show headers
                self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))
        raise AssertionError("unreachable")

    def account(self) -> Account:
        """Who is logged in. Raises HubRefusal."""
        who = self.call("ask who you are", self.api.whoami)
        token = (who.get("auth") or {}).get("accessToken") or {}
        names = [who["name"], *(org["name"] for org in who.get("orgs") or [] if org.get("roleInOrg") != "read")]
        scoped = [
            (str((scope.get("entity") or {}).get("name")), "repo.write" in (scope.get("permissions") or []))
            for scope in (token.get("fineGrained") or {}).get("scoped") or []
        ]
        return Account(who["name"], tuple(names), str(token.get("role", "unknown")), tuple(scoped))

    def repo(self, repo_id: str, revision: str | None = None) -> RepoState | None:
        """State of a model repository, None if there is none that this token may see."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def ask() -> RepoState | None:
            try:
                info = self.api.model_info(repo_id)
            except RepositoryNotFoundError as error:
                # Without a valid token the Hub says the same of every repository; and a gated one is there.
                if error.response.status_code == 401 or isinstance(error, GatedRepoError):
                    raise
                return None
            gated = info.gated if info.gated in ("auto", "manual") else None
            head = info.sha if revision in (None, "main") else self._head(repo_id, str(revision))
            return RepoState(info.id, bool(info.private), gated, head)

        return self.call(f"look at {repo_id}", ask)

    def files(self, repo_id: str, revision: str, *, repo_type: str = "model") -> dict[str, RemoteFile]:
        """Files of a commit or branch, by name."""
        from huggingface_hub.hf_api import RepoFile

        def ask() -> dict[str, RemoteFile]:
            entries = self.api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {f.path: RemoteFile(f.path, f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in files}

        return self.call(f"list the files of {repo_id}", ask)

    def pull_requests(self, repo_id: str) -> list[str]:
        """References of the pull requests of a repository, newest first."""
        refs = self.call(
            f"list the pull requests of {repo_id}",
            lambda: self.api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or [],
        )
        return [ref.ref for ref in sorted(refs, key=lambda ref: int(ref.ref.rsplit("/", 1)[-1]), reverse=True)]

    def validate_card(self, text: str) -> str | None:
        """What the Hub dislikes in a card, None if nothing; it stores nothing."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def ask() -> str | None:
            answer = get_session().post(
                f"{self.endpoint}/api/validate-yaml",
                json={"content": text, "repoType": "model"},
                headers=build_hf_headers(token=self.api.token),
            )
            if answer.status_code == 400:
                return "; ".join(error.get("message", "") for error in answer.json().get("errors", [])) or "refused"
            hf_raise_for_status(answer)
            return None

        return self.call("validate the card", ask)

    def create(self, repo_id: str) -> None:
        """A private model repository of this name; nothing happens if there is one."""
        self.call(f"create {repo_id}", lambda: self.api.create_repo(repo_id, private=True, exist_ok=True))

    def branch(self, repo_id: str, name: str) -> None:
        """A branch of this name, from main; nothing happens if there is one."""
        self.call(f"create the branch {name}", lambda: self.api.create_branch(repo_id, branch=name, exist_ok=True))

    def set_gate(self, repo_id: str, gate: Gate) -> None:
        """Readers must ask first: let in by themselves ("auto"), by you ("manual"), or nobody is asked (None)."""
        self.call("set the gate", lambda: self.api.update_repo_settings(repo_id, gated=gate or False))

    def make_public(self, repo_id: str) -> None:
        """Show the repository to everybody."""
        self.call("make the repository public", lambda: self.api.update_repo_settings(repo_id, private=False))

    def store(self, repo_id: str, operation: Any, *, revision: str, create_pr: bool) -> None:
        """Send the content of one large file; it is in no commit yet, and what the Hub has already is not sent."""
        self.call(
            f"upload {operation.path_in_repo}",
            lambda: self.api.preupload_lfs_files(
                repo_id, [operation], revision=revision, create_pr=create_pr, free_memory=False
            ),
        )

    def commit(
        self,
        repo_id: str,
        operations: Iterable[Any],
        *,
        message: str,
        revision: str,
        parent: str | None,
        create_pr: bool,
        is_done: Callable[[], tuple[str, str | None] | None],
    ) -> tuple[str, str | None]:
        """All operations in one commit; returns its name and that of the pull request.

        is_done: what to return if the wanted files are there already, else None. It is asked before every try but the
        first, because the answer to a commit can be lost after the commit was made.
        """
        operations = list(operations)
        tried = False

        def send() -> tuple[str, str | None]:
            nonlocal tried
            if tried and (done := is_done()):
                return done
            tried = True
            info = self.api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return info.oid, info.pr_revision

        try:
            return self.call("commit", send)
        except HubRefusal as error:
            if error.status == 412 and (done := is_done()):
                return done
            if error.status == 412:
                raise HubRefusal(
                    f"somebody else changed {repo_id} at the same time; nothing of this push is visible, run it again",
                    412,
                ) from None
            raise

    def _head(self, repo_id: str, revision: str) -> str | None:
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return str(self.api.model_info(repo_id, revision=revision).sha)
        except RevisionNotFoundError:
            return None

    def _refusal(self, step: str, error: Exception) -> HubRefusal:
        """One sentence about an error of the client, and whether trying again can help."""
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        chain = _chain(error)
        if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
            return HubRefusal(f"cannot {step}: HF_HUB_OFFLINE is set; unset it to reach the Hub")
        if any(isinstance(e, LocalTokenNotFoundError) for e in chain):
            return HubRefusal(f"cannot {step}: you are not logged in; run: hf auth login, or set HF_TOKEN", 401)
        http = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
        if http is not None:
            status = http.response.status_code
            said = secrets.redact(_one_line(http.server_message or str(http)), self.tokens)
            return HubRefusal(
                f"cannot {step}: the Hub answered {status} ({said}){_advice(status)}",
                status,
                transient=status in _TRANSIENT_STATUS,
            )
        said = secrets.redact(_one_line(str(chain[-1]) or type(chain[-1]).__name__), self.tokens)
        passing = any(_is_transient(e) for e in chain)
        return HubRefusal(f"cannot {step}: {said}", transient=passing)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return found


def _is_transient(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & set(_TRANSIENT_KINDS)) or type(error).__module__.startswith("hf_xet")


def _one_line(text: str) -> str:
    """The first sentences of a message, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _advice(status: int) -> str:
    if status == 401:
        return "; log in again: hf auth login"
    if status == 403:
        return "; use a token with write access to this name: hf auth login"
    return "; it may be busy, run the same command again later" if status in _TRANSIENT_STATUS else ""
