"""From what a visitor typed to token ids: limits, chat template or plain text, trimming."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import texts
from settings import Settings

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**31 - 1


class RefusedError(ValueError):
    """The request cannot be run; the message is for the visitor."""


@dataclass(frozen=True)
class Request:
    """One comparison, inside all limits. temperature 0: the most probable token each time."""

    prompt: str
    system: str
    temperature: float
    seed: int
    max_new_tokens: int
    warnings: tuple[str, ...] = ()


def make_request(
    settings: Settings, prompt: object, system: object, temperature: object, seed: object, max_new_tokens: object
) -> Request:
    """A request from untrusted values. Raises RefusedError for an empty prompt or values out of range."""
    warnings = []
    prompt, system = _text("prompt", prompt), _text("system prompt", system)
    if not prompt.strip():
        raise RefusedError(texts.EMPTY_PROMPT)
    if len(prompt) > settings.max_chars or len(system) > settings.max_chars:
        warnings.append(texts.TRIMMED_CHARS.format(limit=settings.max_chars))
        prompt, system = prompt[-settings.max_chars :], system[-settings.max_chars :]
    return Request(
        prompt,
        system,
        _number("temperature", temperature, 0.0, MAX_TEMPERATURE),
        int(_number("seed", seed, 0, MAX_SEED)),
        int(_number("number of new tokens", max_new_tokens, 1, settings.max_new_tokens)),
        tuple(warnings),
    )


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RefusedError(f"The {name} must be text.")
    # Half of a surrogate pair cannot be encoded, and no tokenizer takes it.
    return value.encode("utf-8", "replace").decode("utf-8")


def _number(name: str, value: object, low: float, high: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not low <= value <= high:
        raise RefusedError(f"The {name} is {value!r:.40}; it must be a number from {low:g} to {high:g}.")
    return float(value)


@dataclass(frozen=True)
class Encoded:
    """ids: tensors of shape (1, tokens). warning: what was cut, None if nothing."""

    inputs: dict[str, Any]
    warning: str | None

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return int(self.inputs["input_ids"].shape[1])


def encode(tokenizer: Any, request: Request, limit: int) -> Encoded:
    """Token ids of a request. The visitor's text loses its beginning if it has more than `limit` tokens, the rest of a
    chat template stays whole."""
    prompt, warning = request.prompt, None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) > limit:
        prompt = tokenizer.decode(ids[-limit:], skip_special_tokens=False)
        warning = texts.TRIMMED_TOKENS.format(kept=limit, all=len(ids))
    encoded = _template(tokenizer, prompt, request.system)
    # Some tokenizers also give token types, which `generate` of most models refuses.
    return Encoded({name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}, warning)


def _template(tokenizer: Any, prompt: str, system: str) -> Any:
    if not has_chat_template(tokenizer):
        return tokenizer(f"{system.strip()}\n\n{prompt}" if system.strip() else prompt, return_tensors="pt")
    user = {"role": "user", "content": prompt}
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    if not system.strip():
        return tokenizer.apply_chat_template([user], **options)
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([{"role": "system", "content": system}, user], **options)
    except TemplateError:  # some templates know no system role
        user["content"] = f"{system.strip()}\n\n{prompt}"
        return tokenizer.apply_chat_template([user], **options)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model was trained on conversations, as far as its tokenizer says."""
    return bool(getattr(tokenizer, "chat_template", None))
