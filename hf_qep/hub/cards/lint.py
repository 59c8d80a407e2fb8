"""What is wrong with a model card before anybody sees it: metadata, left-over placeholders, active content."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from typing import Any

from hf_qep.errors import CardError
from hf_qep.hub.base import read_metadata

RELATIONS = ("quantized", "finetune", "adapter", "merge")
"""What the Hub knows as `base_model_relation`; a distilled student is a finetune of its own first weights."""
TAG = "hf-qep"
"""Tag by which models of this package are found."""

_PLACEHOLDERS = {
    "More Information Needed": r"more information needed",
    "TODO": r"\b(?-i:TODO|FIXME|TBD)\b",
    "a place of a template": r"\{\{|\}\}|\{%|%\}",
    "lorem ipsum": r"lorem ipsum",
}
_ACTIVE = {
    "a script or an embedded page": r"<\s*(script|iframe|object|embed|style|link|meta|form|base|svg)\b",
    "an attribute that runs code": r"<[^>\n]{0,400}\son\w+\s*=",
}
_CODE_LINK = r"(\]\(\s*<?|\]:\s*<?|<|\b(href|src)\s*=\s*[\"']?)\s*(javascript|vbscript|data\s*:\s*text/html)\s*[:,;]"


def card_problems(text: str, command: str = "hf-qep card") -> list[str]:
    """What forbids the card `text` to be published, one sentence each; empty if nothing does.

    command: what writes such a card.

    The metadata must be YAML that huggingface_hub's own classes read, and say what the Hub needs to list the model.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return [f"it has no metadata between --- lines at its top; run: {command}"]
    body = text[block.end() :]
    try:
        data = read_metadata(text)
    except CardError as error:
        return [str(error)]
    if not data:
        return [f"its metadata is empty; run: {command}"]
    found = [*_parse_problems(text), *_metadata_problems(data), *_body_problems(body)]
    return [sentence.replace("run: hf-qep card", f"run: {command}") for sentence in found]


def _parse_problems(text: str) -> list[str]:
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except Exception as error:  # whatever a metadata class makes of values of other kinds
        reason = " ".join(str(error).split())[:200]
        return [f"huggingface_hub cannot read its metadata ({reason}); mend it, or run: hf-qep card"]
    return []


def _metadata_problems(data: dict[str, Any]) -> Iterator[str]:
    if data.get("library_name") != "transformers":
        yield f"`library_name` is {data.get('library_name')!r}; it must be transformers, else the Hub guesses"
    tags = data.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags) or TAG not in tags:
        yield f"`tags` is {tags!r}; it must be a list of names with {TAG} among them"
    yield from _base_problems(data)
    for key in ("license", "license_name", "license_link", "pipeline_tag", "quantized_by", "extra_gated_prompt"):
        if key in data and not (isinstance(data[key], str) and data[key].strip()):
            yield f"`{key}` is {data[key]!r}; it must be text, or be left out"
    if data.get("license") == "other" and not (data.get("license_name") or data.get("license_link")):
        yield "`license` is other without `license_name` or `license_link`; say which one it is"
    languages = data.get("language", [])
    names = languages if isinstance(languages, list) else [languages]
    if not all(isinstance(name, str) and name for name in names):
        yield f"`language` is {languages!r}; it must be a list of codes, `no` in quotes"
    if not isinstance(data.get("extra_gated_fields", {}), dict):
        yield "`extra_gated_fields` must be a list of `question: kind`"
    yield from _number_problems(data.get("model-index"))


def _base_problems(data: dict[str, Any]) -> Iterator[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    base, relation = data.get("base_model"), data.get("base_model_relation")
    for name in base if isinstance(base, list) else [base] if base is not None else []:
        try:
            validate_repo_id(name if isinstance(name, str) else repr(name))
        except HFValidationError:
            yield f"`base_model` names {name!r}, which is no id of the Hub; run: hf-qep card"
    if base is not None and relation not in RELATIONS:
        yield f"`base_model_relation` is {relation!r}; it must be one of {', '.join(RELATIONS)}"
    if base is None and relation is not None:
        yield f"`base_model_relation` is {relation!r} without a `base_model`; name the original"


def _number_problems(index: Any) -> Iterator[str]:
    """Values of the model-index that are no finite numbers."""
    entries = index if isinstance(index, list) else []
    results = [r for e in entries if isinstance(e, dict) for r in e.get("results") or [] if isinstance(r, dict)]
    metrics = [m for r in results for m in r.get("metrics") or [] if isinstance(m, dict)]
    for metric in metrics:
        value = metric.get("value")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            yield f"the model-index gives {metric.get('name') or metric.get('type')!r} the value {value!r}, no number"


def _body_problems(body: str) -> Iterator[str]:
    if re.match(r"\s*---[ \t]*(\r?\n|$)", body):
        yield "a second --- follows its metadata; remove it"
    prose = without_code(body)
    if not re.search(r"^#\s+\S", prose, re.MULTILINE):
        yield "it has no title; begin its text with a line `# NAME`"
    prose = re.sub(r"\\[!-/:-@\[-`{-~]", " ", prose)  # what stands behind a backslash is shown, not obeyed
    found = {what for what, pattern in _PLACEHOLDERS.items() if re.search(pattern, prose, re.IGNORECASE)}
    yield from (f"it still holds a placeholder ({what}); fill it or remove it" for what in sorted(found))
    active = {what for what, pattern in _ACTIVE.items() if re.search(pattern, prose, re.IGNORECASE)}
    if re.search(_CODE_LINK, html.unescape(prose), re.IGNORECASE):
        active.add("a link that runs code")
    yield from (f"it holds {what}; remove it" for what in sorted(active))


def without_code(body: str) -> str:
    """Markdown without its fenced blocks and code spans, in which everything is shown as it is written."""
    kept, fence = [], ""
    for line in body.splitlines():
        opened = re.match(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})", line)
        if fence:
            closed = re.fullmatch(r" {0,3}(`{3,}|~{3,})[ \t]*", line)
            if closed and closed[1][0] == fence[0] and len(closed[1]) >= len(fence):
                fence = ""
        elif opened:
            fence = opened[1]
        else:
            kept.append(line)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?[^`\n])\1(?!`)", " ", "\n".join(kept))
