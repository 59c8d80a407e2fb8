"""Markdown tables of the results of `bench_accuracy.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

LANGUAGE = {"kl": "KL", "top1_agreement": "top-1", "perplexity": "perplexity"}
ENCODER = {"cosine_distance": "1 - cosine", "neighbour_overlap": "neighbours"}
GROUPS = ("ours", "baselines", "peer")
BUDGETS = (1.1, 1.5, 2.0)
SLACK = 0.05
"""Bits by which OneComp may be above a budget and still count there: the sizes of its methods are what they are."""

Line = dict[str, Any]


def print_tables(lines: Sequence[Line]) -> None:
    """One table per model and group of rows (the comparison, or an ablation), and what failed below it."""
    kinds = {(line["model"], None if line["group"] in GROUPS else line["group"]): None for line in lines}
    for model, ablation in kinds:
        chosen = [
            line
            for line in lines
            if line["model"] == model and (line["group"] == ablation or (not ablation and line["group"] in GROUPS))
        ]
        print("\n".join(table(chosen, model, ablation)), end="\n\n")


def table(lines: Sequence[Line], model: str, ablation: str | None) -> Iterator[str]:
    """Lines of one table, by bits and then by distance to the float model."""
    done = [line for line in lines if line["status"] == "ok"]
    if done:
        names = LANGUAGE if done[0].get("kl") else ENCODER
        distance = next(iter(names))
        cells = [row_of(group, names) for group in by_recipe(done)]
        cells.sort(key=lambda row: row["order"])
        yield title(done, model, ablation, distance)
        yield ""
        columns = ["row", "bits asked", "bits, linears", "bits, model", "file MB", *names.values()]
        columns += ["cloze", "kept above chance [95 %]", "minutes", "processor minutes", "peak GB", "seeds"]
        yield f"| {' | '.join(columns)} |"
        yield "|---" + "|--:" * (len(columns) - 1) + "|"
        yield from (f"| {' | '.join(row['cells'])} |" for row in cells)
        yield from best_of_peer(done, distance)
    for line in lines:
        if line["status"] != "ok":
            yield f"* {line['label']}, {line['bits']:g} bits, seed {line['seed']}: {line['reason']}"


def title(done: Sequence[Line], model: str, ablation: str | None, distance: str) -> str:
    """What was measured on what."""
    first, calibration = done[0], done[0]["calibration"]
    unit = "tokens" if distance == "kl" else "sentences"
    text = f"{model}{f', ablation {ablation}' if ablation else ''}: {first[distance]['n']} {unit} of {first['text']}"
    text += f"; calibration {calibration['num_samples']} x {calibration['seq_len']} tokens of {calibration['dataset']}"
    if first.get("float_perplexity"):
        text += f"; float perplexity {first['float_perplexity']['value']:.4g}"
    if cloze := next((line["cloze"] for line in done if line["cloze"]), None):
        text += f"; cloze, {cloze['float']['n']} items, float {cloze['float']['value']:.3f}"
        text += f" and chance {cloze['chance']:.3g}"
    return text


def by_recipe(done: Sequence[Line]) -> list[list[Line]]:
    """Lines that differ in the seed alone."""
    found: dict[tuple[str, float, str], list[Line]] = {}
    for line in done:
        found.setdefault((line["label"], line["bits"], str(line["recipe"])), []).append(line)
    return list(found.values())


def row_of(lines: Sequence[Line], names: dict[str, str]) -> dict[str, Any]:
    """Cells of one row; the first measurement has its spread."""
    distance = next(iter(names))
    cloze = next((line["cloze"] for line in lines if line["cloze"]), None)
    cells = [
        lines[0]["label"],
        f"{lines[0]['bits']:g}",
        f"{mean_of(lines, 'bits_linear'):.3f}",
        f"{mean_of(lines, 'bits_model'):.3f}",
        f"{mean_of(lines, 'file_bytes') / 1e6:.3g}",
        *(measured(lines, name, spread=name == distance) for name in names),
        f"{cloze['quantized']['value']:.3f}" if cloze else "-",
        kept(cloze["retention"]["corrected"]) if cloze else "-",
        f"{mean_of(lines, 'seconds') / 60:.2f}",
        f"{mean_of(lines, 'cpu_seconds') / 60:.2f}",
        f"{mean_of(lines, 'peak_bytes') / 1e9:.2f}",
        str(len(lines)),
    ]
    return {"cells": cells, "order": (lines[0]["bits"], value_of(lines, distance))}


def mean_of(lines: Sequence[Line], name: str) -> float:
    """Mean over seeds of a plain number."""
    return statistics.fmean(line[name] for line in lines)


def value_of(lines: Sequence[Line], name: str) -> float:
    """Mean over seeds of a measurement."""
    return statistics.fmean(line[name]["value"] for line in lines)


def measured(lines: Sequence[Line], name: str, *, spread: bool) -> str:
    """Mean over seeds; ± is the standard deviation over seeds, or with one seed the standard error over items."""
    if lines[0][name] is None:
        return "-"
    shown = f"{value_of(lines, name):.4g}"
    if not spread:
        return shown
    several = len(lines) > 1
    error = statistics.stdev(line[name]["value"] for line in lines) if several else lines[0][name]["stderr"]
    return shown if error is None else f"{shown} ± {error:.1g}"


def kept(interval: dict[str, Any] | None) -> str:
    """Retention above chance in per cent, with its interval."""
    if interval is None:
        return "-"
    ends = "" if interval["low"] is None else f" [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"
    return f"{100 * interval['value']:.0f} %{ends}"


def best_of_peer(done: Sequence[Line], distance: str) -> Iterator[str]:
    """The row of OneComp to beat at each number of stored bits."""
    groups = by_recipe([line for line in done if line["peer"]])
    for budget in BUDGETS:
        fitting = [g for g in groups if mean_of(g, "bits_linear") <= budget + SLACK]
        if fitting:
            best = min(fitting, key=lambda g: value_of(g, distance))
            bits, value = mean_of(best, "bits_linear"), value_of(best, distance)
            yield ""
            yield f"OneComp's best at about {budget:g} bits or less: {best[0]['label']}, {bits:.3f} bits, {value:.4g}."
