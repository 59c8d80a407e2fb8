"""SentencePiece-like BPE for llama.cpp, which knows no merges: scores of tokens that lead to the same pieces."""

from __future__ import annotations

import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import models

from hf_qep.errors import ExportError

MARK = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_CHECKED_TOKENS, _CHECKED_TEXTS = 40_000, 4_000


def scores_of(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Minus the rank of the first merge that makes each token; tokens that none makes come after all others.

    llama.cpp merges the neighbours whose token has the highest score, `tokenizers` the pair of the lowest rank. Ranks
    are whole numbers, exact in float32 up to 2^24.
    """
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def pieces_by_score(text: str, scores: Mapping[str, float]) -> list[str]:
    """How llama.cpp cuts a text: as long as two neighbours make a token, those of the highest score become one, the
    leftmost of equals (llama-vocab.cpp, llm_tokenizer_spm_session)."""
    parts, before, behind = list(text), list(range(-1, len(text) - 1)), list(range(1, len(text) + 1))
    waiting: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(parts) and (whole := parts[left] + parts[right]) in scores:
            heapq.heappush(waiting, (-scores[whole], left, right, whole))

    for left in range(len(parts) - 1):
        offer(left, left + 1)
    while waiting:
        _, left, right, whole = heapq.heappop(waiting)
        if not parts[left] or not parts[right] or parts[left] + parts[right] != whole:
            continue
        parts[left], parts[right] = whole, ""
        behind[left] = behind[right]
        if behind[right] < len(parts):
            before[behind[right]] = left
        offer(before[left], left)
        offer(left, behind[left])
    return [part for part in parts if part]


def check_pieces(model: Mapping[str, Any], merges: Sequence[tuple[str, str]], scores: Mapping[str, float]) -> None:
    """Raise ExportError if scores cut a text otherwise than the merges do.

    Tried are the tokens themselves, which scores can only reach where merges do, and texts made of a few of them:
    scores know one order per token, merges one per pair, and scores join every two neighbours that make a token.
    """
    exact = models.BPE(
        vocab=model["vocab"], merges=list(merges), ignore_merges=bool(model.get("ignore_merges")), fuse_unk=False
    )
    made = sorted({left + right for left, right in merges})
    for text in _texts(made):
        expected = [token.value for token in exact.tokenize(text)]
        found = pieces_by_score(text, scores)
        if found != expected:
            raise ExportError(
                f"llama.cpp would cut {text!r} into {found}, this tokenizer into {expected}: its merges cannot be said "
                "by one score per token; train the tokenizer anew with every merge of a token, as SentencePiece does"
            )


def _texts(made: Sequence[str]) -> Iterator[str]:
    step = max(1, len(made) // _CHECKED_TOKENS)
    yield from made[::step]
    chance = random.Random(0)
    for _ in range(min(_CHECKED_TEXTS, 20 * len(made))):
        yield "".join(chance.choices(made, k=chance.randint(2, 4)))


def check_bytes(tokens: Iterable[str]) -> None:
    """Raise ExportError unless all 256 byte tokens are there: llama.cpp ends at the first byte that it cannot find."""
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if missing:
        raise ExportError(
            f"the tokenizer lacks {len(missing)} of 256 byte tokens, such as {min(missing)}, without which llama.cpp "
            "cannot read every text; keep them when the vocabulary is cut (`keep_bytes`)"
        )


def space_prefix(state: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether texts get a space in front, and what llama.cpp does otherwise with spaces.

    Raises ExportError for normalizers and pre-tokenizers that llama.cpp's SPM does not have.
    """
    prefix, escaped, notes = _normalizers(state.get("normalizer"))
    for part in parts(state.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and part.get("replacement", MARK) == MARK:
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            prefix, escaped = prefix or scheme != "never", True
            notes += _metaspace_notes(scheme)
            if part.get("split", True):
                _check_words(state["model"]["vocab"])
        elif not (escaped and part["type"] == "Split" and part["pattern"] == {"String": " "}):
            raise ExportError(
                f"llama.cpp has no pre-tokenizer {json.dumps(part, ensure_ascii=False)[:200]} for SentencePiece-like "
                "BPE; only Metaspace, or none, can be exported"
            )
    if not escaped:
        raise ExportError(
            f"llama.cpp writes every space as {MARK!r} before it looks for tokens, and this tokenizer does not; "
            "it cannot be exported"
        )
    return prefix, notes


def _normalizers(normalizer: Mapping[str, Any] | None) -> tuple[bool, bool, list[str]]:
    prefix, escaped, notes = False, False, []
    for part in parts(normalizer, "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == MARK:
            prefix = True
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == MARK:
            escaped = True
        elif part["type"] == "NFC":
            notes.append(NFC_NOTE)
        else:
            raise no_normalizer(part)
    return prefix, escaped, notes


def no_normalizer(part: Mapping[str, Any]) -> ExportError:
    """The error about a normalizer that llama.cpp does not have."""
    return ExportError(
        f"llama.cpp has no normalizer {json.dumps(part, ensure_ascii=False)[:200]}; texts would become other tokens, "
        "so the tokenizer cannot be exported"
    )


NFC_NOTE = "the tokenizer composes letters and accents (NFC) first and llama.cpp does not: give it composed text"


def _metaspace_notes(scheme: str) -> list[str]:
    notes = []
    if scheme != "never":
        notes.append("llama.cpp puts a space before text that begins with one too, this tokenizer does not")
    if scheme == "first":
        notes.append("llama.cpp puts a space before text behind every added or special token, this tokenizer does not")
    return notes


def _check_words(vocabulary: Iterable[str]) -> None:
    across = [token for token in vocabulary if MARK in token[1:]]
    if across:
        raise ExportError(
            f"this tokenizer splits at spaces before it merges, llama.cpp does not, and tokens such as {across[0]!r} "
            "have a space inside; it cannot be exported"
        )


def parts(part: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """The members of a tree of sequences, in their order. name: the key under which a sequence lists them."""
    if part and part["type"] == "Sequence":
        for member in part[name]:
            yield from parts(member, name)
    elif part:
        yield part
