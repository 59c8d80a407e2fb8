"""How a table becomes a question with examples, for a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crm.worlds import LEVELS, NOTE, World

from hf_qep.distill.records import CATEGORY, NUMBER, RecordColumn, RecordText
from hf_qep.distill.records import NOTE as NOTE_KIND

SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)
ARROW = " ->"
"""What stands before an answer."""
ANSWERS = (" no", " yes")
"""The bad outcome and the good one."""


def asked(text: str) -> str:
    """A deal whose outcome is to be said next."""
    return text + ARROW


def shown(question: str, texts: Sequence[str], won: Sequence[bool]) -> str:
    """A question and deals with their outcomes, one per line, so that `asked` can follow."""
    deals = "".join(f"{asked(text)}{ANSWERS[bool(yes)]}\n" for text, yes in zip(texts, won, strict=True))
    return f"{question} ?\n{deals}"


def write(world: World, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Deals of a world as text, by levels that are known and not learnt from rows."""
    return RecordText(tuple(_column(field.name, field.values) for field in world.fields) + (_NOTE,)).texts(rows)


_NOTE = RecordColumn(NOTE, NOTE, NOTE_KIND)
_EDGES = tuple((float(100 // LEVELS * k) - 1, 100 * k // LEVELS) for k in range(1, LEVELS))


def _column(name: str, values: Mapping[str, float] | None) -> RecordColumn:
    if values is None:
        return RecordColumn(name, name, NUMBER, edges=_EDGES)
    return RecordColumn(name, name, CATEGORY, values=tuple(values))
