"""A cloze task made of plain held-out text: the last word of a sentence, to be picked among words as frequent as it.

LAMBADA (Paperno et al. 2016) asks for the last word of a passage outright. A small model names few of them, so that
what quantisation costs would drown in noise; here the likeliest of a few options counts, which gives a chance level to
correct for. The other options end sentences of the same text too and are about as frequent there as the right one, so
neither grammar nor word frequency gives the answer away.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from hf_qep.errors import ConfigError

OPTIONS = 5
SENTENCES_BEFORE = 3
MOST_CHARACTERS = 400
"""Of context; small models see no further, and scoring takes time in proportion."""
FEWEST_WORDS = 4
"""Words of the sentence before the one that is asked for."""
NEIGHBOURS = 25
"""The other options are drawn among so many words a little more and so many a little less frequent."""

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))\s+")
_LAST_WORD = re.compile(r"(.*\S)\s+([a-z]{3,})[.!?]+[\"'”’]?", re.DOTALL)
"""Lower-case words of the Latin alphabet: names that appear only in this text would be no test of language."""


def cloze_rows(texts: Sequence[str], *, options: int = OPTIONS, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {query, choices, gold} for every sentence of `texts` whose last word can be asked for, in text order.

    texts: documents; an empty line ends a sentence, a single line break is a space. options: answers to choose from,
    the right one included; chance is 1 / options. seed: draws the other options and the place of the right one.
    Raises ConfigError for fewer than 2 options and for a text with too few different last words for that many.
    """
    if options < 2:
        raise ConfigError(f"a cloze item with {options} option(s) asks nothing; give at least 2")
    asked = [found for text in texts for found in _last_words(text)]
    counts = Counter(word for _, word in asked)
    if len(counts) < options:
        raise ConfigError(
            f"the text has {len(counts)} different words at the ends of its sentences, fewer than the {options} "
            "options of a cloze item; give a longer text"
        )
    by_frequency = sorted(counts)
    random.Random(seed).shuffle(by_frequency)  # words of one count in no order: neighbours in a dictionary share stems
    by_frequency.sort(key=lambda word: -counts[word])
    rank = {word: place for place, word in enumerate(by_frequency)}
    rows = []
    for number, (query, word) in enumerate(asked):
        generator = random.Random(f"{seed}:{number}")
        others = generator.sample(_neighbours(by_frequency, rank[word], options - 1), options - 1)
        gold = generator.randrange(options)
        rows.append({"query": query, "choices": [*others[:gold], word, *others[gold:]], "gold": gold})
    return rows


def _last_words(text: str) -> Iterator[tuple[str, str]]:
    """(context up to the last word, that word)."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    sentences = [sentence for part in paragraphs for sentence in _SENTENCE_END.split(part) if sentence]
    for index in range(SENTENCES_BEFORE, len(sentences)):
        found = _LAST_WORD.fullmatch(sentences[index])
        if found is None or len(found[1].split()) < FEWEST_WORDS:
            continue
        context = " ".join([*sentences[index - SENTENCES_BEFORE : index], found[1]])
        if len(context) > MOST_CHARACTERS:
            context = context[-MOST_CHARACTERS:].partition(" ")[2]  # from the next whole word on
        if context:
            yield context, found[2]


def _neighbours(by_frequency: Sequence[str], place: int, fewest: int) -> list[str]:
    """Words about as frequent as the one at `place`, without it."""
    reach = max(NEIGHBOURS, fewest)
    return [*by_frequency[max(0, place - reach) : place], *by_frequency[place + 1 : place + reach + 1]]
