"""Tables of a card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from hf_qep.evaluation.tasks import TaskMetric, TaskResult
from hf_qep.hub.cards.escape import Markdown, code, table, words
from hf_qep.hub.cards.facts import CardFacts
from hf_qep.hub.cards.manifest import Layer, family_of
from hf_qep.hub.cards.numbers import (
    NOT_MEASURED,
    derived,
    estimate,
    interval,
    main_metric,
    near_chance,
    percent,
    shown,
    size,
)

MOST_SHAPES = 3
"""Shapes of one family that are listed."""
_UNITS = {"acc": "accuracy", "acc_norm": "accuracy, length-normalised", "exact_match": "exact match"}
_UNITS |= {"tool_name": "right tool", "parsed": "readable calls"}


def evaluation_table(facts: CardFacts) -> Markdown:
    """`measurement | n | original | baselines | this model | recovery | recovery above chance`."""
    with_tasks = bool(facts.record.tasks)
    columns = ["measurement", "n", "original", *(b.name for b in facts.baselines), "this model", "recovery"]
    if with_tasks:
        columns.append("recovery above chance")
    rows = [*_text_rows(facts), *_embedding_rows(facts)]
    rows += [_task_row(facts, task, metric) for task in facts.record.tasks for metric in task.metrics]
    values = derived(facts)
    if (values["tasks"] or 0) > 1:
        means = [percent(values["recovery"]), percent(values["recovery_above_chance"])]
        rows.append([words("**mean of {n} tasks**", n=values["tasks"]), "", *[""] * (2 + len(facts.baselines)), *means])
    rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    return table(columns, rows, numbers=range(1, len(columns)))


def _text_rows(facts: CardFacts) -> list[list[str]]:
    text, ratio = facts.text, derived(facts)["perplexity_ratio"]
    if text is None:
        return []
    n = shown(text.kl.n)

    def others(key: str) -> list[str]:
        return [estimate(b.text.get(key), factor=100 if key == "top1_agreement" else 1) for b in facts.baselines]

    theirs, ours = text.baseline, text.subject
    more = f"{shown(ratio)} times the original's" if ratio else ""
    return [
        ["perplexity (lower is better)", n, estimate(theirs.perplexity), *others("perplexity"),
         estimate(ours.perplexity), more],
        ["bits per byte (lower is better)", n, estimate(theirs.bits_per_byte), *others("bits_per_byte"),
         estimate(ours.bits_per_byte)],
        ["KL to the original, nats per token (0: identical)", n, "", *others("kl"), estimate(text.kl)],
        ["same most probable token as the original, %", n, "", *others("top1_agreement"),
         estimate(text.top1_agreement, factor=100)],
    ]  # fmt: skip


def _embedding_rows(facts: CardFacts) -> list[list[str]]:
    score = facts.record.embeddings
    if score is None:
        return []
    n, blank = shown(score.sentences), [NOT_MEASURED for _ in facts.baselines]
    rows = [["1 - cosine to the original's embedding (0: identical)", n, "", *blank, estimate(score.cosine_distance)]]
    if score.neighbour_overlap is not None:
        label = f"nearest neighbours kept, of {score.neighbours}, %"
        rows.append([label, n, "", *blank, estimate(score.neighbour_overlap, factor=100)])
    return rows


def _task_row(facts: CardFacts, task: TaskResult, metric: TaskMetric) -> list[str]:
    chance = f", chance {percent(task.chance)}" if task.chance is not None else ", chance unknown"
    label = words(
        "{name}, {unit}, %, {shots}-shot{chance}{guess}",
        name=task.name,
        unit=_UNITS.get(metric.name, metric.name),
        shots=task.num_fewshot,
        chance=chance,
        guess=Markdown(" (**near chance**)") if near_chance(task, metric) else "",
    )
    others = [estimate(b.tasks.get((task.name, metric.name)), factor=100) for b in facts.baselines]
    scores = [estimate(metric.baseline, factor=100), *others, estimate(metric.subject, factor=100)]
    kept = [interval(metric.retention.raw), interval(metric.retention.corrected)]
    return [label, shown(metric.subject.n), *scores, *kept]


def layer_table(facts: CardFacts) -> Markdown:
    """Quantised matrices by family: how many, their shapes, stored bits, error."""
    families: dict[str, list[Layer]] = defaultdict(list)
    for layer in facts.made.layers:
        families[layer.family].append(layer)
    rows = [
        [code(name), len(members), shapes(members), ", ".join(sorted({x.format for x in members})),
         shown(family_bits(members), 4), shown(family_error(members))]
        for name, members in families.items()
    ]  # fmt: skip
    columns = ["layers", "count", "shape, out x in", "format", "stored bits per weight", "mean relative error"]
    return table(columns, rows, numbers=(1, 4, 5))


def shapes(members: Iterable[Layer]) -> str:
    """Different shapes of some matrices, the most frequent first."""
    counted: dict[tuple[int, int], int] = defaultdict(int)
    for layer in members:
        counted[layer.out_features, layer.in_features] += 1
    listed = [f"{rows} x {columns}" for rows, columns in sorted(counted, key=lambda s: -counted[s])]
    return ", ".join(listed[:MOST_SHAPES]) + (" and others" if len(listed) > MOST_SHAPES else "")


def family_bits(members: list[Layer]) -> float:
    """Stored bits per weight of some matrices together."""
    return sum(x.stored_bits for x in members) / sum(x.weights for x in members)


def family_error(members: list[Layer]) -> float | None:
    """Mean relative error, None if it is not known of all."""
    errors = [x.error for x in members if x.error is not None]
    return sum(errors) / len(errors) if len(errors) == len(members) else None


def float_table(facts: CardFacts) -> Markdown:
    """Modules that stay float, by family, with the reason."""
    families: dict[tuple[str, str], int] = defaultdict(int)
    for name, reason in facts.made.skipped.items():
        families[family_of(name), reason] += 1
    rows = [[code(name), count, reason] for (name, reason), count in families.items()]
    return table(["stays float", "count", "why"], rows, numbers=(1,))


def bits_table(facts: CardFacts) -> Markdown:
    """Bits per weight three ways."""
    bits = facts.record.bits
    rows = [
        ["quantised linears", shown(bits.linear, 4), "stored tensors of the quantised linears / their weights"],
        ["whole model", shown(bits.model, 4), "all stored tensors, those that stay float included / all weights"],
        ["weight files", shown(bits.file, 4), "bits of the weight files on disk / all weights"],
    ]
    return table(["of", "bits per weight", "what is counted"], rows, numbers=(1,))


def hardware_table(facts: CardFacts) -> Markdown:
    """What running takes: bytes and speed of both models."""
    cost = facts.record.cost
    theirs, ours = (cost.baseline, cost.subject) if cost else (None, None)
    on_accelerator = facts.record.environment.accelerator is not None
    # Sampled on a CPU, most of the peak hides in memory that the process held before.
    peaks = [size(c.peak_bytes if c else None) if on_accelerator else NOT_MEASURED for c in (theirs, ours)]
    speeds = [c.speed if c else None for c in (theirs, ours)]
    rows = [
        ["weight files", size(facts.float_bytes), size(facts.file_bytes)],
        ["weights in memory", *(size(c.weight_bytes if c else None) for c in (theirs, ours))],
        ["peak above the weights", *peaks],
        ["prompt, tokens/s", *(estimate(s.prefill if s else None) for s in speeds)],
        ["new tokens/s", *(estimate(s.decode if s else None) for s in speeds)],
        ["time to load", NOT_MEASURED, NOT_MEASURED],
    ]
    return table(["", "original", "this model"], rows, numbers=(1, 2))


def file_table(facts: CardFacts) -> Markdown:
    """Names, bytes and digests of the checkpoint's files."""
    rows = [[code(file.path), file.size, code(file.sha256)] for file in facts.files]
    return table(["file", "bytes", "sha256"], rows, numbers=(1,))


def version_table(facts: CardFacts) -> Markdown:
    """Software with which it was made, and with which it was measured."""
    made = {name.replace("-", "_"): version for name, version in facts.made.versions.items()}
    measured = facts.record.environment.versions
    names = [*made, *(name for name in measured if name not in made)]
    rows = [[code(name), made.get(name) or "not recorded", measured.get(name) or "not recorded"] for name in names]
    return table(["package", "made with", "measured with"], rows)


def weak_tasks(facts: CardFacts) -> list[str]:
    """Tasks in which the quantised model may be guessing although the original does not."""
    pairs = [(task, main_metric(task)) for task in facts.record.tasks if task.metrics]
    return [task.name for task, m in pairs if near_chance(task, m) and m.retention.corrected is not None]
