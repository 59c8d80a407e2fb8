"""Documents to rows of token ids (rows, seq_len).

Each document is taken apart into excerpts of about one row. The first round takes one excerpt of every document, in an
order drawn by the seed, the next round a second one of those that are longer: a book cannot fill everything, and only
as much is tokenised as the rows need. An excerpt is treated as a document of its own.

Language models: excerpts are joined into one stream and cut every `seq_len` tokens. What the tokenizer adds by itself
(BOS) opens each excerpt; if it adds nothing, EOS closes each one where the tokenizer has an EOS.

Encoders (the tokenizer writes [CLS] ... [SEP]): every excerpt is a row of its own, as it is when the model is used,
filled up with padding. One that is too long is cut, closed with [SEP], and its rest opens the next row with [CLS].
Several texts in a row would attend to each other, which an encoder of single texts never saw.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_qep.engine.text_sources import Document, TextSource
from hf_qep.errors import CalibrationError

PROBE_DOCUMENTS = 8
PROBE_CHARACTERS = 2000
"""The first characters of the first documents say how many characters one token takes."""

TOKENISE_BATCH = 16
WORD_SEARCH = 64
"""An excerpt begins at the next blank (or end) within this many characters; scripts without blanks are cut anywhere."""


@dataclass(frozen=True)
class PackedRows:
    """ids: int64 (rows, seq_len). mask: int64 of the same shape, 0 where a row is filled up. documents: how many
    documents they were taken from."""

    ids: Tensor
    mask: Tensor
    documents: int


@dataclass(frozen=True)
class _Excerpt:
    text: str
    rendered: bool  # by the chat template, which writes the special tokens itself
    document: int


def pack_rows(source: TextSource, tokenizer: Any, *, num_rows: int, seq_len: int, seed: int) -> PackedRows:
    """At most `num_rows` rows of `seq_len` tokens from `source`; fewer if its text does not suffice, perhaps none."""
    marks = _Marks.of(tokenizer)
    if marks.encoder and seq_len < 3:
        raise CalibrationError(f"seq_len {seq_len} has no room for a token between [CLS] and [SEP]; use at least 3")
    fill = _encoder_rows if marks.encoder else cut_rows
    used: set[int] = set()
    tokens = _tokens(_excerpts(source, tokenizer, seq_len, seed), tokenizer, marks, used)
    rows = list(itertools.islice(fill(tokens, seq_len), num_rows))
    ids = torch.full((len(rows), seq_len), marks.padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row, dtype=torch.long), 1
    return PackedRows(ids, mask, len(used))


def cut_rows(sequences: Iterable[list[int]], seq_len: int) -> Iterator[list[int]]:
    """The sequences behind each other, cut into full rows; the rest is left out."""
    buffer: list[int] = []
    for ids in sequences:
        buffer.extend(ids)
        full = len(buffer) // seq_len * seq_len
        for start in range(0, full, seq_len):
            yield buffer[start : start + seq_len]
        del buffer[:full]


@dataclass(frozen=True)
class _Marks:
    """What the tokenizer writes around a text by itself, found by asking it."""

    encoder: bool
    adds: bool
    eos: int | None
    padding: int

    @classmethod
    def of(cls, tokenizer: Any) -> _Marks:
        bare = _ids(tokenizer, ["a"], special=False)[0]
        marked = _ids(tokenizer, ["a"], special=True)[0]
        first, last = (marked[0], marked[-1]) if marked else (-1, -1)
        encoder = (
            len(marked) > len(bare)
            and first == getattr(tokenizer, "cls_token_id", None)
            and last == getattr(tokenizer, "sep_token_id", None)
        )
        padding = getattr(tokenizer, "pad_token_id", None)
        adds, eos = len(marked) > len(bare), getattr(tokenizer, "eos_token_id", None)
        return cls(encoder, adds, eos, last if padding is None else padding)


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]]


def _excerpts(source: TextSource, tokenizer: Any, seq_len: int, seed: int) -> Iterator[_Excerpt]:
    """Excerpts of about `seq_len` tokens, one per document and round; together they are the whole text, once."""
    documents = (_render(document, tokenizer, source.name) for document in source.shuffled(seed))
    head = list(itertools.islice(documents, PROBE_DOCUMENTS))
    if not head:
        return
    probe = [text[:PROBE_CHARACTERS] for text, _ in head]
    tokens = sum(map(len, _ids(tokenizer, probe, special=False)))
    width = max(1, round(seq_len * sum(map(len, probe)) / max(tokens, 1)))

    longer: deque[tuple[int, str, bool, list[tuple[int, int]]]] = deque()
    for number, (text, rendered) in enumerate(itertools.chain(head, documents)):
        spans = _spans(text, width)
        random.Random(f"{seed}:{number}").shuffle(spans)
        start, end = spans.pop()
        yield _Excerpt(text[start:end], rendered, number)
        if spans:
            longer.append((number, text, rendered, spans))
    while longer:
        number, text, rendered, spans = longer.popleft()
        start, end = spans.pop()
        yield _Excerpt(text[start:end], rendered, number)
        if spans:
            longer.append((number, text, rendered, spans))


def _spans(text: str, width: int) -> list[tuple[int, int]]:
    """Borders of equal parts no longer than about `width` characters, moved to the next blank if one is near."""
    parts = -(-len(text) // width)
    borders = [0]
    for part in range(1, parts):
        at = part * len(text) // parts
        blank = re.compile(r"\s").search(text, at, at + WORD_SEARCH)
        if blank:
            at = blank.start()
        elif at + WORD_SEARCH >= len(text):
            at = len(text)  # inside the last word
        if borders[-1] < at < len(text):
            borders.append(at)
    return list(itertools.pairwise([*borders, len(text)]))


def _render(document: Document, tokenizer: Any, name: str) -> tuple[str, bool]:
    """Text of a document, and whether the chat template wrote it."""
    if isinstance(document, str):
        return document, False
    try:
        return tokenizer.apply_chat_template(document, tokenize=False), True
    except Exception as error:  # jinja and transformers raise different families
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "refuses a chat" if getattr(tokenizer, "chat_template", None) else "has no chat template for the chats"
        raise CalibrationError(
            f"the tokenizer {what} of {name!r} ({reason}); set tokenizer.chat_template or pass plain text"
        ) from error


def _tokens(excerpts: Iterator[_Excerpt], tokenizer: Any, marks: _Marks, used: set[int]) -> Iterator[list[int]]:
    """Token ids per excerpt. `used` collects the numbers of the documents that were tokenised."""
    while batch := list(itertools.islice(excerpts, TOKENISE_BATCH)):
        found: dict[int, list[int]] = {}
        for rendered in (False, True):
            members = [i for i, excerpt in enumerate(batch) if excerpt.rendered is rendered]
            if members:
                ids = _ids(tokenizer, [batch[i].text for i in members], special=not rendered)
                found.update(zip(members, ids, strict=True))
        for i, excerpt in enumerate(batch):
            closes = not marks.adds and not excerpt.rendered and marks.eos is not None
            used.add(excerpt.document)
            yield [*found[i], marks.eos] if closes else found[i]


def _encoder_rows(tokens: Iterator[list[int]], seq_len: int) -> Iterator[list[int]]:
    for ids in tokens:
        if len(ids) < 3:
            continue  # nothing between the marks
        first, *rest, last = ids
        for start in range(0, len(rest), seq_len - 2):
            yield [first, *rest[start : start + seq_len - 2], last]
