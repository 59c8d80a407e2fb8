"""What a specialist and its teacher say of the same item, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import texts
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.distill.pictures import centred
from hf_qep.distill.reading import answer_tokens
from hf_qep.distill.records import RecordText
from hf_qep.distill.said import embedding_of

ARROW = " ->"
"""What a row ends with, before the answer."""
TEACHER, STUDENT = "teacher", "student"
NEAREST = 3
"""Glyphs that are shown."""


class RefusedItemError(ValueError):
    """A visitor asks about something that cannot be answered; the message says what to change."""


@dataclass(frozen=True)
class Party:
    """A teacher or a student that can be asked. licence: as its card names it. parameters: however few bits hold
    them."""

    who: str
    name: str
    revision: str | None
    licence: str | None
    model: Any
    processor: Any
    parameters: int


@dataclass(frozen=True)
class Opinion:
    """What one of the two says of an item. seconds: of its forward pass. chances: the best first, answers with their
    probability, or numbers of support glyphs with their cosine."""

    party: Party
    seconds: float
    chances: tuple[tuple[str | int, float], ...]


@dataclass(frozen=True)
class Deals:
    """Rows of a table, judged by which of two answers follows them.

    parties: the teacher, if it could be had, and the student. note: why there is no teacher. answers: the bad one and
    the good one. examples: rows with what happened, "" if that is not known.
    """

    parties: tuple[Party, ...]
    note: str
    question: str
    answers: tuple[str, str]
    records: RecordText
    examples: tuple[tuple[dict[str, Any], str], ...]

    def text(self, row: Mapping[str, Any]) -> str:
        """What both models read of a row. Raises ConfigError for a row that lacks a column."""
        return self.records.text(row) + ARROW

    def outcome(self, row: Mapping[str, Any]) -> str:
        """What happened to an example that reads like this row; "" if nobody knows."""
        text = self.text(row)
        return next((outcome for known, outcome in self.examples if self.text(known) == text), "")

    def ask(self, row: Mapping[str, Any]) -> list[Opinion]:
        """Probabilities of both answers. Raises RefusedItemError for a row that is too long."""
        text = self.text(row)
        with torch.inference_mode():
            return [self._opinion(party, text) for party in self.parties]

    def _opinion(self, party: Party, text: str) -> Opinion:
        ids = torch.tensor([party.processor(text)["input_ids"]])
        room = getattr(party.model.config, "max_position_embeddings", None)
        taken = len(getattr(party.model, "prompt_ids", ()))
        if room is not None and taken + ids.shape[1] > room:
            raise RefusedItemError(texts.LONG_DEAL.format(tokens=ids.shape[1], who=party.who, room=room - taken))
        known = list(answer_tokens(party.processor, self.answers))
        logits, seconds = _timed(lambda: party.model(input_ids=ids).logits[0, -1, known])
        pairs = zip(self.answers, logits.float().softmax(-1).tolist(), strict=True)
        ordered = sorted(pairs, key=lambda pair: -pair[1])
        return Opinion(party, seconds, tuple((answer.strip(), chance) for answer, chance in ordered))


@dataclass(frozen=True)
class Glyphs:
    """Glyphs of which a drawing is one.

    parties, note: as of `Deals`. names: of the glyphs. images: (n, S, S) float32 in [0, 1], ink 1. queries: drawings to
    try, (m, S, S). centres: whether the models know only drawings whose ink is in the middle.
    """

    parties: tuple[Party, ...]
    note: str
    names: tuple[str, ...]
    images: Tensor
    queries: Tensor
    centres: bool = False

    def ask(self, drawing: Tensor) -> list[Opinion]:
        """The nearest glyphs by cosine. drawing: (height, width) float32 in [0, 1], ink 1.

        Raises RefusedItemError for one without ink.
        """
        if not float(drawing.max()) > 0:
            raise RefusedItemError(texts.EMPTY_DRAWING)
        image = fitted(drawing, self.images.shape[-1])
        if self.centres:
            image = centred(image[None, None])[0, 0]
        with torch.inference_mode():
            return [self._opinion(party, image) for party in self.parties]

    def _opinion(self, party: Party, image: Tensor) -> Opinion:
        known = self._known[party.who]
        embedding, seconds = _timed(lambda: _embed(party.model, image[None]))
        cosines, order = (embedding @ known.T)[0].sort(descending=True, stable=True)
        pairs = list(zip(order.tolist(), cosines.tolist(), strict=True))
        return Opinion(party, seconds, tuple(pairs[:NEAREST]))

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        """Embeddings of the glyphs by each of the two, (n, width), of length 1."""
        return {party.who: _embed(party.model, self.images) for party in self.parties}


def fitted(drawing: Tensor, side: int) -> Tensor:
    """A drawing as a square, (side, side): the share of each pixel that is ink."""
    height, width = drawing.shape
    longest = max(height, width)
    left, top = (longest - width) // 2, (longest - height) // 2
    square = F.pad(drawing.float(), (left, longest - width - left, top, longest - height - top))
    return F.interpolate(square[None, None], size=(side, side), mode="area")[0, 0]


def _embed(model: Any, images: Tensor) -> Tensor:
    """Embeddings of images (n, S, S), (n, width) float32 of length 1; scaled first for a model of another size."""
    config = getattr(model.config, "vision_config", model.config)
    pixels, size = images[:, None], getattr(config, "image_size", None) or images.shape[-2:]
    wanted = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(pixels.shape[-2:]) != wanted:
        pixels = F.interpolate(pixels, size=wanted, mode="bilinear", antialias=True)
    channels = getattr(config, "num_channels", 3)
    found = embedding_of(model(pixel_values=pixels.expand(-1, channels, -1, -1)))
    return F.normalize(found.float(), dim=-1)


def _timed(step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    found = step()
    return found, time.perf_counter() - start
