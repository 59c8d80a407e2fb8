"""The result of a search for people: a page and a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_qep.extras import require
from hf_qep.search.limits import UNITS

if TYPE_CHECKING:
    from hf_qep.search.halving import Correlation
    from hf_qep.search.results import Candidate, SearchResult

NAMES = {"latency_ms": "latency", "memory_mb": "memory", "parameters": "parameters"}
_COLOURS = {"judged": "#999999", "front": "#0072b2", "picked": "#d55e00"}


def markdown(result: SearchResult, picks: Mapping[str, Candidate], plot: str) -> str:
    """The page: front, picks, how far each proxy can be trusted, errors of the cost model, failures."""
    judged = sum(bool(c.values) for c in result.candidates)
    limits = [f"{NAMES[name]} ≤ {most:g} {UNITS[name]}" for name, most in result.limits.given().items()]
    parts = [
        "# Search for a student",
        f"{len(result.candidates)} students considered, {judged} of them judged by the proxy, "
        f"{len(result.finalists())} by the last rung, {len(result.failures)} failed. "
        f"Limits: {'; '.join(limits) or 'none'}.",
        f"![Value and latency of the students]({plot})",
        "## Pareto front",
        _front(result, picks),
        "## How well each proxy foretold the next",
        _correlations(result.correlations),
        "## Errors of the cost model",
        _errors(result, picks),
    ]
    if result.failures:
        parts += [
            "## Failures",
            "\n".join(f"- {rung}, {key[:8]}: {_cell(text)}" for rung, key, text in result.failures),
        ]
    return "\n\n".join(parts) + "\n"


def _front(result: SearchResult, picks: Mapping[str, Candidate]) -> str:
    if not result.front():
        return "No student within the limits."
    head = ["student", "layers", "hidden", "bits", "value", "latency (ms)", "memory (MB)", "parameters", "pick"]
    rows = [_table_row(head), _table_row(["---"] * len(head))]
    for c in result.front():
        spec, cost = c.choice.spec, c.cost
        names = ", ".join(rule for rule, picked in picks.items() if picked.choice == c.choice)
        layers = " + ".join(str(len(stack)) for _, stack in spec.stacks())
        bits = "float" if c.choice.bits is None else f"{c.choice.bits:g}"
        numbers = [
            f"{result.value(c):.4g}",
            f"{cost.latency_ms:.4g}",
            f"{cost.memory_mb:.4g}",
            f"{cost.parameters:.4g}",
        ]
        rows.append(_table_row([c.choice.key()[:8], layers, str(spec.hidden_size), bits, *numbers, names]))
    measured = "as measured where they were, else " if any(c.measured for c in result.front()) else ""
    return "\n".join(rows) + f"\n\nLess is better everywhere. Costs are {measured}as predicted."


def _correlations(found: tuple[Correlation, ...]) -> str:
    if not found:
        return "There was one rung only."
    head = ["rung", "next rung", "students", "Spearman", "90 % interval", "Kendall", "regret@1"]
    rows = [_table_row(head), _table_row(["---"] * len(head))]
    for c in found:
        interval = "-" if c.low is None else f"{c.low:.2f} to {c.high:.2f}"
        ranks = ["-" if v is None else f"{v:.2f}" for v in (c.spearman, c.kendall)]
        rows.append(_table_row([c.first, c.second, str(c.students), ranks[0], interval, ranks[1], f"{c.regret:.4g}"]))
    return "\n".join(rows) + "\n\nOnly students that went on are compared, which makes an order harder to foretell."


def _errors(result: SearchResult, picks: Mapping[str, Candidate]) -> str:
    lines = []
    for c in result.candidates:
        names = ", ".join(rule for rule, picked in picks.items() if picked.choice == c.choice)
        errors = [f"{NAMES[name]} {error:+.1%}" for name, error in c.errors().items()]
        if errors:
            lines.append(f"- {c.choice.key()[:8]}{f' ({names})' if names else ''}: {', '.join(errors)}")
    return "\n".join(["(predicted - measured) / measured", "", *lines]) if lines else "Nothing was measured again."


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that stays in its cell and line."""
    return text.replace("|", "\\|").replace("\n", " ")


def draw(result: SearchResult, picks: Mapping[str, Candidate]) -> str:
    """The picture as SVG: latency across, value upwards, area by memory. Raises ExtraMissingError without matplotlib.

    Nothing of the day or of chance is in it, so that equal results give equal bytes.
    """
    matplotlib = require("distill", "matplotlib")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "hf_qep", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        finalists = result.finalists()
        most = max((c.cost.memory_mb for c in finalists), default=0) or 1.0
        chosen = [c for c in finalists if any(c.choice == picked.choice for picked in picks.values())]
        groups = {"judged": finalists, "front": result.front(), "picked": chosen}
        for kind, members in groups.items():
            x, y = [c.cost.latency_ms for c in members], [result.value(c) for c in members]
            size = [20 + 80 * c.cost.memory_mb / most for c in members]
            axis.scatter(x, y, s=size, color=_COLOURS[kind], label=kind, alpha=0.8, linewidths=0)
        front = result.front()
        axis.plot([c.cost.latency_ms for c in front], [result.value(c) for c in front], color=_COLOURS["front"], lw=0.8)
        if result.limits.latency_ms is not None:
            axis.axvline(result.limits.latency_ms, color="black", lw=0.8, ls="--")
        axis.set_xlabel("latency (ms)")
        axis.set_ylabel("value of the last rung, less is better")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
