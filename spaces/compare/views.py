"""Lanes as HTML. The only place where text of models and visitors becomes HTML: everything passes `escape`.

The page puts these strings into `gr.HTML` with its default template `${value}`, which inserts them as they are and
evaluates nothing. (A template with `{{value}}` would be evaluated a second time.)
"""

from __future__ import annotations

import re
from html import escape

import texts
from lanes import Lane, Lanes, equal_tokens
from models import Loaded, Models, human_bytes

NOT_MEASURED = "–"
_KANA = re.compile(r"[\u3040-\u30ff]")


def header(models: Models) -> str:
    """Title, what is compared, and why something is missing."""
    parts = [f"<h1>{escape(texts.TITLE)}</h1>", f"<p class='intro'>{escape(texts.INTRO)}</p>"]
    if models.problem:
        parts.append(problem(models.problem))
    return "".join(parts)


def problem(sentence: str) -> str:
    """A message that must not be missed."""
    return f"<p class='problem'><strong>Problem:</strong> {escape(sentence)}</p>" if sentence else ""


def notice(sentence: str) -> str:
    """The status line under the buttons."""
    return f"<p>{escape(sentence)}</p>"


def lane(state: Lane, models: Models) -> str:
    """One lane: heading with status, text, numbers, notes."""
    name = texts.NAMES[state.lane]
    loaded = models.original if state.lane == "original" else models.one_bit
    language = " lang='ja'" if _KANA.search(state.text) else ""
    text = escape(state.text) if state.text else f"<span class='placeholder'>{escape(_placeholder(state))}</span>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in state.notes)
    return (
        f"<div class='lane-body'><div class='lane-head'><h2>{escape(name)}</h2>{_badge(state)}</div>"
        f"<p class='lane-model'>{_model_line(state, loaded, models)}</p>"
        f"<div class='answer' tabindex='0' role='region' aria-label='Text of the lane {escape(name)}'{language}>"
        f"{text}</div>"
        f"{f'<ul class=notes>{notes}</ul>' if notes else ''}"
        f"{_metrics(state)}</div>"
    )


def _badge(state: Lane) -> str:
    return f"<span class='badge badge-{escape(state.status)}'>{escape(texts.STATUS[state.status])}</span>"


def _model_line(state: Lane, loaded: Loaded | None, models: Models) -> str:
    if loaded is not None:
        revision = f" @ {escape(loaded.revision[:7])}" if loaded.revision else ""
        return f"{link(loaded.name)}{revision} · {escape(loaded.dtype)}"
    if state.lane == "original" and models.samples is not None and models.mode == "recorded":
        return f"{link(models.samples.baseline.name)} · not loaded"
    return "not loaded"


def link(name: str) -> str:
    """A Hub id with its page; any other name as text."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not name.startswith((".", "hf_qep/")):
        safe = escape(name)
        return f"<a href='https://huggingface.co/{safe}' rel='noopener noreferrer' target='_blank'>{safe}</a>"
    return escape(name)


def _placeholder(state: Lane) -> str:
    if state.status in ("waiting", "writing"):
        return "…"
    if state.status == "done":
        return "(It wrote nothing.)"
    return "The text will appear here." if state.status == "idle" else "No text."


def _metrics(state: Lane) -> str:
    shown = {
        "Tokens": None if state.tokens is None else str(state.tokens),
        "Tokens/s": state.tokens_per_second and _rate(state.tokens_per_second),
        "First token": state.first_token and seconds(state.first_token),
        "Weights": state.weight_bytes and human_bytes(state.weight_bytes),
        "Peak memory": state.peak_bytes and human_bytes(state.peak_bytes),
    }
    rows = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value or NOT_MEASURED)}</dd></div>" for name, value in shown.items()
    )
    return f"<dl class='metrics'>{rows}</dl>"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Milliseconds below one second."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.3g} s"


def delta(lanes: Lanes) -> str:
    """What differs, in words; only what was measured in both lanes just now."""
    return f"<p>{escape(' '.join(differences(lanes)))}</p>"


def differences(lanes: Lanes) -> list[str]:
    """Sentences of the delta line."""
    original, one_bit = lanes
    said = []
    if original.weight_bytes and one_bit.weight_bytes:
        share = one_bit.weight_bytes / original.weight_bytes
        said.append(f"The weights of the 1-bit model take {share:.0%} of the memory of the original's.")
    if original.tokens_per_second and one_bit.tokens_per_second:
        said.append(_speed(one_bit.tokens_per_second / original.tokens_per_second))
    if original.first_token and one_bit.first_token:
        said.append(f"First token after {seconds(one_bit.first_token)} instead of {seconds(original.first_token)}.")
    equal = equal_tokens(lanes)
    if equal is not None:
        longest = max(len(original.ids), len(one_bit.ids))
        same = equal == longest
        said.append("Both wrote the same." if same else f"The first {equal} of {longest} tokens are the same.")
    return said


def _speed(ratio: float) -> str:
    if 0.95 <= ratio <= 1.05:
        return "Both write equally fast."
    return f"The 1-bit model writes {ratio:.2g} times as fast."


def footer(models: Models) -> str:
    """What every visitor must know."""
    device = "an accelerator" if models.device.type != "cpu" else "the processor (no accelerator)"
    return f"<p>{licences(models)}</p><p>The models run on {device}. {escape(texts.FOOTER)}</p>"


def licences(models: Models) -> str:
    """Under which licence each model is, as its card says."""
    said = []
    for loaded in (models.original, models.one_bit):
        if loaded is not None:
            sentence = texts.LICENCE if loaded.licence else texts.NO_LICENCE
            named, licence = link(loaded.name), f"<code>{escape(loaded.licence or '')}</code>"
            said.append(escape(sentence).format(name=named, licence=licence))
    return " ".join(said)
