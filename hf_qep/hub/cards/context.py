"""Names and values that the template of a quantised model puts in."""

from __future__ import annotations

from typing import Any

from hf_qep.hub.cards import tables as card_tables
from hf_qep.hub.cards import words as card_words
from hf_qep.hub.cards.escape import Markdown, block, code, hub_link, link, words
from hf_qep.hub.cards.facts import CardFacts
from hf_qep.hub.cards.numbers import derived, percent, shown, size


def card_context(facts: CardFacts) -> dict[str, Any]:
    """Everything the template may name. Values that are not `Markdown` are escaped when they are put in."""
    return {
        **_about(facts),
        **_sizes(facts),
        **_scores(facts),
        **_origin(facts),
        "arxiv": lambda number: link(f"arXiv:{number}", f"https://arxiv.org/abs/{number}"),
    }


def _about(facts: CardFacts) -> dict[str, Any]:
    """Names, advice and use."""
    owner = facts.base_id.partition("/")[0] if facts.base_id else None
    why, why_not = card_words.advice(facts)
    return {
        "title": facts.title,
        "one_bit": facts.is_one_bit,
        "linear_bits": shown(facts.record.bits.linear),
        "base": hub_link(facts.base_id, facts.revision) if facts.base_id else code(facts.made.base_model),
        "owner": owner if owner != facts.maker else None,
        "maker": facts.maker,
        "version": facts.made.versions.get("hf-qep"),
        "licence": facts.licence,
        "decision": facts.decision,
        "headline": card_words.headline(facts),
        "why": why,
        "why_not": why_not,
        "snippet": card_words.snippet(facts),
        "path": facts.path,
        "repo_id": facts.options.repo_id,
        "has_loader": facts.has_loader,
        "speed_note": card_words.speed_note(facts),
        "limitations": card_words.limitations(facts),
        "licence_text": card_words.licence_text(facts),
    }


def _sizes(facts: CardFacts) -> dict[str, Any]:
    """Hardware, layers and bits."""
    record, made, values = facts.record, facts.made, derived(facts)
    memory, plot = record.environment.memory_bytes, facts.plot
    return {
        "hardware": card_tables.hardware_table(facts),
        "machine": card_words.machine(facts),
        "environment": record.environment,
        "memory": size(memory) if memory else None,
        "dtype": record.subject.dtype,
        "on_accelerator": record.environment.accelerator is not None,
        "timed": record.cost is not None and record.cost.subject.speed is not None,
        "layer_count": values["layers"],
        "coverage": percent(values["coverage"]),
        "weights": shown(made.model_weights),
        "packed_part": size(int(values["packed_part"] or 0)),
        "float_part": size(int(values["float_part"] or 0)),
        "bits": card_tables.bits_table(facts),
        "layers": card_tables.layer_table(facts),
        "skipped": card_tables.float_table(facts) if made.skipped else None,
        "plot": words("![{alt}]({name})", alt=card_words.plot_text(facts), name=Markdown(plot)) if plot else None,
        "method": made.recipe.get("method"),
        "propagation": made.recipe.get("propagation"),
    }


def _scores(facts: CardFacts) -> dict[str, Any]:
    """Evaluation and samples."""
    record = facts.record
    return {
        "measured": record.text is not None or record.embeddings is not None or bool(record.tasks),
        "scores": card_tables.evaluation_table(facts),
        "text": record.text,
        "tasks": record.tasks,
        "created": record.created[:10],
        "eval_command": block(record.command, "bash") if record.command else None,
        "samples": _samples(facts),
        "sample_tokens": facts.samples.max_new_tokens if facts.samples else None,
    }


def _origin(facts: CardFacts) -> dict[str, Any]:
    """How it was made and of what."""
    seconds = derived(facts)["solve_seconds"]
    return {
        "quantise_command": card_words.quantise_command(facts),
        "in_memory": any(" in memory" in source["name"] for source in facts.made.sources),
        "calibration": card_words.calibration(facts),
        "seconds": shown(seconds) if seconds else None,
        "versions": card_tables.version_table(facts),
        "revision": facts.revision,
        "verified": facts.base_seen,
        "files": card_tables.file_table(facts),
    }


def _samples(facts: CardFacts) -> list[dict[str, Any]]:
    """Samples in their order; the one on which the models agree least is marked."""
    if facts.samples is None:
        return []
    return [
        {
            "prompt": block(item.prompt),
            "baseline": block(item.baseline) if item.baseline else "(nothing: it ended at once)",
            "subject": block(item.subject) if item.subject else "(nothing: it ended at once)",
            "agreement": percent(item.agreement),
            "note": item.note,
            "worst": index == facts.samples.worst and len(facts.samples.items) > 1,
        }
        for index, item in enumerate(facts.samples.items)
    ]
