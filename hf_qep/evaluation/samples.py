"""Recorded samples `hf_qep_samples.json`: what both models write after the same prompts, greedily and unedited.

    schema            "hf_qep_samples"
    schema_version    1; a reader refuses a higher one
    created           UTC date and time, ISO 8601
    environment       versions, platform, processor, cores, memory, accelerator, threads
    subject           the quantised model: name, sha256 of each weight file
    baseline          the float model: name, revision
    max_new_tokens    limit of each continuation
    do_sample         false: the most probable token is taken each time
    items             prompt, continuation of both models, agreement, note

`agreement` is the share of positions at which both continuations have the same token; once they part, they seldom meet
again. Samples show how a model fails, scores how often: one is no substitute for the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import torch
from torch import nn

from hf_qep.evaluation import schema
from hf_qep.evaluation.environment import Environment
from hf_qep.evaluation.greedy import continue_greedily
from hf_qep.evaluation.json_file import JsonFile
from hf_qep.evaluation.record import EvalRecord
from hf_qep.evaluation.speed import generates_text
from hf_qep.progress import SILENT, Progress

FILE_NAME = "hf_qep_samples.json"
SCHEMA_VERSION = 1
MAX_NEW_TOKENS = 48
OPENING_TOKENS = 24
"""Tokens of held-out text that make a prompt."""
HEADING = 40
"""A shorter first line that ends without punctuation is taken for a heading, which is no opening."""
_STARTS = re.compile(r"(?:\A|\n\s*\n|[.!?。！？][\"'”’)]*\s+)(?=\S)")
"""Where a text, a paragraph or a sentence begins."""
CHAT_NOTE = "asked through the chat template"
CHAT_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "A train leaves at 14:10 and arrives at 16:45. How long does it travel?",
    "Write a Python function that reverses a list.",
    "Write a short letter to a neighbour whose dog barks at night.",
    "日本の首都はどこですか。一文で答えてください。",
    "Name three differences between a frog and a toad.",
    "Translate into French: The ferry leaves in ten minutes.",
    "What should I do if I cannot sleep?",
)
"""Questions for models with a chat template; the first ones are the ones that are asked."""


@dataclass(frozen=True)
class SampleItem:
    """One prompt and what both models made of it."""

    prompt: Annotated[str, "text, or the user's message if the note says so"]
    baseline: Annotated[str, "continuation of the float model, unedited"]
    subject: Annotated[str, "continuation of the quantised model, unedited"]
    agreement: Annotated[float, "share of positions at which both continuations have the same token, 0 to 1"]
    note: Annotated[str | None, "what must be said beside it"] = None

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"an agreement lies between 0 and 1, not at {self.agreement}")


@dataclass(frozen=True)
class SampleSubject:
    """The quantised model."""

    name: Annotated[str, "Hub id, or the name of its folder without the path"]
    sha256: Annotated[dict[str, str], "weight file -> hex digest"]


@dataclass(frozen=True)
class SampleBaseline:
    """The float model."""

    name: Annotated[str, "Hub id, or the name of its folder without the path"]
    revision: Annotated[str | None, "commit on the Hub; null for a local folder"] = None


@dataclass(frozen=True)
class Samples(JsonFile):
    """Continuations of a quantised model beside those of its original."""

    file_name = FILE_NAME
    what = "file of recorded samples"

    subject: Annotated[SampleSubject, "the quantised model"]
    baseline: Annotated[SampleBaseline, "the float model"]
    environment: Annotated[Environment, "software and hardware"]
    max_new_tokens: Annotated[int, "limit of each continuation"]
    items: Annotated[tuple[SampleItem, ...], "the samples, in the order of the prompts"]
    do_sample: Annotated[Literal[False], "greedy: the most probable token each time"] = False
    created: Annotated[str, "UTC, ISO 8601"] = field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds")
    )
    schema: Annotated[Literal["hf_qep_samples"], "kind of file"] = "hf_qep_samples"
    schema_version: Annotated[int, "raised with every change of the fields"] = SCHEMA_VERSION

    @property
    def worst(self) -> int | None:
        """Index of the sample on which the models agree least, None without samples."""
        return min(range(len(self.items)), key=lambda i: self.items[i].agreement, default=None)


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `hf_qep_samples.json`."""
    return schema.json_schema(Samples)


