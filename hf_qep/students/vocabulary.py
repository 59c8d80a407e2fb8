"""The tokens that a task needs, and a student's numbering of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.students.trimming import merged, merges_of, tokenizer_state, trim_tokenizer, vocabulary_of

__all__ = ["FILE_NAME", "VocabularyMap", "trim_tokenizer", "used_tokens"]

FILE_NAME = "vocab_map.safetensors"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTE_LEVEL = frozenset(ByteLevel.alphabet())
"""The signs that stand for bytes in byte-level BPE."""
_MARKS = ("##", "▁", "Ġ")
"""How tokens of one sign may begin: inside a word, after a space."""


@dataclass(frozen=True)
class VocabularyMap:
    """Numbers of tokens in the teacher and in the student.

    kept: the teacher's ids, rising; their positions are the student's ids. size: number of the teacher's tokens.
    """

    kept: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not self.kept or not rising or self.kept[0] < 0 or self.kept[-1] >= self.size:
            raise ConfigError(f"a vocabulary map needs rising ids below {self.size}")

    @property
    def to_old(self) -> Tensor:
        """The teacher's id of each token of the student, (kept,) int64: `teacher_logits[..., to_old]`."""
        return torch.tensor(self.kept)

    @property
    def to_new(self) -> Tensor:
        """The student's id of each token of the teacher, -1 where it is gone, (size,) int64."""
        new = torch.full((self.size,), -1)
        new[self.to_old] = torch.arange(len(self.kept))
        return new

    def encode(self, ids: Tensor) -> Tensor:
        """Ids of the teacher as ids of the student; negative ones (ignored labels) stay. Raises ConfigError if a token
        is gone."""
        new = torch.where(ids < 0, ids, self.to_new.to(ids.device)[ids.clamp_min(0)])
        if bool(((new < 0) & (ids >= 0)).any()):
            gone = sorted(set(ids[(new < 0) & (ids >= 0)].tolist()))
            raise ConfigError(f"the vocabulary does not keep the tokens {gone[:5]}; cut it with these texts too")
        return new

    def decode(self, ids: Tensor) -> Tensor:
        """Ids of the student as ids of the teacher; negative ones stay."""
        return torch.where(ids < 0, ids, self.to_old.to(ids.device)[ids.clamp_min(0)])

    def save(self, folder: Path) -> Path:
        """Write `vocab_map.safetensors`: `kept`, int64, and `size`."""
        path = folder / FILE_NAME
        save_file({"kept": self.to_old, "size": torch.tensor([self.size])}, path)
        return path

    @classmethod
    def load(cls, folder: Path) -> VocabularyMap:
        """Read what `save` wrote. Raises CheckpointError if it is missing or damaged."""
        try:
            tensors = load_file(folder / FILE_NAME)
            return cls(tuple(tensors["kept"].tolist()), int(tensors["size"]))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{str(folder / FILE_NAME)!r} cannot be read: {error}") from error


def used_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | Iterable[Tensor],
    *,
    keep_special: bool = True,
    keep_bytes: bool = True,
    multiple: int = 1,
) -> tuple[int, ...]:
    """Ids of the teacher's tokens that a task needs, rising.

    texts: the texts of the task, or tensors of ids of any shape (negative ones are passed over). keep_special: also the
    special tokens. keep_bytes: also the bytes, digits, letters and signs of ASCII that any other text falls back to.
    multiple: fill up to a multiple of this with the lowest ids (tables of BPE begin with the most frequent). A BPE
    vocabulary is closed: of each token that stays, both parts of every merge that makes it stay too, so that the
    encoding of the texts does not change. Raises ConfigError for a tokenizer without a tokenizer.json.
    """
    state = tokenizer_state(tokenizer)
    vocabulary = vocabulary_of(state)
    used = _ids_in(tokenizer, texts)
    if keep_special:
        used |= {token["id"] for token in state["added_tokens"] if token["special"]} | set(tokenizer.all_special_ids)
    if keep_bytes:
        signs = _BYTE_LEVEL if '"ByteLevel"' in tokenizer.backend_tokenizer.to_str() else frozenset()
        used |= {number for token, number in vocabulary.items() if token in signs or _is_basic(token)}
    used |= _always(state, vocabulary)
    parents = _parents(state, vocabulary)
    kept = _closed(used, parents)
    return tuple(sorted(_filled(kept, parents, vocabulary, multiple)))


def _ids_in(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] | Iterable[Tensor]) -> set[int]:
    found: set[int] = set()
    for text in [texts] if isinstance(texts, str) else texts:
        ids = text.unique().tolist() if isinstance(text, Tensor) else tokenizer(text)["input_ids"]
        found.update(number for number in ids if number >= 0)
    return found


def _is_basic(token: str) -> bool:
    """Whether a token is a byte, or one sign of ASCII with or without a mark, or a mark."""
    sign = next((token.removeprefix(mark) for mark in _MARKS if token.startswith(mark)), token)
    return _BYTE.fullmatch(token) is not None or (len(sign) == 1 and sign.isascii()) or token in _MARKS


def _always(state: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[int]:
    """The unknown token, and the piece of lowest score, from which Unigram takes the score of what it does not know."""
    model = state["model"]
    if model["type"] == "Unigram":
        lowest = min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1])
        return {lowest} | ({model["unk_id"]} if model.get("unk_id") is not None else set())
    return {vocabulary[model["unk_token"]]} if model.get("unk_token") in vocabulary else set()


def _parents(state: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[int, set[int]]:
    """Token -> the parts of all merges that make it."""
    parents: dict[int, set[int]] = {}
    for left, right in merges_of(state):
        made = vocabulary[merged(state, left, right)]
        parents.setdefault(made, set()).update((vocabulary[left], vocabulary[right]))
    return parents


def _closed(used: set[int], parents: Mapping[int, set[int]]) -> set[int]:
    kept, waiting = set(), list(used)
    while waiting:
        number = waiting.pop()
        if number not in kept:
            kept.add(number)
            waiting.extend(parents.get(number, ()))
    return kept


def _filled(kept: set[int], parents: Mapping[int, set[int]], vocabulary: Mapping[str, int], multiple: int) -> set[int]:
    """More of the lowest ids until the size divides, each only after its parts; all of them if that is not reached."""
    if multiple < 1:
        raise ConfigError(f"`multiple` of a vocabulary must be at least 1, not {multiple}")
    kept, others = set(kept), sorted(set(vocabulary.values()) - kept)
    while len(kept) % multiple and others:
        number = next(n for n in others if parents.get(n, set()) <= kept)
        others.remove(number)
        kept.add(number)
    return kept
