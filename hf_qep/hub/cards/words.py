"""Sentences of a card that depend on what was measured."""

from __future__ import annotations

import json
import shlex
from typing import Any

from hf_qep.hub.cards.escape import HUB, Markdown, block, bullets, code, hub_link, inline, is_repo_id, link, words
from hf_qep.hub.cards.facts import CardFacts
from hf_qep.hub.cards.manifest import Layer
from hf_qep.hub.cards.numbers import NOT_MEASURED, derived, estimate, percent, shown, size
from hf_qep.hub.cards.tables import weak_tasks

GOOD = 0.9
"""Recovery above chance from which on a card recommends a model for the tasks that were scored."""
CALIBRATED_BY_ITSELF = "self"

_CLASSES = (
    ("ForCausalLM", "AutoModelForCausalLM", "text-generation"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
    ("ForImageClassification", "AutoModelForImageClassification", "image-classification"),
)


def headline(facts: CardFacts) -> Markdown:
    """What is smaller and what is lost, in one line."""
    values, text = derived(facts), facts.text
    smaller = f" ({shown(values['size_ratio'])} times smaller)" if values["size_ratio"] else ""
    parts = [
        f"weight files {size(facts.float_bytes)} → {size(facts.file_bytes)}{smaller}",
        f"{shown(facts.record.bits.file)} bits per weight in the files, "
        f"{shown(facts.record.bits.linear)} in the quantised linears",
    ]
    if text is not None:
        pair = (text.baseline.perplexity, text.subject.perplexity)
        parts.append("perplexity " + " → ".join(shown(x.value) if x else "out of range" for x in pair))
        parts.append(f"KL {shown(text.kl.value)} nats per token")
    if facts.record.embeddings is not None:
        parts.append(f"1 - cosine of embeddings {shown(facts.record.embeddings.cosine_distance.value)}")
    recovery = (
        f"{percent(values['recovery'])} (mean of {values['tasks']} tasks)" if values["recovery"] else NOT_MEASURED
    )
    parts.append(f"recovery on tasks {recovery}")
    return Markdown("**" + " · ".join(inline(part) for part in parts) + "**")


def advice(facts: CardFacts) -> tuple[list[Markdown], list[Markdown]]:
    """(reasons for, reasons against using it), two each, the strongest first."""
    return _reasons_for(facts)[:2], _reasons_against(facts)[:2]


def _reasons_for(facts: CardFacts) -> list[Markdown]:
    values = derived(facts)
    found = []
    if (values["size_ratio"] or 0) > 1:
        found.append(
            words(
                "Disk or memory is short: the weight files take {new} instead of {old}.",
                new=size(facts.file_bytes),
                old=size(facts.float_bytes),
            )
        )
    if (values["recovery_above_chance"] or 0) >= GOOD:
        found.append(
            words(
                "You need what the scored tasks ask for: it keeps {kept} of the original's score above chance.",
                kept=percent(values["recovery_above_chance"]),
            )
        )
    if (values["decode_ratio"] or 0) > 1:
        found.append(
            words("You want speed: it writes {r} times as many tokens per second.", r=shown(values["decode_ratio"]))
        )
    found.append(
        Markdown("You study what so few bits per weight cost: every number here can be measured again, see below.")
    )
    return found


def _reasons_against(facts: CardFacts) -> list[Markdown]:
    values, found = derived(facts), []
    if weak := weak_tasks(facts):
        found.append(words("You need {tasks}: it may be guessing there, the original is not.", tasks=", ".join(weak)))
    if facts.text is not None:
        other = percent(values["disagreement"])
        ratio = shown(values["perplexity_ratio"])
        found.append(
            words(
                "You need the original's quality: the perplexity is {ratio} times as high, and at {other} of the "
                "places in held-out text another token is the most probable one.",
                ratio=ratio,
                other=other,
            )
        )
    elif facts.record.embeddings is not None:
        lost = estimate(facts.record.embeddings.cosine_distance)
        found.append(words("You need the original's embeddings: 1 - cosine to them is {lost}.", lost=lost))
    if 0 < (values["decode_ratio"] or 0) < 1:
        found.append(words("You want speed: it writes {r} times as many tokens/s.", r=shown(values["decode_ratio"])))
    if not facts.record.tasks:
        found.append(Markdown("You need knowledge, reasoning, mathematics or code: no task was scored."))
    if facts.decision.gate:
        found.append(words("You earn money with it: {reason}.", reason=facts.decision.reason))
    found.append(Markdown("You need something that was checked by others: the publisher alone measured it."))
    return found


def speed_note(facts: CardFacts) -> Markdown:
    """What was timed, as a boxed remark: a warning unless it is faster than the original."""
    values, cost = derived(facts), facts.record.cost
    speed = cost.subject.speed if cost else None
    if speed is None:
        return _box(
            "WARNING", Markdown("Speed was not measured. Packed weights save disk and memory, not always time.")
        )
    ratio = values["decode_ratio"] or values["prefill_ratio"]
    what = "new" if values["decode_ratio"] else "prompt"
    sentence = words(
        "{ratio} times as many {what} tokens per second as the original, measured on {where} (batch size 1, prompt of "
        "{prompt} tokens, {new} new ones, {dtype}). {advice}",
        where=machine(facts),
        ratio=shown(ratio),
        what=what,
        prompt=speed.prompt_tokens,
        new=speed.new_tokens,
        dtype=facts.record.subject.dtype,
        advice=(
            "Without fast kernels for packed weights, expect it to save disk and memory, not time."
            if (ratio or 0) < 1
            else "Other hardware may differ."
        ),
    )
    return _box("WARNING" if (ratio or 0) < 1 else "NOTE", sentence)


def machine(facts: CardFacts) -> str:
    """Where it was measured, in a few words."""
    where = facts.record.environment
    if where.accelerator:
        return where.accelerator
    return f"{where.processor or where.platform} with {where.threads} of {where.cores} cores"


def _box(kind: str, sentence: Markdown) -> Markdown:
    return Markdown(f"> [!{kind}]\n> {sentence}")


def auto_class(facts: CardFacts) -> tuple[str, str | None]:
    """(class to load it with, pipeline tag that goes with it) from the architecture's name."""
    name = str((facts.config.get("architectures") or [""])[0])
    if name.endswith("ForConditionalGeneration"):
        seen = "vision_config" in facts.config
        return ("AutoModelForImageTextToText", "image-text-to-text") if seen else ("AutoModelForSeq2SeqLM", None)
    return next(((auto, tag) for ending, auto, tag in _CLASSES if name.endswith(ending)), ("AutoModel", None))


def snippet(facts: CardFacts) -> Markdown:
    """Lines that load it, and the package they need."""
    auto, _ = auto_class(facts)
    name = json.dumps(facts.path, ensure_ascii=False)
    revision = ', revision="main"' if facts.options.repo_id else ""
    lines = [
        'import hf_qep  # registers the quantisation method "qep" with transformers',
        f"from transformers import {auto}, AutoTokenizer"
        if _has_tokenizer(facts)
        else f"from transformers import {auto}",
        "",
        f"model = {auto}.from_pretrained({name}{revision})",
    ]
    if _has_tokenizer(facts):
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({name}{revision})")
    return block("\n".join(lines), "python")


def _has_tokenizer(facts: CardFacts) -> bool:
    return any(file.path in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model") for file in facts.files)


def quantise_command(facts: CardFacts) -> Markdown:
    """The command that makes it again, from the recipe."""
    recipe, made = facts.made.recipe, facts.made
    arguments: list[Any] = ["hf-qep", "quantize", facts.base_name]
    if made.revision:
        arguments += ["--revision", made.revision]
    arguments += ["--out", facts.name]
    options = {key: recipe.get(key) for key in ("method", "bits", "group_size")}
    options["dataset"] = dataset(facts)
    options |= {key: recipe.get(key) for key in ("num_samples", "seq_len", "batch_size", "propagation", "damping")}
    options["seed"] = recipe.get("seed")
    options |= {key: recipe.get(key) or 0 for key in ("tune_epochs", "distill_epochs")}  # the default effort trains
    options |= {key: recipe.get(key) for key in ("tune_lookahead", "max_memory", "embedding_bits", "head_bits")}
    for key, value in options.items():
        if value is not None:
            arguments += [f"--{key.replace('_', '-')}", value]
    if recipe.get("distill_signs") is not None:
        arguments.append("--distill-signs" if recipe["distill_signs"] else "--no-distill-signs")
    if recipe.get("residual") is False:
        arguments.append("--no-residual")
    skipped = recipe.get("skip_modules")
    for name in skipped if isinstance(skipped, list) else []:
        arguments += ["--skip", name]
    return block(shlex.join(str(a) for a in arguments), "bash")


def dataset(facts: CardFacts) -> str | None:
    """Value of --dataset for the calibration sources; None for what the model wrote itself or was given in memory."""
    sources = facts.made.sources
    names = [s["name"] for s in sources]
    if not names or any(name == CALIBRATED_BY_ITSELF or " in memory" in name for name in names):
        return None
    if len(names) == 1:
        return names[0]
    return ",".join(f"{s['name']}*{s.get('weight', 1):g}" for s in sources)


def hub_datasets(facts: CardFacts) -> list[str]:
    """Ids of the Hub data sets among the calibration sources."""
    names = [s["name"].partition(":")[0] for s in facts.made.sources]
    return list(dict.fromkeys(name for name in names if "/" in name and is_repo_id(name)))


def calibration(facts: CardFacts) -> Markdown:
    """What the calibration text was."""
    known, items = facts.made.calibration, []
    for source in facts.made.sources:
        name, rows = source["name"], source.get("rows", "an unknown number of")
        shown_name = "text that the original wrote itself" if name == CALIBRATED_BY_ITSELF else code(name)
        hub = name.partition(":")[0]
        if hub in hub_datasets(facts):
            shown_name = hub_link(hub, kind="datasets")
        items.append(words("{name}, {rows} rows", name=shown_name, rows=rows))
    items.append(
        words(
            "in all {tokens} tokens in {rows} rows of {length}, drawn with seed {seed}",
            tokens=shown(known["tokens"]) if isinstance(known.get("tokens"), int) else "unknown",
            rows=known.get("num_samples", "unknown"),
            length=known.get("seq_len") or "their own length",
            seed=known.get("seed", "unknown"),
        )
    )
    items.append(words("fingerprint of the tokens {print}", print=code(str(known.get("fingerprint", "not recorded")))))
    return bullets(items)


def limitations(facts: CardFacts) -> list[Markdown]:
    """What a reader must not conclude."""
    record, found = facts.record, []
    if weak := weak_tasks(facts):
        found.append(words("In {tasks} it scores near chance; do not use it for that.", tasks=", ".join(weak)))
    if not record.tasks:
        found.append(Markdown("No task was scored: knowledge, reasoning, mathematics and code are not measured."))
    if record.text is not None:
        source = record.text.source or "a text that is not named"
        found.append(
            words(
                "Perplexity and KL are of one text, {source}, in windows of {window} tokens; other kinds of text, "
                "other languages and longer contexts are not measured.",
                source=code(source),
                window=record.text.window,
            )
        )
    found.append(
        Markdown(
            "Safety, bias and refusals were not measured again; quantisation can change them. What the original's card "
            "says about risks holds here too."
        )
    )
    found += [inline(note) for note in (*record.notes, *(f"{t.name}: {t.note}" for t in record.tasks if t.note))]
    found += [words("While it was made: {warning}", warning=warning) for warning in facts.made.warnings]
    return found


def licence_text(facts: CardFacts) -> Markdown:
    """Licence, where its text is, and what it means for copies."""
    base = facts.base
    if not facts.licence:
        return words(
            "The licence of the original is not known, so nothing permits to share these weights. See {base}.",
            base=_base_link(facts),
        )
    name = base.licence_name or facts.licence
    address = base.licence_link or ""
    if address and "://" not in address and facts.base_id and ".." not in address:
        address = f"{HUB}/{facts.base_id}/blob/{facts.revision or 'main'}/{address.lstrip('/')}"
    shown_name = link(name, address) if address else code(name)
    return words(
        "These weights are an adaptation of {base} and keep its licence, {licence}; {reason}. What was changed: the "
        "linear layers listed above were replaced by packed signs and scales, and {others}.",
        others="norms and biases trained with them" if facts.made.recipe.get("tune_epochs") else "biases adjusted",
        base=_base_link(facts),
        licence=shown_name,
        reason=facts.decision.reason,
    )


def _base_link(facts: CardFacts) -> Markdown:
    return hub_link(facts.base_id, facts.revision) if facts.base_id else code(facts.made.base_model)


def plot_text(facts: CardFacts) -> str:
    """Alternative text of the plot."""
    layers: tuple[Layer, ...] = facts.made.layers
    bits = [layer.bits for layer in layers]
    return (
        f"Stored bits per weight and relative error of the {len(layers)} quantised matrices in the order of the model; "
        f"bits from {shown(min(bits))} to {shown(max(bits))}"
    )
