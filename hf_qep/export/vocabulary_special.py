"""What the files beside a tokenizer.json say: special tokens, where they are put, templates of conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qep.errors import CheckpointError, ExportError
from hf_qep.export.vocabulary_spm import parts

_SIMPLE = ("unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of the files of a checkpoint that a tokenizer is made of, {} for those that are not there; `state` is
    tokenizer.json."""

    folder: Path
    state: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Raises CheckpointError if tokenizer.json is missing, or one of the files cannot be read."""
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{str(folder)!r} has no tokenizer.json, which the export reads; load the tokenizer with "
                "AutoTokenizer and save it there with save_pretrained"
            )
        state = _json(folder / "tokenizer.json")
        if not isinstance(state.get("model"), Mapping):
            raise CheckpointError(f"{str(folder / 'tokenizer.json')!r} has no entry `model`; save the tokenizer again")
        names = ("tokenizer_config", "special_tokens_map", "generation_config", "config")
        return cls(folder, state, *(_json(folder / f"{name}.json") for name in names))

    def added(self) -> dict[int, Mapping[str, Any]]:
        """Tokens that were added to the vocabulary, by id; tokenizer_config.json may know more of them."""
        listed = self.tokenizer_config.get("added_tokens_decoder", {})
        return {int(n): t for n, t in listed.items()} | {t["id"]: t for t in self.state.get("added_tokens", ())}

    def number(self, role: str) -> int | None:
        """Id of the token that the tokenizer itself names for a role such as "bos"."""
        for source in (self.tokenizer_config, self.special_tokens_map, self.state["model"]):
            token = source.get(f"{role}_token")
            text = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(text, str):
                return self._number_of(text)
        return None

    def _number_of(self, text: str) -> int | None:
        found = next((number for number, token in self.added().items() if token["content"] == text), None)
        vocabulary = self.state["model"].get("vocab", {})
        return found if found is not None else vocabulary.get(text) if isinstance(vocabulary, Mapping) else None

    def numbers(self, role: str) -> list[int]:
        """Ids for a role, those of the tokenizer first, then what the model's configurations name."""
        given = [self.number(role)]
        texts = self.config.get("text_config") or {}
        for source in (self.generation_config, self.config, texts):
            value = source.get(f"{role}_token_id")
            if value is not None:
                given += value if isinstance(value, list) else [value]
                break
        return list(dict.fromkeys(n for n in given if n is not None and n >= 0))


@dataclass(frozen=True)
class SpecialTokens:
    """ids: role as in GGUFWriter ("bos", "eos", "eot", "eom", "unk", "sep", "pad", "mask") -> token. add_bos, add_eos:
    whether texts get them. notes: what llama.cpp does otherwise."""

    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    notes: tuple[str, ...]


def special_tokens(files: TokenizerFiles) -> SpecialTokens:
    """Special tokens of a checkpoint.

    Raises ExportError if llama.cpp cannot put them where the tokenizer does, or if no token ends a text: it would take
    one of its own choice.
    """
    first, last = _around(files)
    ends = list(dict.fromkeys([*last, *files.numbers("eos")]))
    if not ends:
        raise ExportError(
            "no token ends a text, and llama.cpp would take one of its own choice; name one as eos_token in "
            "tokenizer_config.json or as eos_token_id in generation_config.json"
        )
    begins = [*first, *files.numbers("bos")]
    # Where no first token is named, llama.cpp takes number 11 (1 for SentencePiece) for templates that ask for one.
    ids = {"bos": (begins or ends)[0], "eos": ends[0]}
    texts = {number: token["content"] for number, token in files.added().items()}
    for number in ends[1:]:
        role = "eom" if "eom" in texts.get(number, "") else "eot"
        ids.setdefault(role, number)
    left = [texts.get(number, str(number)) for number in ends if number not in ids.values()]
    ids |= {role: numbers[0] for role in _SIMPLE if (numbers := files.numbers(role))}
    notes = (f"llama.cpp may go on behind {left}, which end a text in transformers",) if left else ()
    return SpecialTokens(ids, bool(first), bool(last), notes)


def _around(files: TokenizerFiles) -> tuple[list[int], list[int]]:
    """Tokens before and behind a text: one at most on each side."""
    # Not from add_bos_token in tokenizer_config.json, which transformers leaves aside where there is a tokenizer.json.
    first, last = _post_processor(files.state.get("post_processor"))
    if len(first) > 1 or len(last) > 1:
        raise ExportError(
            f"the tokenizer puts {len(first)} tokens before a text and {len(last)} behind it, llama.cpp one at most; "
            "save it with a simpler post-processor"
        )
    return first, last


def _post_processor(processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    first: list[int] = []
    last: list[int] = []
    for part in parts(processor, "processors"):
        if part["type"] == "TemplateProcessing":
            place = next(i for i, item in enumerate(part["single"]) if "Sequence" in item)
            first = _ids(part, part["single"][:place]) + first
            last = last + _ids(part, part["single"][place + 1 :])
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            first, last = [part["cls"][1], *first], [*last, part["sep"][1]]
        elif part["type"] != "ByteLevel":
            raise ExportError(f"llama.cpp has nothing like the post-processor {part['type']!r} of this tokenizer")
    return first, last


def _ids(template: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[int]:
    return [n for item in items for n in template["special_tokens"][item["SpecialToken"]["id"]]["ids"]]


def chat_templates(files: TokenizerFiles) -> dict[str, str]:
    """Templates of conversations by name, as transformers reads them: chat_template.jinja before tokenizer_config.json.
    The usual one is "default"."""
    named = files.tokenizer_config.get("chat_template") or {}
    if isinstance(named, str):
        named = {"default": named}
    elif isinstance(named, list):
        named = {entry["name"]: entry["template"] for entry in named}
    found = dict(named)
    if (files.folder / "chat_template.jinja").is_file():
        found = {"default": (files.folder / "chat_template.jinja").read_text(encoding="utf-8")}
    for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
