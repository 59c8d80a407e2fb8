"""The measured part of the page about the demonstration: tables, sentences and pictures, all from one set of results.

Results are a JSON value:

    tasks      task -> rows         method -> values of COLUMNS and `accuracy_interval`, `auc_interval` ([low, high])
                       differences  `crm.scores.difference_name` -> mean, low, high
                       bayes        best possible accuracy, if it is known
                       note         sentences about the rows, such as their split
                       control      true where nothing can be learned
    teacher_skill  list of shots, accuracy, auc, bayes: the few-shot teacher on worlds that it has not seen
    machine        what it was measured on, name -> value
    command        what prints it

Methods that sentences speak about have fixed names (`names.py`); others are only rows. What is missing is "not
measured".
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crm.names import ALONE, BOOSTING, MAJORITY, RAW, STUDENT, TUNED
from crm.names import FEW_SHOT as TEACHER
from crm.scores import difference_name

from hf_qep.errors import ConfigError
from hf_qep.extras import require
from hf_qep.files import write_text_aside

CLAIMED = 43
"""Per cent of accuracy, relative, that a student is said to gain on its teacher (press release, September 2025)."""
START, END = "<!-- measured:start -->", "<!-- measured:end -->"
MISSING = "not measured"

COLUMNS = {
    "parameters": "parameters",
    "accuracy": "accuracy (95 %)",
    "balanced_accuracy": "balanced",
    "auc": "AUC (95 %)",
    "nll": "NLL",
    "latency_equal_ms": "ms, same prompt",
    "latency_real_ms": "ms, own prompt",
    "many_ms": "ms, 32 at once",
    "prompt_tokens": "prompt tokens",
    "memory_mb": "memory (MB)",
    "cost_per_million": "core hours per million",
    "seeds": "seeds",
}
"""Key of a row -> head of its column."""
INTERVALS = {"accuracy": "accuracy_interval", "auc": "auc_interval"}
POINTS = {"accuracy", "balanced_accuracy"}
"""Metrics that are written in per cent."""
MEASURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc": "area under the curve"}

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Those of Okabe and Ito, told apart by colour-blind eyes too."""


