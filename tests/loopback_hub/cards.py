"""What the Hub refuses in the metadata of a README."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

RELATIONS = ("adapter", "merge", "quantized", "finetune")
SDKS = ("gradio", "docker", "static", "streamlit")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
MAX_DESCRIPTION = 60
_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl "
    "apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other"
)
LICENCES = frozenset(_LICENCES.split())
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
Check = Callable[[Any], str | None]


def front_matter(text: str) -> dict[str, Any]:
    """Metadata of a README, empty if there is none. Raises ValueError if it is no YAML mapping."""
    match = _FRONT.match(text)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is not YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"the metadata must be a mapping, got {type(found).__name__}")
    return found


def validate(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) about the README of a repository of this type."""
    try:
        meta = front_matter(text)
    except ValueError as error:
        return [str(error)], []
    if not meta:
        if repo_type == "space":
            return ["Missing configuration in README"], []
        return [], ["empty or missing yaml metadata in repo card"]
    rules = {**_COMMON, **(_SPACE if repo_type == "space" else _MODEL)}
    errors = [f'"{name}" {said}' for name, check in rules.items() if name in meta and (said := check(meta[name]))]
    if repo_type == "space" and "sdk" not in meta:
        errors.append('"sdk" is required')
    if repo_type == "model":
        errors += _model_index(meta.get("model-index"))
        errors += _gate_fields(meta.get("extra_gated_fields"))
    return errors, []


def _string(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "must be a string"


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be a boolean"


def _strings(value: Any) -> str | None:
    good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return None if good else "must be an array of strings"


def _one_or_more(value: Any) -> str | None:
    return None if isinstance(value, str) or _strings(value) is None else "must be a string or an array of strings"


def _one_of(allowed: Any) -> Check:
    return lambda value: None if value in allowed else f"must be one of [{', '.join(sorted(allowed))}]"


def _repo_ids(value: Any) -> str | None:
    if said := _one_or_more(value):
        return said
    bad = [v for v in ([value] if isinstance(value, str) else value) if not re.fullmatch(r"[\w.-]+/[\w.-]+", v)]
    return f"must be ids of repositories, got {bad}" if bad else None


def _address(value: Any) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"https?://\S+|LICEN[CS]E(\.\w+)?", value)
    return None if good else "must be an address or LICENSE"


def _languages(value: Any) -> str | None:
    if said := _one_or_more(value):
        return said
    known = re.compile(r"[a-z]{2,3}|[a-z]+-.+|code|multilingual")
    bad = [v for v in ([value] if isinstance(value, str) else value) if not known.fullmatch(v)]
    return f"must be language codes (YAML reads no as a boolean), got {bad}" if bad else None


def _description(value: Any) -> str | None:
    if said := _string(value):
        return said
    return None if len(value) <= MAX_DESCRIPTION else f"length must be at most {MAX_DESCRIPTION}, got {len(value)}"


def _emoji(value: Any) -> str | None:
    good = isinstance(value, str) and 0 < len(value) <= 8 and not re.search(r"[A-Za-z0-9\s]", value)
    return None if good else "must be one emoji"


def _version(value: Any) -> str | None:
    # 6.10 without quotes is the number 6.1
    return None if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)*", value) else "must be a version in quotes"


_COMMON: dict[str, Check] = {
    "license": lambda v: _one_of(LICENCES)(v) if isinstance(v, str) else "must be a string",
    "license_name": _string,
    "license_link": _address,
    "tags": _strings,
}
_MODEL: dict[str, Check] = {
    "base_model": _repo_ids,
    "base_model_relation": _one_of(RELATIONS),
    "datasets": _repo_ids,
    "language": _languages,
    "library_name": _string,
    "pipeline_tag": _string,
    "quantized_by": _string,
    "new_version": _repo_ids,
    "extra_gated_heading": _string,
    "extra_gated_prompt": _string,
    "extra_gated_description": _string,
    "extra_gated_button_content": _string,
}
_SPACE: dict[str, Check] = {
    "title": _string,
    "emoji": _emoji,
    "colorFrom": _one_of(COLOURS),
    "colorTo": _one_of(COLOURS),
    "sdk": _one_of(SDKS),
    "sdk_version": _version,
    "python_version": _version,
    "app_file": _string,
    "app_port": lambda v: None if isinstance(v, int) and not isinstance(v, bool) else "must be a number",
    "pinned": _boolean,
    "hf_oauth": _boolean,
    "disable_embedding": _boolean,
    "short_description": _description,
    "models": _repo_ids,
    "datasets": _repo_ids,
    "preload_from_hub": _strings,
    "hf_oauth_scopes": _strings,
    "suggested_hardware": _string,
    "startup_duration_timeout": _string,
}


def _gate_fields(fields: Any) -> Iterator[str]:
    """Errors of the form that a gated repository shows."""
    if fields is None:
        return
    if not isinstance(fields, dict):
        yield '"extra_gated_fields" must be an object'
        return
    for name, kind in fields.items():
        kind = kind.get("type") if isinstance(kind, dict) else kind
        if kind not in ("text", "checkbox", "date_picker", "country", "ip_location", "select"):
            yield f'"extra_gated_fields.{name}" is of an unknown type: {kind!r}'


def _model_index(index: Any) -> Iterator[str]:
    """Errors of the evaluation results: model-index is a list of models, each with results, each with metrics."""
    if index is None:
        return
    if not isinstance(index, list) or not index:
        yield '"model-index" must be an array'
        return
    for m, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            yield f'"model-index[{m}].name" is required'
            continue
        results = model.get("results")
        if not isinstance(results, list):
            yield f'"model-index[{m}].results" must be an array'
            continue
        for r, result in enumerate(results):
            yield from _result(f"model-index[{m}].results[{r}]", result)


def _result(where: str, result: Any) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f'"{where}" must be an object'
        return
    task, dataset, metrics = (result.get(name) for name in ("task", "dataset", "metrics"))
    if not isinstance(task, dict) or not isinstance(task.get("type"), str):
        yield f'"{where}.task.type" is required'
    if not isinstance(dataset, dict) or not {"name", "type"} <= dataset.keys():
        yield f'"{where}.dataset" needs "name" and "type"'
    if not isinstance(metrics, list) or not metrics:
        yield f'"{where}.metrics" must be an array'
        return
    for n, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or metric.get("value") is None:
            yield f'"{where}.metrics[{n}]" needs "type" and "value"'