def record_samples(
    float_model: nn.Module,
    quantized_model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    record: EvalRecord,
    *,
    count: int = 4,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = SILENT,
) -> Samples | None:
    """Let both models continue `count` prompts; None for models that are no causal language models, or for count 0.

    texts: held-out documents, of which openings are the prompts; with a chat template questions are asked instead.
    record: says which models these are.
    """
    tokenizer = getattr(tokenizer, "tokenizer", None) or tokenizer
    if count < 1 or tokenizer is None or not generates_text(float_model):
        return None
    prompts = choose_prompts(tokenizer, texts, count)
    items = []
    with progress.bar("samples", len(prompts), "prompt") as bar:
        for prompt, note in prompts:
            ids = _encode(tokenizer, prompt, chat=note is not None)
            theirs, ours = (
                continue_greedily(m, ids, tokenizer, max_new_tokens) for m in (float_model, quantized_model)
            )
            said = [tokenizer.decode(out, skip_special_tokens=True) for out in (theirs, ours)]
            items.append(SampleItem(prompt, *said, agreement(theirs, ours), note))
            bar.advance()
    return Samples(
        subject=SampleSubject(record.subject.name, record.subject.sha256),
        baseline=SampleBaseline(record.baseline.name, record.baseline.revision),
        environment=record.environment,
        max_new_tokens=max_new_tokens,
        items=tuple(items),
    )


def choose_prompts(tokenizer: Any, texts: Sequence[str], count: int) -> list[tuple[str, str | None]]:
    """(prompt, note) of each sample: questions if there is a chat template, else openings from evenly spaced places."""
    asked = [(question, CHAT_NOTE) for question in CHAT_PROMPTS] if getattr(tokenizer, "chat_template", None) else []
    prompts: list[tuple[str, str | None]] = asked[:count]
    if len(prompts) < count:
        prompts += [(opening, None) for opening in openings(tokenizer, texts, count - len(prompts))]
    return prompts


def openings(tokenizer: Any, texts: Sequence[str], count: int, tokens: int = OPENING_TOKENS) -> list[str]:
    """Beginnings of sentences at `count` evenly spaced places, about `tokens` tokens each, cut between words.

    There are fewer if the texts are too short for that many.
    """
    text = "\n\n".join(texts)
    starts = [match.end() for match in _STARTS.finditer(text)]
    found: dict[str, None] = {}
    for place in range(count):
        after = (start for start in starts if start >= place * len(text) // count)
        parts = (" ".join(_paragraph(text[start : start + 40 * tokens]).split()) for start in after)
        fitting = (opening for part in parts if (opening := _opening(tokenizer, part, tokens)) and opening not in found)
        found |= dict.fromkeys(x for x in [next(fitting, None)] if x)
    return list(found)


def agreement(theirs: Sequence[int], ours: Sequence[int]) -> float:
    """Share of positions with equal tokens; 1 for two empty continuations."""
    longest = max(len(theirs), len(ours))
    return sum(a == b for a, b in zip(theirs, ours, strict=False)) / longest if longest else 1.0


def _paragraph(text: str) -> str:
    """The text up to its first empty line; nothing if it begins with a heading."""
    first = text.partition("\n")[0].rstrip()
    heading = len(first) < len(text) and len(first) < HEADING and not re.search(r"[.!?,;:。！？、」”’\"']$", first)
    return "" if heading else re.split(r"\n\s*\n", text, maxsplit=1)[0]


def _opening(tokenizer: Any, paragraph: str, tokens: int) -> str | None:
    """The first words of a paragraph that are no more than `tokens` tokens; None if it is not longer than that."""
    ids = tokenizer(paragraph, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= tokens:
        return None
    begun = tokenizer.decode(ids[:tokens], skip_special_tokens=True)
    kept = next((n for n in range(len(begun)) if begun[n] != paragraph[n : n + 1]), len(begun))
    head, space, _ = paragraph[:kept].rpartition(" ")
    return (head if space else paragraph[:kept]).strip() or None


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> torch.Tensor:
    """(1, tokens) ids with the special tokens that the model was trained with."""
    if not chat:
        return torch.tensor([tokenizer(prompt)["input_ids"]])
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return torch.tensor([ids["input_ids"]])