def write_page(results: Mapping[str, Any], readme: Path) -> list[Path]:
    """Put the measured part into the page, and pictures beside it; what was written.

    Raises ConfigError for results that are not as described above and for a page without its two marks, and
    ExtraMissingError without matplotlib.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ConfigError(f"{readme.name!r} needs the marks {START} and {END}, each once and in this order")
    before, after = text.partition(START)[0], text.partition(END)[2]
    measured = measured_part(results)
    pictures = {f"{_file_name(task)}.svg": draw_task(task, found) for task, found in results["tasks"].items()}
    if results.get("teacher_skill"):
        pictures["shots.svg"] = draw_skill(results["teacher_skill"])
    for name, picture in pictures.items():
        write_text_aside(readme.parent / name, picture)
    write_text_aside(readme, f"{before}{START}\n\n{measured}\n\n{END}{after}")
    return [readme, *(readme.parent / name for name in pictures)]


def measured_part(results: Mapping[str, Any]) -> str:
    """The measured part in Markdown. Raises ConfigError for results that are not as described above."""
    _check(results)
    blocks = [f"```\n{results['command']}\n```"] if results.get("command") else []
    if machine := results.get("machine"):
        blocks.append("Measured on: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".")
    for task, found in results["tasks"].items():
        blocks += [f"### {task}", *([found["note"]] if found.get("note") else []), table(found)]
        blocks += ["\n".join(f"* {sentence}" for sentence in sentences(found)), f"![{task}]({_file_name(task)}.svg)"]
    if skill := results.get("teacher_skill"):
        blocks += ["### What the teacher can do with a few examples", skill_table(skill), "![shots](shots.svg)"]
    return "\n\n".join(block for block in blocks if block)


def table(found: Mapping[str, Any]) -> str:
    """One task as a Markdown table; columns that nobody has are left out."""
    rows = found["rows"]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows.values())]
    lines = [["method", *(COLUMNS[key] for key in keys)], ["---", *("--:" for _ in keys)]]
    lines += [[name, *(_cell(row, key) for key in keys)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def skill_table(skill: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of the few-shot teacher by the number of examples, as a Markdown table."""
    lines = ["| examples | accuracy | AUC | best possible accuracy |", "|--:|--:|--:|--:|"]
    for point in skill:
        values = [_shown("accuracy", point.get("accuracy")), _shown("auc", point.get("auc"))]
        lines.append(f"| {point['shots']} | {' | '.join(values)} | {_shown('accuracy', point.get('bayes'))} |")
    return "\n".join(lines)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the numbers of one task say, in favour of the student or not."""
    rows = found["rows"]
    told = [_control(rows)] if found.get("control") else []
    told += [_against(found, other, metric) for other, metric in _COMPARED]
    told += [_smaller(rows), _boosting(found), _against_majority(rows), _achievable(found)]
    return [sentence for sentence in told if sentence]


_COMPARED = [
    (RAW, "accuracy"),
    (TEACHER, "accuracy"),
    (TEACHER, "balanced_accuracy"),
    (TEACHER, "auc"),
    (TUNED, "accuracy"),
    (TUNED, "auc"),
]
_COMPARED += [(ALONE, "accuracy"), (ALONE, "auc")]
_ABOUT = {
    RAW: "the few-shot teacher as it answers",
    TEACHER: "the few-shot teacher, calibrated on the validation rows,",
    TUNED: "the fine-tuned teacher, the upper bound,",
    ALONE: "the same student trained on the labels alone",
    BOOSTING: "gradient boosting on the raw columns",
}


def verdict(found: Mapping[str, Any], first: str, second: str, metric: str) -> tuple[int, dict[str, float] | None]:
    """1 if `first` is better, -1 if worse, 0 if the interval of the difference holds 0; and the difference.

    Without an interval the plain values decide and the difference is None.
    """
    known = found.get("differences", {})
    if (given := known.get(difference_name(first, second, metric))) is not None:
        difference = dict(given)
    elif (given := known.get(difference_name(second, first, metric))) is not None:
        difference = {"mean": -given["mean"], "low": -given["high"], "high": -given["low"]}
    else:
        a, b = (found["rows"][name][metric] for name in (first, second))
        return (a > b) - (a < b), None
    return (difference["low"] > 0) - (difference["high"] < 0), difference


def _against(found: Mapping[str, Any], other: str, metric: str) -> str | None:
    rows = found["rows"]
    ours, theirs = (rows.get(name, {}).get(metric) for name in (STUDENT, other))
    if ours is None or theirs is None:
        return None
    better, difference = verdict(found, STUDENT, other, metric)
    how = {1: "is better than", -1: "is worse than", 0: "cannot be told from"}[better]
    told = (
        f"In {MEASURES[metric]} the student ({_shown(metric, ours)}) {how} {_ABOUT[other]} ({_shown(metric, theirs)})"
    )
    if difference is None:
        return f"{told}; no interval was measured."
    unit, scale, digits = (" points", 100, 1) if metric in POINTS else ("", 1, 3)
    mean, low, high = (f"{scale * difference[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    told += f": {mean}{unit}, 95 % interval {low} to {high}"
    if metric == "accuracy" and theirs < 1:
        gain, errors = ours / theirs - 1, (1 - ours) / (1 - theirs) - 1
        told += f"; relative to the accuracy that is {100 * gain:+.0f} %, to the errors {100 * errors:+.0f} %"
        told += f" (Fujitsu says {CLAIMED:+} % accuracy of its own student)" if other == RAW else ""
    return f"{told}."


def _smaller(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """How many times less the student takes than the teacher."""
    if STUDENT not in rows or TEACHER not in rows:
        return None
    names = {
        "parameters": "the parameters",
        "latency_equal_ms": "the time with the same prompt",
        "latency_real_ms": "the time when each reads its own prompt (the teacher's holds the examples)",
        "memory_mb": "the memory",
        "cost_per_million": "the cost",
    }
    told = []
    for key, name in names.items():
        ours, theirs = rows[STUDENT].get(key), rows[TEACHER].get(key)
        if ours and theirs:
            told.append(f"1/{theirs / ours:.3g} of {name}" if ours <= theirs else f"{ours / theirs:.3g} times {name}")
    return f"Against the few-shot teacher the student takes {', '.join(told)}." if told else None


def _boosting(found: Mapping[str, Any]) -> str | None:
    """Whether a usual method would have done as well: said whatever comes out."""
    rows = found["rows"]
    if found.get("control") or STUDENT not in rows or BOOSTING not in rows:
        return None
    told = []
    for metric in ("accuracy", "auc"):
        ours, theirs = (rows[name].get(metric) for name in (STUDENT, BOOSTING))
        if ours is not None and theirs is not None:
            better, _ = verdict(found, STUDENT, BOOSTING, metric)
            values = f"{_shown(metric, theirs)} against {_shown(metric, ours)}"
            word = {1: "loses to the student", -1: "beats the student", 0: "does as well as the student"}[better]
            told.append((better, f"{word} in {MEASURES[metric]} ({values})"))
    if not told:
        return None
    sentence = f"Gradient boosting on the raw columns {' and '.join(text for _, text in told)}"
    if min(better for better, _ in told) < 0:
        return f"{sentence}: who has the table and needs nothing else should take it."
    return f"{sentence}."


def _against_majority(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    ours, theirs = rows.get(STUDENT, {}).get("accuracy"), rows.get(MAJORITY, {}).get("accuracy")
    if ours is None or theirs is None:
        return None
    usual = f"Always giving the commoner answer is right in {_shown('accuracy', theirs)}"
    low = (rows[STUDENT].get("accuracy_interval") or [ours])[0]
    if low > theirs:
        return f"{usual}."
    return f"{usual}: in accuracy the student is not above that, and what it has learned shows in the area alone."


def _achievable(found: Mapping[str, Any]) -> str | None:
    best, ours = found.get("bayes"), found["rows"].get(STUDENT, {}).get("accuracy")
    if best is None or ours is None:
        return None
    told = f"Nothing can be right in more than {_shown('accuracy', best)}"
    usual = found["rows"].get(MAJORITY, {}).get("accuracy")
    if usual is None or best <= usual:
        return f"{told}; the student is in {_shown('accuracy', ours)}."
    share = 100 * (ours - usual) / (best - usual)
    return f"{told}; of the way there from the commoner answer the student makes {share:.0f} %."


def _control(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a table in which there is nothing to learn: who seems to have learned something."""
    found = [name for name, row in rows.items() if (row.get("auc_interval") or [0])[0] > 0.5]
    if found:
        return f"Nothing can be learned here, and yet {', '.join(found)} did better than chance: something leaks."
    return "Nothing can be learned here, and no method did better than chance in the area under the curve."


