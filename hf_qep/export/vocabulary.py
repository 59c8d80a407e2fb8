"""The tokenizer of a checkpoint as llama.cpp reads it from a GGUF file.

Keys and their meaning: the GGUF specification (`tokenizer.ggml.*`); what llama.cpp makes of them: llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qep.errors import ExportError
from hf_qep.export import vocabulary_bpe as bpe
from hf_qep.export import vocabulary_spm as spm
from hf_qep.export.vocabulary_special import TokenizerFiles, chat_templates, special_tokens

if TYPE_CHECKING:
    from gguf import GGUFWriter


class TokenType(IntEnum):
    """Types of tokens in GGUF files."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the words of GGUF.

    model: "llama" (SentencePiece-like BPE, has scores) or "gpt2" (byte-level BPE, has merges). pre: llama.cpp's name
    for the way in which texts are cut into words. tokens, types, scores: one for each row of the embedding, ids as in
    transformers. merges: two parts with a space between, by rank. special: role ("bos", "eos", "eot", "eom", "unk",
    "sep", "pad", "mask") -> id; the first two are always there. add_bos, add_eos, add_space_prefix: what llama.cpp puts
    around a text. chat_templates: by name, the usual one is "default". notes: sentences for the user, each a case in
    which llama.cpp makes other tokens of a text than transformers.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...] = ()


def vocabulary(folder: Path, vocab_size: int, *, pre: str | None = None) -> Vocabulary:
    """The tokenizer that `save_pretrained` wrote to a folder.

    vocab_size: rows of the embedding; rows without a token get unused ones. pre: llama.cpp's name of a pre-tokenizer
    for byte-level BPE, where its expressions are not known here; nothing is compared then.

    Raises CheckpointError without a readable tokenizer.json, ExportError for a tokenizer of which llama.cpp would make
    another one: kinds besides BPE, normalizers besides NFC, unknown pre-tokenizers, more tokens than vocab_size.
    """
    files = TokenizerFiles.read(folder)
    merges = _merges(files.state["model"])
    byte_level = bpe.is_byte_level(files.state)
    tokens = _tokens(files, vocab_size, unescape=not byte_level)
    own, notes = _byte_level(files.state, merges, pre) if byte_level else _marked(files.state, merges, tokens, pre)
    special = special_tokens(files)
    return Vocabulary(
        **own,
        tokens=tokens,
        types=_types(files, tokens, special.ids, byte_level),
        special=_in_range(special.ids, vocab_size),
        add_bos=special.add_bos,
        add_eos=special.add_eos,
        chat_templates=chat_templates(files),
        notes=(*notes, *special.notes, *_added_notes(files)),
    )


def write(vocabulary: Vocabulary, writer: GGUFWriter) -> None:
    """Put a tokenizer into the head of a GGUF file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    # Always written: what llama.cpp takes otherwise depends on the names above.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    templates = vocabulary.chat_templates
    if set(templates) == {"default"}:
        writer.add_chat_template(templates["default"])
    elif templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges of a BPE model by rank. Raises ExportError for other kinds, and for options that llama.cpp has not."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise ExportError(
            f"a tokenizer of the kind {kind!r} has no exact counterpart in llama.cpp; only BPE, byte-level or with "
            "byte fallback, can be exported"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ExportError(f"llama.cpp's BPE knows no {option} (here {model[option]!r}); it cannot be exported")
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def _byte_level(
    state: Mapping[str, Any], merges: Sequence[tuple[str, str]], pre: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Fields of a Vocabulary that byte-level BPE has of its own, and notes."""
    choice = bpe.pre_tokenizer(state, merges, pre)
    notes = [*bpe.check_normalizer(state), *bpe.check_alphabet(state["model"]), *filter(None, [choice.note])]
    joined = tuple(f"{left} {right}" for left, right in merges)
    return {"model": "gpt2", "pre": choice.name, "scores": None, "merges": joined, "add_space_prefix": False}, notes


