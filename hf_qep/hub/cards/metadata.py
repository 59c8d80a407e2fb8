"""Front matter of a card, through huggingface_hub's own classes, and results for registered benchmarks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.tasks import TaskResult
from hf_qep.hub.base import BaseFacts
from hf_qep.hub.cards.escape import HUB, is_repo_id
from hf_qep.hub.cards.facts import CardFacts
from hf_qep.hub.cards.lint import TAG
from hf_qep.hub.cards.words import auto_class, hub_datasets
from hf_qep.hub.licences import LicenceDecision
from hf_qep.hub.preflight import RECORD

_TAGS = ("qep", "quantized", "compression", "safetensors")
_NOTES = "notes: hf-qep "
"""How the notes of a result file of ours begin."""
_ACCURACY = {"acc": "accuracy", "acc_norm": "accuracy", "exact_match": "exact_match"}


@dataclass(frozen=True)
class Benchmark:
    """A data set that the Hub registers as a benchmark. items: of the whole test; fewer are no result of it."""

    dataset: str
    task_id: str
    items: int


BENCHMARKS = {
    r"gsm8k": Benchmark("openai/gsm8k", "gsm8k", 1319),
    r"mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12032),
    r"gpqa_diamond(_\w+)?": Benchmark("Idavidrein/gpqa", "diamond", 198),
    r"hle": Benchmark("cais/hle", "hle", 2500),
}
"""Name of the lm_eval task -> benchmark. Tasks of local files are never reported: nobody knows what is in them."""


def metadata(facts: CardFacts) -> Any:
    """The `ModelCardData` of a card; values of the original itself are never in its model-index."""
    from huggingface_hub import ModelCardData

    base, repo_id = facts.base, facts.options.repo_id
    results = list(eval_results(facts))
    extra: dict[str, Any] = {"quantized_by": facts.maker} if facts.maker else {}
    if facts.base_id:
        extra["base_model_relation"] = "quantized"
    link = base.licence_link
    if facts.licence == "other" and not (base.licence_name or link) and facts.base_id:
        link = f"{HUB}/{facts.base_id}"
    return ModelCardData(
        base_model=facts.base_id,
        library_name="transformers",
        pipeline_tag=base.pipeline_tag or auto_class(facts)[1],
        language=list(base.languages) or None,
        license=facts.licence,
        license_name=base.licence_name,
        license_link=link,
        tags=tags(facts),
        datasets=hub_datasets(facts) or None,
        eval_results=results or None,
        model_name=(repo_id or facts.name) if results else None,
        **extra,
        **licence_gate(facts.base, facts.decision),
    )


def licence_gate(base: BaseFacts, decision: LicenceDecision) -> dict[str, Any]:
    """Questions to readers: those of the original; if it asks none and the licence is NonCommercial, that alone."""
    if base.gate_form or not decision.gate:
        return base.gate_form
    return {
        "extra_gated_prompt": f"These weights are for NonCommercial use only, under the licence {decision.licence}.",
        "extra_gated_fields": {"I agree to use this model for NonCommercial purposes ONLY": "checkbox"},
    }


def tags(facts: CardFacts) -> list[str]:
    """Names by which the Hub finds it."""
    method = facts.made.recipe.get("method")
    found = [TAG, *_TAGS]
    if isinstance(method, str) and re.fullmatch(r"[a-z]\w*", method, re.ASCII):
        found.append(method)
    if facts.is_one_bit:
        found.append("1-bit")
    return list(dict.fromkeys(found))


def eval_results(facts: CardFacts) -> Iterator[Any]:
    """Entries of the model-index: this model's own values, with the record as their source."""
    from huggingface_hub import EvalResult

    repo_id = facts.options.repo_id
    source = (
        {"source_name": "hf-qep evaluation record", "source_url": f"{HUB}/{repo_id}/blob/main/{RECORD}"}
        if repo_id
        else {}
    )

    def entry(dataset: tuple[str, dict[str, str]], kind: str, value: Estimate, name: str) -> Any:
        label, where = dataset
        task = facts.base.pipeline_tag or auto_class(facts)[1] or "text-generation"
        return EvalResult(
            task_type=task,
            dataset_name=label,
            metric_type=kind,
            metric_value=value.value,
            metric_name=name,
            **{"dataset_type": where["type"], **{f"dataset_{k}": v for k, v in where.items() if k != "type"}},
            **source,
        )

    text = facts.text
    if text is not None:
        place = _text_dataset(text.source)
        how = f"{text.window}-token windows, stride {text.stride}"
        if text.subject.perplexity is not None:
            yield entry(place, "perplexity", text.subject.perplexity, f"perplexity per token, {how}")
        if text.subject.bits_per_byte is not None:
            yield entry(place, "bits_per_byte", text.subject.bits_per_byte, f"bits per byte, {how}")
    for task in facts.record.tasks:
        for metric in task.metrics:
            kind = _ACCURACY.get(metric.name, metric.name)
            how = f"{metric.name}, {task.num_fewshot}-shot, {metric.subject.n} items"
            yield entry((task.name, {"type": re.sub(r"[^\w./-]", "_", task.name)}), kind, metric.subject, how)


