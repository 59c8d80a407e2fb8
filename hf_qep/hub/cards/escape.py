"""Names and text of others in Markdown: shown as they are, never read as markup.

Whatever a template puts in is escaped unless it is `Markdown`, which only the functions here and `Template` text make.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

HUB = "https://huggingface.co"
_REPO_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that are not shown, or that change how the text around them is shown."""


class Markdown(str):
    """Text that is Markdown on purpose and is not escaped again."""

    __slots__ = ()


def finish(value: Any) -> str:
    """What a template prints for a value: Markdown as it is, everything else escaped."""
    return value if isinstance(value, Markdown) else inline("" if value is None else str(value))


def inline(text: str) -> Markdown:
    """One line of prose in which no character means anything to Markdown, HTML or a table."""
    plain = visible(text)
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~!&$@])", r"\\\1", plain)
    # Addresses become links without any markup; a backslash in their middle stops that.
    escaped = re.sub(r":(?=//)|(?<=www)\.|(?<=mailto):", lambda match: f"\\{match[0]}", escaped, flags=re.IGNORECASE)
    # At the start of a line these would make a list, a heading or a rule.
    return Markdown(re.sub(r"^(?=[-+=])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", escaped))


def visible(text: str) -> str:
    """The text in one line, without characters that cannot be seen."""
    shown = "".join(" " if c.isspace() else "" if unicodedata.category(c) in _HIDDEN else c for c in text)
    return " ".join(shown.split())


def code(text: str) -> Markdown:
    """A code span, or escaped prose where a code span cannot hold the text (a backtick, a pipe, nothing)."""
    plain = visible(text)
    return Markdown(f"`{plain}`") if plain and not re.search(r"[`|]", plain) else inline(plain)


def block(text: str, language: str = "") -> Markdown:
    """A fenced block that shows `text` line by line, whatever it holds."""
    body = re.sub(r"\r\n?", "\n", text)
    body = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in body)
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    ending = "" if body.endswith("\n") or not body else "\n"
    return Markdown(f"{fence}{language if language.isalnum() else ''}\n{body}{ending}{fence}")


def link(text: str, address: str) -> Markdown:
    """A link if the address is http or https, else the text alone."""
    if not re.match(r"https?://[\w.-]+([:/?#]|$)", address):
        return inline(text)
    return Markdown(f"[{inline(text)}](<{quote(address, safe=':/?#@!$&=+,;%~')}>)")


def hub_link(repo_id: str, revision: str | None = None, *, kind: str = "") -> Markdown:
    """A link to a repository of the Hub, or the escaped name if it is none. kind: "datasets" or "" for models."""
    if not is_repo_id(repo_id):
        return code(repo_id)
    at = f"/tree/{revision}" if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else ""
    return link(repo_id, f"{HUB}/{kind + '/' if kind else ''}{repo_id}{at}")


def is_repo_id(name: str | None) -> bool:
    """Whether a name can be one on the Hub: NAME or OWNER/NAME."""
    return bool(name and len(name) <= 193 and re.fullmatch(_REPO_ID, name, re.ASCII))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = ()) -> Markdown:
    """A table. numbers: indices of the columns that stand to the right."""
    rules = ["---:" if index in numbers else "---" for index in range(len(columns))]
    lines = [[finish(column) for column in columns], rules, *([finish(cell) for cell in row] for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def bullets(items: Sequence[Any]) -> Markdown:
    """A list, one item a line."""
    return Markdown("\n".join(f"* {finish(item)}" for item in items))


def words(template: str, **values: Any) -> Markdown:
    """`template` is Markdown of this package; each {name} in it becomes the value, escaped unless it is Markdown."""
    return Markdown(template.format(**{name: finish(value) for name, value in values.items()}))
