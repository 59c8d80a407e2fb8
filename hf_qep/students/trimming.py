"""A tokenizer with fewer tokens, which encodes what it was cut for into the same tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_qep.errors import ConfigError


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: tuple[int, ...]) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens `kept` only, numbered by their position in it; the given one stays as it is.

    kept: ids of the teacher, rising, best from `used_tokens`; ids without a token (rows that only fill up the
    embeddings) are allowed behind all others. Raises ConfigError if a special token of the tokenizer is missing.
    """
    state = tokenizer_state(tokenizer)
    new = {old: position for position, old in enumerate(kept)}
    for name, token in tokenizer.special_tokens_map.items():
        for one in token if isinstance(token, list) else [token]:
            if tokenizer.convert_tokens_to_ids(one) not in new:
                raise ConfigError(f"the {name} {one!r} is not among the tokens that are kept; add it")
    _cut_model(state, new)
    state["added_tokens"] = [t | {"id": new[t["id"]]} for t in state["added_tokens"] if t["id"] in new]
    state["post_processor"] = _renumbered(state.get("post_processor"), new)
    if state.get("padding"):
        state["padding"] = state["padding"] | {"pad_id": new[state["padding"]["pad_id"]]}
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(state))
    return trimmed


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of its tokenizer.json. Raises ConfigError if it has none."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{type(tokenizer).__name__} has no tokenizer.json, so its vocabulary cannot be cut")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def vocabulary_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json, without the added tokens. Raises ConfigError for a kind that is not known."""
    model = state["model"]
    kind = model.get("type")
    if kind in ("BPE", "WordPiece", "WordLevel"):
        return dict(model["vocab"])
    if kind == "Unigram":
        return {token: number for number, (token, _) in enumerate(model["vocab"])}
    raise ConfigError(
        f"a tokenizer of the kind {kind!r} cannot be cut; the kinds are BPE, WordPiece, WordLevel, Unigram"
    )


def merges_of(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a BPE tokenizer in the order of their ranks; none for other kinds."""
    merges = state["model"].get("merges") or []
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]


def merged(state: Mapping[str, Any], left: str, right: str) -> str:
    """What a merge makes: the second part loses its mark inside words."""
    prefix = state["model"].get("continuing_subword_prefix") or ""
    return left + right.removeprefix(prefix)


def _cut_model(state: dict[str, Any], new: Mapping[int, int]) -> None:
    model, vocabulary = state["model"], vocabulary_of(state)
    staying = {token: new[number] for token, number in vocabulary.items() if number in new}
    if model["type"] == "Unigram":
        _cut_unigram(model, staying, new)
        return
    if "merges" in model:
        pairs = [p for p in merges_of(state) if {*p, merged(state, *p)} <= staying.keys()]
        model["merges"] = [list(pair) for pair in pairs]
    model["vocab"] = staying


def _cut_unigram(model: dict[str, Any], staying: Mapping[str, int], new: Mapping[int, int]) -> None:
    """The place in the list is the id, so there can be no gaps."""
    if sorted(staying.values()) != list(range(len(staying))):
        raise ConfigError(
            "the tokens that are kept leave gaps in the numbering of a Unigram tokenizer; keep no id between"
        )
    pieces = {token: [token, score] for token, score in model["vocab"]}
    model["vocab"] = [pieces[token] for token in sorted(staying, key=staying.__getitem__)]
    if model.get("unk_id") is not None:
        model["unk_id"] = new[model["unk_id"]]


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids, whatever it is nested in."""
    if isinstance(part, list):
        return [_renumbered(p, new) for p in part]
    if not isinstance(part, dict):
        return part
    part = {name: _renumbered(value, new) for name, value in part.items()}
    if part.get("type") == "TemplateProcessing":
        tokens = part["special_tokens"].items()
        part["special_tokens"] = {name: t | {"ids": [_id(name, i, new) for i in t["ids"]]} for name, t in tokens}
    elif part.get("type") in ("BertProcessing", "RobertaProcessing"):
        part |= {side: [part[side][0], _id(part[side][0], part[side][1], new)] for side in ("sep", "cls")}
    return part


def _id(token: str, old: int, new: Mapping[int, int]) -> int:
    if old not in new:
        raise ConfigError(f"the tokenizer puts {token!r} around texts, and it is not among the tokens that are kept")
    return new[old]
