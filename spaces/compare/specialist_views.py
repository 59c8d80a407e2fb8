"""Answers of specialists as HTML; like in `views`, everything that is not of this file passes `escape`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import texts
from PIL import Image
from specialists import TEACHER, Deals, Glyphs, Opinion, Party
from torch import Tensor
from views import link, problem, seconds

PICTURE_SIDE = 84
"""Pixels of a glyph on the page."""


def about(found: Deals | Glyphs) -> str:
    """Who answers, under which licence, and what is not here."""
    said = [_about(party) for party in found.parties]
    said += [f"<li>{escape(texts.READ_BEFORE)}</li>"] if _has_prompt(found) else []
    return f"<ul class='parties'>{''.join(said)}</ul>{problem(found.note)}"


def deal(found: Deals, opinions: Sequence[Opinion], text: str, outcome: str) -> str:
    """Answer and probability of both, what they read, and what happened if that is known."""
    good = found.answers[1].strip()
    rows = [(opinion, escape(str(opinion.chances[0][0])), f"{dict(opinion.chances)[good]:.1%}") for opinion in opinions]
    happened = f"<p>What happened: <strong>{escape(outcome)}</strong>.</p>" if outcome else ""
    table = _table(f"How likely it is that the answer is {good}", ("Answer", f"P({good})"), rows)
    return f"{table}{happened}<p class='read'>Read as: <code>{escape(text)}</code></p>"


def glyph(found: Glyphs, opinions: Sequence[Opinion]) -> str:
    """The nearest glyphs of both, as pictures with name and cosine."""
    rows = []
    for opinion in opinions:
        shown = "".join(
            f"<figure class='glyph'>{picture(found.images[int(number)], found.names[int(number)])}"
            f"<figcaption>{escape(found.names[int(number)])}: {cosine:.2f}</figcaption></figure>"
            for number, cosine in opinion.chances
        )
        rows.append((opinion, f"<div class='glyphs'>{shown}</div>"))
    return _table("The nearest glyphs, with the cosine of the embeddings", ("Nearest",), rows)


def support(found: Glyphs) -> str:
    """All glyphs that can be found."""
    shown = "".join(
        f"<figure class='glyph'>{picture(image, name)}<figcaption>{escape(name)}</figcaption></figure>"
        for image, name in zip(found.images, found.names, strict=True)
    )
    return f"<div class='glyphs'>{shown}</div>"


def picture(image: Tensor, name: str) -> str:
    """A glyph as an image in the page, black on white. image: (S, S) in [0, 1], ink 1."""
    file = io.BytesIO()
    Image.fromarray((255 * (1 - image)).byte().numpy()).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    size = f"width='{PICTURE_SIDE}' height='{PICTURE_SIDE}'"
    return f"<img src='data:image/png;base64,{data}' alt='Glyph {escape(name, quote=True)}' {size}>"


def count(number: int) -> str:
    """A number of weights, three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _about(party: Party) -> str:
    revision = f" @ {escape(party.revision[:7])}" if party.revision else ""
    licence = f"licence {escape(party.licence)}" if party.licence else "its card names no licence"
    who = escape(party.who.capitalize())
    return f"<li>{who}: {link(party.name)}{revision} · {count(party.parameters)} weights · {licence}</li>"


def _has_prompt(found: Deals | Glyphs) -> bool:
    return any(party.who == TEACHER and hasattr(party.model, "prompt_ids") for party in found.parties)


def _table(caption: str, heads: Sequence[str], rows: Sequence[tuple[Opinion, *tuple[str, ...]]]) -> str:
    """One row per model. heads: of the cells; the cells are HTML."""
    top = "".join(f"<th scope='col'>{escape(head)}</th>" for head in ("", *heads, "Time"))
    body = "".join(
        f"<tr><th scope='row'>{escape(opinion.party.who.capitalize())}</th>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + f"<td>{seconds(opinion.seconds)}</td></tr>"
        for opinion, *cells in rows
    )
    return (
        f"<div class='table-scroll'><table class='scores'><caption>{escape(caption)}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