def _cell(row: Mapping[str, Any], key: str) -> str:
    shown = _shown(key, row.get(key))
    interval = row.get(INTERVALS.get(key, ""))
    if interval is None or row.get(key) is None:
        return shown
    low, high = (_shown(key, end).removesuffix(" %") for end in interval)
    return f"{shown} ({low} to {high})"


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if key in POINTS:
        return f"{100 * value:.1f} %"
    if key in ("auc", "nll"):
        return f"{value:.3f}"
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


def draw_task(task: str, found: Mapping[str, Any]) -> str:
    """SVG: accuracy and area under the curve against parameters on a logarithmic axis, with intervals.

    A method without parameters, and the best possible accuracy, are lines across. Raises ExtraMissingError without
    matplotlib. Equal results give equal bytes.
    """

    def fill(axes: Sequence[Any]) -> None:
        for axis, metric, label in zip(axes, ("accuracy", "auc"), ("accuracy", "area under the curve"), strict=True):
            _points(axis, found["rows"], metric)
            if metric == "accuracy" and found.get("bayes") is not None:
                axis.axhline(found["bayes"], color="black", lw=0.8, ls=":", label="best possible")
            axis.set_xscale("log")
            axis.set_xlabel("parameters")
            axis.set_ylabel(label)
            axis.set_title(task, fontsize=9)

    return _drawn(fill)


def draw_skill(skill: Sequence[Mapping[str, Any]]) -> str:
    """SVG: accuracy and area under the curve of the few-shot teacher against examples; errors as of `draw_task`."""

    def fill(axes: Sequence[Any]) -> None:
        for axis, metric, label in zip(axes, ("accuracy", "auc"), ("accuracy", "area under the curve"), strict=True):
            known = [(point["shots"], point[metric]) for point in skill if point.get(metric) is not None]
            axis.plot(*zip(*known, strict=True) if known else ([], []), marker="o", color=COLOURS[0], label="teacher")
            best = [(point["shots"], point["bayes"]) for point in skill if point.get("bayes") is not None]
            if metric == "accuracy" and best:
                axis.plot(*zip(*best, strict=True), color="black", lw=0.8, ls=":", label="best possible")
            axis.set_xlabel("examples in the prompt")
            axis.set_ylabel(label)

    return _drawn(fill)


def _points(axis: Any, rows: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    for place, (name, row) in enumerate(rows.items()):
        value, size = row.get(metric), row.get("parameters")
        if value is None:
            continue
        colour = COLOURS[place % len(COLOURS)]
        if not size:
            axis.axhline(value, color=colour, lw=0.8, ls="--", label=name)
            continue
        low, high = row.get(f"{metric}_interval") or (value, value)
        # A bootstrap interval need not hold the value itself, and lengths below zero cannot be drawn.
        lengths = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar([size], [value], yerr=lengths, fmt="o", color=colour, capsize=3, label=name)


def _drawn(fill: Callable[[Sequence[Any]], None]) -> str:
    """SVG of two panels side by side, with one legend."""
    matplotlib = require("distill", "matplotlib")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "hf_qep", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, 2)
        fill(axes)
        shown: dict[str, Any] = {}
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            handles, labels = axis.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _file_name(task: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")


def _check(results: Mapping[str, Any]) -> None:
    """A key that is misspelt would be a silent "not measured"."""
    levels = [("results", results, {"tasks", "teacher_skill", "machine", "command"})]
    for task, found in results.get("tasks", {}).items():
        levels.append((f"the task {task!r}", found, {"rows", "differences", "bayes", "note", "control"}))
        for name, row in found.get("rows", {}).items():
            levels.append((f"the row {name!r} of {task!r}", row, {*COLUMNS, *INTERVALS.values()}))
        for name, values in found.get("differences", {}).items():
            if set(values) != {"mean", "low", "high"}:
                raise ConfigError(f"the difference {name!r} needs mean, low and high, not {', '.join(values)}")
    for what, values, known in levels:
        if strange := sorted(set(values) - known):
            raise ConfigError(f"{what} holds {strange[0]!r}, which is none of {', '.join(sorted(known))}")
    if not results.get("tasks") or any(not found.get("rows") for found in results["tasks"].values()):
        raise ConfigError("there is no task to show, or one without rows")
