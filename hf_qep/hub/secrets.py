"""Secrets and places of this machine in files that are about to be published.

A finding names the file, the line and the kind; it never repeats the value.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hf_qep.engine.headers import MAX_HEADER_BYTES

_SECRETS = {
    "a Hugging Face token": r"(?:hf|api_org)_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[A-Za-z0-9._-]{20,}",
    "a key of a cloud provider": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "an API key": r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}|\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a signed web token": r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a header with a credential": r"(?i)\bauthorization\W{1,4}(?:bearer|basic)\s+[A-Za-z0-9._~+/-]{16,}",
    "an address with a password": r"\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@\"']{1,64}:[^\s/@\"']{3,}@",
    "a password or key": r"(?i)\b(?:\w{0,40}(?:api_?key|secret|access_?key)\w{0,40}|api-key|password|passwd"
    r"|(?:\w{0,40}_)?(?:access|auth|hf|hub)[_-]?token)"
    r"[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d)[A-Za-z0-9/+_.-]{16,}",
}
_ROOTS = "home|root|Users|mnt|opt|srv|tmp|var|work|workspace|scratch|data|media|Volumes|private"
_PLACES = rf"(?<![\w.~:/-])/(?:{_ROOTS})/[\w.-]|\b[A-Za-z]:\\{{1,2}}Users\\|\bfile:///?\w"
_MIN_TOKEN = 8
"""Own tokens shorter than this would be found in ordinary text."""


def own_tokens(*more: object) -> tuple[str, ...]:
    """The tokens this process can see, HF_TOKEN and that of the login file, and those of `more` that are text."""
    from huggingface_hub import get_token

    found = (get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), *more)
    return tuple(dict.fromkeys(t.strip() for t in found if isinstance(t, str) and len(t.strip()) >= _MIN_TOKEN))


def scan(path: Path, name: str, *, tokens: Iterable[str] = (), places: bool = True) -> list[str]:
    """What must not be published in a file, one sentence each; of a safetensors file only the header is text.

    tokens: exact values to look for. places: also look for absolute paths; off for vocabularies, where such a path can
    be a token like any other.
    """
    return scan_text(_text(path), name, tokens=tokens, places=places)


def scan_text(text: str, name: str, *, tokens: Iterable[str] = (), places: bool = True) -> list[str]:
    """The same for text at hand."""
    text = text.replace("\\/", "/")  # json may write every slash so
    kinds = dict(_SECRETS)
    own = [re.escape(token) for token in tokens]
    if own:
        kinds["the token you are logged in with"] = "|".join(own)
    hits = _find(kinds, text)
    if places:
        kinds = {"an absolute path of a machine": "|".join([_PLACES, *(re.escape(p) for p in _own_places())])}
        hits += _find(kinds, text)
    return [f"{name!r} line {line} holds {what}; remove it" for line, what in sorted(set(hits))]


def _find(kinds: dict[str, str], text: str) -> list[tuple[int, str]]:
    """(line, kind) of every match."""
    return [(text.count("\n", 0, m.start()) + 1, kind) for kind, rx in kinds.items() for m in re.finditer(rx, text)]


def redact(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` with everything that looks like a token, and the given tokens, replaced.

    The query of an address goes too: the Hub signs the addresses at which large files are stored.
    """
    for token in tokens:
        text = text.replace(token, "[token]")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?[...]", text)
    for kind in ("a Hugging Face token", "a header with a credential", "an address with a password"):
        text = re.sub(_SECRETS[kind], "[token]", text)
    return text


def _text(path: Path) -> str:
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            return file.read(min(length, MAX_HEADER_BYTES)).decode("utf-8", "replace")
        data = file.read()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    # A secret written with a byte between its letters is text too; editors of one big system save that way.
    return data.decode("utf-8", "replace").replace("\0", "")


def _own_places() -> list[str]:
    """Folders of this machine that no published file has a reason to name."""
    places = {str(Path.home()), str(Path.cwd()), tempfile.gettempdir()}
    return sorted(place for place in places if len(Path(place).parts) > 2)
