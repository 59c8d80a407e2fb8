"""Files of a folder against a list of their digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def listed_problems(
    source: str,
    listed: Mapping[str, Any],
    found: Mapping[str, tuple[str, int]],
    *,
    later: Callable[[str], bool],
    since: str,
    whole: str,
) -> list[str]:
    """Differences between a list of files and those that are there.

    source: file that holds the list. listed: name -> {"sha256", "size"}. found: name -> (sha256, size). later: whether
    a file of this name is made after the list, or changes since. since: when the list was written; whole: what the
    files are a part of; both for the sentences.
    """
    problems = []
    for name, entry in sorted(listed.items()):
        if later(name):
            continue
        stated = (entry.get("sha256"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if name not in found:
            problems.append(f"{name!r} is missing, and {source!r} lists it")
        elif found[name] != stated:
            digest, size = found[name]
            problems.append(
                f"{name!r} has {size} bytes and sha256 {digest[:12]}..., but {source!r} says {stated[1]} and "
                f"{str(stated[0])[:12]}...; it was changed after {since}"
            )
    return problems + [
        f"{name!r} is not listed in {source!r}; it does not belong to this {whole}"
        for name in sorted(found)
        if name not in listed and not later(name)
    ]
