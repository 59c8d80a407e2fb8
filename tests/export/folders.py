"""Folders with small tokenizers of every kind, as `save_pretrained` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
TEXTS = (
    "The harbour at dawn was quiet, and three boats left; nobody'd seen THEM, they'LL say.",
    "1 12 123 1234 12345678 3.14 1,000,000 in 1930s, ²½ ⅷ ٣٤",
    "def f(x):\n    return x  +  1\n\n\n\t# a tab\r\n  \n",
    "Ünïcode: café déjà вода ΩΜΕΓΑ 日本語のテキスト 한국어 हिन्दी 🚀 (ok) 🙂",
    "a  b   c    d     e http://x.y/z?q=1&r=2#h __init__(self)->None; a==b!=c",
    "hello", "\n", "   ", "\t\t", "'s", "…—“”", "\u00a0x\u3000y",
)  # fmt: skip
MORE = (" leading", "trailing ", " the <think> boats</think>left<|im_start|>user\n the end</s>")
SPECIAL = ("<unk>", "<s>", "</s>")


def splits(*expressions: str) -> list[Any]:
    """Cut by each expression in turn, then spell in bytes."""
    cuts = [pre.Split(Regex(expression), "isolated") for expression in expressions]
    return [*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)]


BYTE_LEVEL: Mapping[str, list[Any]] = {
    "gpt-2": [pre.ByteLevel(add_prefix_space=False)],
    "llama-bpe": splits(LLAMA3),
    "qwen2": splits(QWEN2),
    "qwen35": splits(QWEN35),
    "command-r": [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
    "deepseek-v3": splits(*DEEPSEEK),
    "tekken": splits(TEKKEN),
}
"""llama.cpp's name -> the steps in which such a tokenizer cuts texts."""


def byte_level(folder: Path, steps: list[Any], *, ignore_merges: bool = False, normalizer: Any = None) -> Path:
    """Byte-level BPE, trained so that most words of TEXTS are one token: every cut shows."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre.ByteLevel.alphabet())
    core.train_from_iterator(TEXTS, _trainer(2000, initial_alphabet=alphabet))
    if normalizer is not None:
        core.normalizer = normalizer
    return save(core, folder)


def spm(folder: Path, pre_tokenizer: Any = None, normalizer: Any = None) -> Path:
    """BPE with byte fallback and every merge of a token, as SentencePiece's vocabularies come out of transformers."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer, core.pre_tokenizer = normalizers.Replace(" ", "▁"), pre.Metaspace()
    core.train_from_iterator([text.replace("  ", " ") for text in TEXTS], _trainer(1000))
    state = json.loads(core.to_str())
    _complete(state["model"])
    core = Tokenizer.from_str(json.dumps(state | {"normalizer": None, "pre_tokenizer": None}))
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return save(core, folder)


def legacy() -> Any:
    """The normalizer of Llama 2: a space in front, then marks for spaces."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def save(core: Tokenizer, folder: Path, **config: Any) -> Path:
    """Through transformers, with a first token put before every text and two added tokens, one of them special."""
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    core.add_special_tokens(["<|im_start|>"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    PreTrainedTokenizerFast(tokenizer_object=core, **named).save_pretrained(folder)
    return folder


def change(folder: Path, name: str = "tokenizer.json", **entries: Any) -> Path:
    """Replace entries of one of the JSON files."""
    path = folder / name
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(old | entries), encoding="utf-8")
    return folder


def state(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json."""
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def _trainer(size: int, **more: Any) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False, **more)


def _complete(model: dict[str, Any]) -> None:
    """Bytes, runs of spaces, and for each token a merge of every two tokens that make it."""
    vocabulary = model["vocab"]
    made = ["▁" * 2, "▁" * 3, "▁" * 4, *("".join(pair) for pair in model["merges"])]
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + made:
        vocabulary.setdefault(token, len(vocabulary))
    cuts = [(token[:i], token[i:]) for token in made for i in range(1, len(token))]
    model["merges"] = [list(cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
