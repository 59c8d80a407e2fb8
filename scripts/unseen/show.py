"""The results for people: a table in Markdown, a plot, and both between the markers of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_qep.errors import ConfigError
from hf_qep.extras import require
from hf_qep.files import write_text_aside
from unseen.methods import OURS, SEARCHED, USUAL, with_best

HEADS = {
    "official": "official one-shot runs, %",
    "episodes": "20-way episodes, small2, %",
    "unseen": "unseen classes, %",
}
_STUDENTS = {USUAL: "usual", SEARCHED: "searched", "blank": "searched, blank"}


def table(results: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """One row per method: student, size, latency, shares of right answers, and how far ours is ahead."""
    measures, costs, batch = list(found["teacher"]), results["shrunk"]["costs"], results["shrunk"]["batch"]
    heads = [HEADS[measure] for measure in measures]
    lines = [
        f"| taught by | student | parameters | ms, {batch} images | {' | '.join(heads)} | ours ahead, points (95 %) |",
        "|---|---|---|---|" + "---|" * (len(heads) + 1),
    ]
    for name, value in results["references"].items():
        lines.append(f"| {name} |  |  |  | {100 * value:.1f} |" + "  |" * len(heads))
    shares = " | ".join(f"{found['teacher'][measure]:.1f}" for measure in measures)
    lines.append(f"| *teacher* |  | {_cost(costs['teacher'])} | {shares} |  |")
    for name, method in with_best(results["best"]).items():
        row = found["methods"][name]
        shares = " | ".join(f"{row[m]['mean']:.1f} ± {row[m]['deviation']:.1f}" for m in measures)
        cost = costs["usual" if method.student == USUAL else "ours"]
        ahead = "" if name == OURS else _ahead(found["ahead"][name])
        lines.append(f"| {method.shown} | {_STUDENTS[method.student]} | {_cost(cost)} | {shares} | {ahead} |")
    return "\n".join(lines) + "\n\n" + sentence(results, found) + "\n"


def sentence(results: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The claim with its numbers, or that it does not hold."""
    best, ahead = found["best"], found["ahead"][found["best"]]
    low, high = ahead["interval"]
    wide = ahead["interval_of_groups"]
    text = (
        f"Ours is {ahead['points']:+.1f} points ahead of the best baseline, {results['shown'][best]} "
        f"({ahead['relative']:+.0f} % of its {found['methods'][best][results['measure']]['mean']:.1f} %); "
        f"95 % bootstrap interval over trials and seeds {low:+.1f} to {high:+.1f}"
    )
    if results["task"] == "omniglot":
        text += f", over whole runs and seeds {wide[0]:+.1f} to {wide[1]:+.1f}"
        text += f". The bar of {found['bar']:+.0f} points is {'met' if found['met'] else '**not met**'}"
    return f"{text}. {len(results['units'][OURS])} seeds; ± is the standard deviation over seeds."


def draw(results: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Bars of the measure that counts, with the deviation over seeds and the teacher as a line."""
    figures = require("distill", "matplotlib.figure")
    measure, methods = results["measure"], with_best(results["best"])
    figure = figures.Figure(figsize=(8, 0.45 * len(methods) + 1.2), layout="constrained")
    axes = figure.subplots()
    rows = [(re.sub(r"\*", "", method.shown), found["methods"][name][measure]) for name, method in methods.items()]
    names, values = [name for name, _ in rows], [row["mean"] for _, row in rows]
    colours = ["#2a6f97" if name == OURS else "#9aa5b1" for name in methods]
    axes.barh(names, values, xerr=[row["deviation"] for _, row in rows], color=colours, capsize=3)
    axes.axvline(found["teacher"][measure], color="#444444", linestyle="--", label="teacher")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(HEADS[measure])
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def insert(page: Path, marker: str, text: str) -> None:
    """Put text between `<!-- marker -->` and `<!-- /marker -->` of a page. Raises ConfigError if they are not there."""
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(before):
        raise ConfigError(f"{str(page)!r} has no markers `<!-- {marker} -->` and `<!-- /{marker} -->`; put them back")
    write_text_aside(page, pattern.sub(lambda found: found[1] + text.rstrip() + "\n" + found[2], before))


def _cost(cost: Mapping[str, float]) -> str:
    return f"{cost['parameters'] / 1e3:.0f} k | {cost['latency_ms']:.1f}"


def _ahead(ahead: Mapping[str, Any]) -> str:
    low, high = ahead["interval"]
    return f"{ahead['points']:+.1f} ({low:+.1f} to {high:+.1f})"
