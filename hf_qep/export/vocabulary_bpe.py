"""Byte-level BPE for llama.cpp: the name under which it knows the way in which a tokenizer cuts texts into words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import models
from tokenizers.pre_tokenizers import ByteLevel

from hf_qep.errors import ExportError
from hf_qep.export.vocabulary_spm import NFC_NOTE, no_normalizer, parts

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS}"
_GPT4O = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_SIGNS}"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"


@dataclass(frozen=True)
class Pre:
    """A pre-tokenizer of llama.cpp. whole_words: whether it takes words that are tokens as they are (`ignore_merges`).
    note: where it only comes near to the expression of the tokenizer."""

    name: str
    whole_words: bool = False
    note: str | None = None


_CASE_NOTE = "llama.cpp cuts words with letters outside ASCII by simpler rules for case and combining marks"
TABLE: dict[tuple[str, ...], tuple[Pre, ...]] = {
    (_GPT2,): (Pre("gpt-2"),),
    (_LLAMA3,): (Pre("llama-bpe", whole_words=True), Pre("smaug-bpe")),
    (_QWEN2,): (Pre("qwen2"),),
    (_QWEN35,): (Pre("qwen35"),),
    (_DIGIT, _GPT2): (Pre("command-r"),),
    (_TEKKEN,): (Pre("tekken", whole_words=True, note=_CASE_NOTE),),
    (_GPT4O,): (Pre("gpt-4o", note=_CASE_NOTE),),
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK): (Pre("deepseek-v3"),),
}
"""Expressions that cut a text, one after the other -> pre-tokenizers of llama.cpp (llama-vocab.cpp, llm_tokenizer_bpe),
the usual name first. Names that stand for the same expressions differ in nothing that an exported file leaves open."""


def is_byte_level(state: Mapping[str, Any]) -> bool:
    """Whether the tokens of a tokenizer.json are spelt in GPT-2's signs for bytes."""
    found = [*parts(state.get("pre_tokenizer"), "pretokenizers"), *parts(state.get("decoder"), "decoders")]
    return any(part["type"] == "ByteLevel" for part in found)


def pre_tokenizer(state: Mapping[str, Any], merges: Sequence[tuple[str, str]], pre: str | None) -> Pre:
    """The pre-tokenizer of llama.cpp that cuts texts as a tokenizer.json says, or the one that the caller names.

    Raises ExportError if llama.cpp has none, or only one that takes whole words for tokens where merges decide.
    """
    if pre is not None:
        return Pre(pre, note=f"the pre-tokenizer {pre!r} was given by name, and nothing was compared with it")
    key = tuple(_expressions(state.get("pre_tokenizer")))
    if key not in TABLE:
        raise ExportError(
            f"llama.cpp has no pre-tokenizer for {list(key)} that is known here; if one of its own does the same, name "
            "it (`pre`), as in `pre='llama-bpe'`"
        )
    whole = bool(state["model"].get("ignore_merges"))
    if _merges_reach_all(state, merges):
        return TABLE[key][0]
    for choice in TABLE[key]:
        if choice.whole_words == whole:
            return choice
    raise ExportError(
        f"the tokenizer has `ignore_merges` {whole} and tokens that merges do not make, llama.cpp's pre-tokenizer "
        f"{TABLE[key][0].name!r} does it the other way; it cannot be exported"
    )


def check_normalizer(state: Mapping[str, Any]) -> list[str]:
    """What llama.cpp leaves out of the normalizer, which may be NFC or none. Raises ExportError for any other."""
    notes = []
    for part in parts(state.get("normalizer"), "normalizers"):
        if part["type"] != "NFC":
            raise no_normalizer(part)
        notes.append(NFC_NOTE)
    return notes


def check_alphabet(model: Mapping[str, Any]) -> list[str]:
    """What happens to bytes that are no token. Raises ExportError if the tokenizer writes its unknown token there."""
    missing = set(ByteLevel.alphabet()) - set(model["vocab"])
    if missing and model.get("unk_token") is not None:
        raise ExportError(
            f"{len(missing)} of 256 bytes are no token, where this tokenizer writes {model['unk_token']!r} and "
            "llama.cpp nothing; keep all bytes when the vocabulary is cut (`keep_bytes`)"
        )
    return [f"{len(missing)} of 256 bytes are no token; texts lose them"] if missing else []


def _expressions(pre: Mapping[str, Any] | None) -> Iterator[str]:
    bytes_seen = False
    for part in parts(pre, "pretokenizers"):
        kind = part["type"]
        if kind == "ByteLevel" and not part.get("add_prefix_space") and not bytes_seen:
            bytes_seen = True
            if part.get("use_regex", True):
                yield _GPT2
        elif kind == "Digits" and not bytes_seen:
            yield _DIGIT if part.get("individual_digits") else _DIGITS
        elif kind == "Split" and _keeps_all(part) and not bytes_seen:
            yield part["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        else:
            raise ExportError(
                f"llama.cpp has no pre-tokenizer for {json.dumps(part, ensure_ascii=False)[:200]}; if one of its own "
                "does the same, name it (`pre`)"
            )


def _keeps_all(part: Mapping[str, Any]) -> bool:
    """Whether a split leaves every match as a word and loses nothing of the text."""
    if "Regex" not in part["pattern"]:
        return False
    everything = part["pattern"]["Regex"].endswith(r"|\s+")
    isolated = part["behavior"] == "Isolated" and not part.get("invert")
    return isolated or (everything and part["behavior"] == "Removed" and bool(part.get("invert")))


def _merges_reach_all(state: Mapping[str, Any], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether merges alone make every token out of its own text, so that it is all one whether words are looked up."""
    model, alphabet = state["model"], set(ByteLevel.alphabet())
    added = {token["content"] for token in state.get("added_tokens", ())}
    exact = models.BPE(vocab=model["vocab"], merges=list(merges))
    spelt = (token for token in model["vocab"] if token not in added and alphabet.issuperset(token))
    return all(len(exact.tokenize(token)) == 1 for token in spelt)
