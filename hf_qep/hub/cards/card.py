"""Model cards: rendered from the measured record, checked before they are published.

Templates lie in `model_cards/`; they hold the words that are always true, everything else is put in from here and is
escaped unless it was made as Markdown. The last line of a card carries a digest of the text above, so that a card that
somebody changed by hand is not overwritten by mistake.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_qep.errors import CardError, ExtraMissingError, OutputExistsError
from hf_qep.files import bundled, write_text_aside
from hf_qep.hub.base import BaseFacts
from hf_qep.hub.cards.context import card_context
from hf_qep.hub.cards.escape import code, finish
from hf_qep.hub.cards.facts import CardFacts
from hf_qep.hub.cards.lint import card_problems
from hf_qep.hub.cards.metadata import metadata, result_files, stale_results
from hf_qep.hub.cards.plot import draw
from hf_qep.hub.cards.student import StudentFacts, student_context, student_metadata

__all__ = ["Written", "card_problems", "is_generated", "render_card", "render_student_card", "write_card"]

CARD = "README.md"
_MARK = re.compile(r"<!-- written by hf-qep; sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Written:
    """What `write_card` left in the folder. notes: what the user should know."""

    card: Path
    plot: Path | None
    results: tuple[Path, ...]
    notes: tuple[str, ...]


def render_card(facts: CardFacts) -> str:
    """The card of a quantised model as one text. Raises CardError if the result does not pass its own check."""
    return _complete(metadata(facts), "quantized.md.jinja", card_context(facts))


def render_student_card(values: Any, base: BaseFacts | None = None) -> str:
    """The card of a distilled student. values: a dict with the fields of `StudentFacts`. Raises CardError."""
    facts = values if isinstance(values, StudentFacts) else StudentFacts.from_dict(values)
    return _complete(student_metadata(facts, base), "student.md.jinja", student_context(facts))


def write_card(folder: Path, facts: CardFacts, *, overwrite: bool = False) -> Written:
    """Draw the plot and write README.md and results of registered benchmarks, each in one step.

    Raises OutputExistsError for a card that was not made here, or was changed since, unless `overwrite`.
    """
    target = folder / CARD
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise OutputExistsError(f"{CARD!r} in {folder.name!r} is no regular file; move it away")
    if target.is_file() and not overwrite and not is_generated(target.read_text(encoding="utf-8", errors="replace")):
        raise OutputExistsError(
            f"the {CARD} in {folder.name!r} was written or changed by hand; move it away, or pass --overwrite"
        )
    notes = list(facts.notes)
    for place in ("images", ".eval_results"):
        if (folder / place).is_symlink():
            raise OutputExistsError(f"{place!r} in {folder.name!r} is a link; remove it")
    try:
        facts = replace(facts, plot=draw(facts.made.layers, folder)) if facts.made.layers else facts
    except ExtraMissingError as error:
        notes.append(f"the plot of bits per layer was left out: {error}")
    card, results = render_card(facts), result_files(facts)
    for name, text in results.items():
        write_text_aside(folder / name, text)
    for name in stale_results(folder, results):
        (folder / name).unlink()
        notes.append(f"{name!r} was removed: the record does not hold that result any more")
    write_text_aside(target, card)
    return Written(
        target, folder / facts.plot if facts.plot else None, tuple(folder / n for n in results), tuple(notes)
    )


def is_generated(text: str) -> bool:
    """Whether a card is as it was written here, unchanged."""
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


def sealed(text: str) -> str:
    """A card with its mark, by which a later change by hand is seen."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- written by hf-qep; sha256 of the text above: {digest} -->\n"


def _complete(data: Any, template: str, context: dict[str, Any]) -> str:
    """Front matter, body and mark, linted: a card that could not be published is not written."""
    # One long line per value: folded ones would be hard to compare with the original's.
    from huggingface_hub.utils import yaml_dump

    head = yaml_dump(data.to_dict(), sort_keys=False, width=1 << 20).strip()
    body = _render(template, context).strip()
    text = f"---\n{head}\n---\n\n{body}\n\n"
    if problems := card_problems(text):
        raise CardError("the card cannot be made: " + "; ".join(problems))
    return sealed(text)


def _render(template: str, context: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(bundled("model_cards")),
        undefined=StrictUndefined,
        finalize=finish,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # `finish` escapes for Markdown, in which HTML escaping is not enough
    )
    return environment.get_template(template).render(context | {"code": code})
