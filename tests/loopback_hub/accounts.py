"""Users, organisations and tokens: who is asking, and what they may do."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.loopback_hub.wire import HubError, Request

Role = Literal["read", "write", "fineGrained"]
Need = Literal["see", "read", "contribute", "write"]
"""What a request wants of a repository: its metadata, its files, a pull request, its branches and settings."""
INVALID_TOKEN = "Invalid credentials in Authorization header"
_letters = itertools.count(1)


def make_token(name: str) -> str:
    """A token that looks like one, so that whatever searches for tokens finds it. No two are equal."""
    return "hf_" + f"{name.title()}{next(_letters)}".ljust(34, "x")


@dataclass(frozen=True)
class Token:
    """A token of a user. scopes: of a fine-grained one, permissions by name of a user, organisation or repository."""

    value: str
    user: str
    role: Role = "write"
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def allows(self, repo_id: str, *permissions: str) -> bool:
        """Whether a fine-grained token holds one of the permissions on a repository."""
        held = {p for name in (repo_id, repo_id.partition("/")[0]) for p in self.scopes.get(name, ())}
        return bool(held & set(permissions))

    def describe(self) -> dict[str, Any]:
        """The token as whoami shows it."""
        shown: dict[str, Any] = {"displayName": f"token of {self.user}", "role": self.role}
        if self.role == "fineGrained":
            scoped = [
                {"entity": {"_id": "0" * 24, "type": _entity(name, self.user), "name": name}, "permissions": list(held)}
                for name, held in self.scopes.items()
            ]
            shown["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        return shown


def _entity(name: str, user: str) -> str:
    if "/" in name:
        return "model"
    return "user" if name == user else "org"


class Accounts:
    """Everybody the Hub knows. organisations: members and their roles ("read", "write", "admin") by name."""

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self.organisations: dict[str, dict[str, str]] = {}

    def add(
        self, user: str, role: Role = "write", scopes: Mapping[str, tuple[str, ...] | list[str]] | None = None
    ) -> str:
        """A new token of a user, who is known from then on."""
        value = make_token(f"{user}{role}")
        self.tokens[value] = Token(value, user, role, {name: tuple(held) for name, held in (scopes or {}).items()})
        return value

    def of(self, request: Request) -> Token | None:
        """The token of a request, None for a stranger. Raises HubError 401 for one that is not valid."""
        if request.token is None:
            return None
        if request.token not in self.tokens:
            raise HubError(401, INVALID_TOKEN)
        return self.tokens[request.token]

    def needed(self, request: Request) -> Token:
        """The token of a request that must have one. Raises HubError 401."""
        token = self.of(request)
        if token is None:
            raise HubError(401, "Invalid username or password.")
        return token

    def whoami(self, token: Token) -> dict[str, Any]:
        """What the Hub tells the owner of a token."""
        orgs = [
            {"type": "org", "id": "1" * 24, "name": name, "fullname": name, "roleInOrg": members[token.user]}
            for name, members in self.organisations.items()
            if token.user in members
        ]
        return {
            "type": "user",
            "id": "2" * 24,
            "name": token.user,
            "fullname": token.user.title(),
            "isPro": False,
            "canPay": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token.describe()},
        }

    def belongs(self, user: str, namespace: str) -> bool:
        """Whether a user may see what is private in a namespace."""
        return user == namespace or user in self.organisations.get(namespace, {})

    def may(self, token: Token | None, repo_id: str, need: Need) -> bool:
        """Whether a token may do something with what is private, gated or protected in a repository."""
        if token is None:
            return False
        namespace = repo_id.partition("/")[0]
        if need in ("see", "read"):
            fine = token.role != "fineGrained" or token.allows(repo_id, "repo.content.read", "repo.write")
            return fine and self.belongs(token.user, namespace)
        if token.role == "read":
            return False
        if token.role == "fineGrained":
            wanted = ("repo.write",) if need == "write" else ("repo.write", "discussion.write")
            if not token.allows(repo_id, *wanted):
                return False
        if need == "contribute":
            return True
        role = "admin" if token.user == namespace else self.organisations.get(namespace, {}).get(token.user, "read")
        return role != "read"