def _marked(
    state: Mapping[str, Any], merges: Sequence[tuple[str, str]], tokens: Sequence[str], pre: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Fields of a Vocabulary that SentencePiece-like BPE has of its own, and notes."""
    if pre is not None:
        raise ExportError(
            f"the pre-tokenizer {pre!r} cannot be named for a tokenizer without ByteLevel; leave `pre` out"
        )
    prefix, notes = spm.space_prefix(state)
    spm.check_bytes(tokens)
    scores = tuple(spm.scores_of(tokens, merges))
    spm.check_pieces(state["model"], merges, dict(zip(tokens, scores, strict=True)))
    return {"model": "llama", "pre": "default", "scores": scores, "merges": None, "add_space_prefix": prefix}, notes


def _tokens(files: TokenizerFiles, vocab_size: int, *, unescape: bool) -> tuple[str, ...]:
    """Texts by id. Rows without a token get a name that no token has."""
    texts = {number: token for token, number in files.state["model"]["vocab"].items()}
    for number, token in files.added().items():
        marked = unescape and token.get("normalized") and not token.get("special")
        texts[number] = token["content"].replace(spm.MARK, " ") if marked else token["content"]
    if max(texts, default=0) >= vocab_size:
        raise ExportError(
            f"the tokenizer has tokens up to number {max(texts)}, the embedding has {vocab_size} rows; cut the "
            "tokenizer or enlarge the embedding"
        )
    taken = set(texts.values())
    if len(taken) < len(texts) or any(not text or "\0" in text for text in taken):
        raise ExportError("two tokens have the same text, or one is empty or holds a NUL; llama.cpp cannot load them")
    return tuple(texts[n] if n in texts else _unused(n, taken) for n in range(vocab_size))


def _unused(number: int, taken: set[str]) -> str:
    name = f"[PAD{number}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _types(
    files: TokenizerFiles, tokens: tuple[str, ...], special: Mapping[str, int], byte_level: bool
) -> tuple[TokenType, ...]:
    known, added = set(files.state["model"]["vocab"].values()), files.added()
    control = {n for n, token in added.items() if token.get("special")} | {special["bos"], special["eos"]}
    unknown = None if byte_level else special.get("unk")

    def kind(number: int, text: str) -> TokenType:
        if number == unknown:
            return TokenType.UNKNOWN
        if number in control:
            return TokenType.CONTROL
        # A piece with SentencePiece's mark would be found in no text as it stands, and be printed with the mark.
        if number in added and (byte_level or spm.MARK not in text or number not in known):
            return TokenType.USER_DEFINED
        if number not in known:
            return TokenType.UNUSED
        return TokenType.BYTE if not byte_level and spm.BYTE.fullmatch(text) else TokenType.NORMAL

    return tuple(kind(number, text) for number, text in enumerate(tokens))


def _in_range(special: Mapping[str, int], vocab_size: int) -> dict[str, int]:
    for role, number in special.items():
        if number >= vocab_size:
            raise ExportError(
                f"the {role} token has the number {number}, the embedding only {vocab_size} rows; correct "
                f"{role}_token_id in generation_config.json and config.json"
            )
    return dict(special)


def _added_notes(files: TokenizerFiles) -> list[str]:
    """What llama.cpp does otherwise around added tokens. Raises ExportError where that concerns ordinary text."""
    stripping = []
    prefixed = any(part["type"] == "Prepend" for part in spm.parts(files.state.get("normalizer"), "normalizers"))
    for token in files.added().values():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags and not token.get("special"):
            raise ExportError(
                f"the added token {token['content']!r} has {flags[0]}, which llama.cpp does not have; add it without"
            )
        if prefixed and token.get("normalized"):
            raise ExportError(
                f"the added token {token['content']!r} is normalized, so that this tokenizer finds it only behind a "
                "space, llama.cpp anywhere; add it with normalized=False"
            )
        stripping += [token["content"]] if flags else []
    return [f"llama.cpp keeps the spaces beside {stripping}, this tokenizer takes them in"] if stripping else []
