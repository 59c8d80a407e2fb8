"""Names without the folders of this machine, for files that others will read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def public_name(name: str) -> str:
    """`name` without the folders of this machine: a Hub id stays, a path keeps its last part.

    A mix such as "data/set/a.txt*0.7,org/set*0.3" is taken part by part.
    """
    return ",".join(_last_part(part) for part in name.split(","))


def without_folders(value: Any) -> Any:
    """A json value in which every string that is a local path keeps only its last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return public_name(value) if isinstance(value, str) and _is_local(value) else value


def _is_local(text: str) -> bool:
    """Whether a string is, or starts with, a path of this machine; a token such as "/" is none."""
    return bool(re.match(r"(~|\.{1,2}|[A-Za-z]:)?[/\\][^/\\\s]+[/\\]", text)) and "\n" not in text


def _last_part(text: str) -> str:
    text = text.strip()
    if Path(text).is_dir() or _is_local(text) or text.count("/") > 1:
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return text