def _text_dataset(source: str | None) -> tuple[str, dict[str, str]]:
    """(name, dataset fields) of the evaluation text: a Hub data set as id:config:split:column, or a file."""
    name, *parts = (source or "text without a name").split(":")
    if "/" in name and is_repo_id(name):
        where = dict(zip(("config", "split"), (part for part in parts[:2]), strict=False))
        return name, {"type": name, **{key: value for key, value in where.items() if value}}
    return source or name, {"type": "text"}


def result_files(facts: CardFacts) -> dict[str, str]:
    """`.eval_results/NAME.yaml` -> content, for each registered benchmark that was run in full through lm_eval."""
    from huggingface_hub.utils import yaml_dump

    found = {}
    for task in facts.record.tasks:
        benchmark = _benchmark(task)
        if benchmark is None:
            continue
        metric = next((m for m in task.metrics if m.name in ("exact_match", "acc")), task.metrics[0])
        versions = facts.record.environment.versions
        entry: dict[str, Any] = {
            "dataset": {"id": benchmark.dataset, "task_id": benchmark.task_id},
            "value": round(100 * metric.subject.value, 4),
            "date": facts.record.created[:10],
        }
        if facts.options.repo_id:
            address = f"{HUB}/{facts.options.repo_id}/blob/main/{RECORD}"
            entry["source"] = {"url": address, "name": "hf-qep evaluation record"}
        notes = [
            f"{_NOTES.removeprefix('notes: ')}{versions.get('hf_qep')}",
            f"lm-eval {versions.get('lm_eval')}",
            task.prompt,
            metric.name,
        ]
        notes += [f"{task.num_fewshot}-shot", f"{facts.record.subject.dtype} compute"]
        entry["notes"] = ", ".join(notes)
        found[_result_name(benchmark)] = yaml_dump([entry], sort_keys=False)
    return found


def stale_results(folder: Path, current: Collection[str]) -> list[str]:
    """Names of result files that an earlier card wrote and that are none of the `current` ones."""
    names = [_result_name(benchmark) for benchmark in BENCHMARKS.values()]
    return [
        name
        for name in names
        if name not in current
        and (folder / name).is_file()
        and _NOTES in (folder / name).read_text(encoding="utf-8", errors="replace")
    ]


def _result_name(benchmark: Benchmark) -> str:
    return f".eval_results/{benchmark.dataset.partition('/')[2].lower()}.yaml"


def _benchmark(task: TaskResult) -> Benchmark | None:
    """The registered benchmark that a result is of, None for local files, other tasks and parts of a test."""
    if not task.prompt.startswith("lm_eval:") or not task.metrics:
        return None
    known = next((b for pattern, b in BENCHMARKS.items() if re.fullmatch(pattern, task.name)), None)
    return known if known and task.items >= known.items else None
