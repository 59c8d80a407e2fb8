"""What `hf-qep distill` prints for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qep.cli import output

if TYPE_CHECKING:
    from hf_qep.search.costs import Cost
    from hf_qep.search.results import SearchResult

COLUMNS = {"nll": "loss", "accuracy": "accuracy", "auc": "AUC"}
"""Parts of a score -> what they are called in tables."""


def show_analysis(result: dict[str, Any]) -> None:
    """Print what `distill analyze` has found."""
    output.print_facts(result["out"], result["teacher"])
    columns = ["layer", "influence, answers", "influence, all", "attention adds", "mlp adds"]
    output.print_table("Layers of the teacher", columns, [list(row.values()) for row in result["layers"]])
    if result["additions"]:
        rows = [list(row.values()) for row in result["additions"]]
        output.print_table("Another layer", ["before layer", "copy of", "gain"], rows)


def picks_of(result: SearchResult) -> dict[str, str]:
    """Rule -> key of the student that it picks. Raises ConfigError if none meets the limits, as measured."""
    from hf_qep.search.results import PICKS

    return {rule: result.pick(rule).choice.key() for rule in PICKS}


def search_json(result: SearchResult, teacher: Cost) -> dict[str, Any]:
    """JSON value of a search."""
    return result.to_dict() | {"picks": picks_of(result), "teacher": teacher.to_dict()}


def show_search(result: SearchResult, teacher: Cost) -> None:
    """Print the Pareto front of a search beside the teacher."""
    picks = picks_of(result)
    rows: list[list[Any]] = []
    for found in result.front():
        key, cost = found.choice.key(), found.cost
        names = ", ".join(rule for rule, picked in picks.items() if picked == key)
        layers = " + ".join(str(len(stack)) for _, stack in found.choice.spec.stacks())
        bits = "float" if found.choice.bits is None else f"{found.choice.bits:g}"
        rows.append([key[:8], layers, bits, result.value(found), *_costs(cost), names])
    rows.append(["teacher", "", "float", 0.0, *_costs(teacher), ""])
    columns = ["student", "layers", "bits", "distance", "ms", "MB", "parameters", "pick"]
    output.print_table("Students on the Pareto front", columns, rows)


def _costs(cost: Cost) -> list[Any]:
    return [cost.latency_ms, cost.memory_mb, int(cost.parameters)]


def show_start(result: dict[str, Any]) -> None:
    """Print what `distill materialize` has written."""
    changes = {name: _change(change) for name, change in result["changes"].items()}
    facts = {name: value for name, value in result.items() if name not in ("out", "changes", "bits")}
    output.print_facts(result["out"], facts | changes)


def show_student(facts: dict[str, Any]) -> None:
    """Print what `distill train` has found."""
    rows = [
        [who, *(found["score"].get(name) for name in COLUMNS), found["distance"], found["latency_ms"],
         found["parameters"]]
        for who, found in facts["models"].items()
    ]  # fmt: skip
    title = f"{facts['task']}: {facts['rows']['test']} rows that nothing was chosen by"
    if scored := facts["models"]["student"]["score"].get("scored"):
        title += f"; {scored}"
    output.print_table(title, ["model", *COLUMNS.values(), "distance", "ms", "parameters"], rows)
    if facts["changes"]:
        output.print_facts("What was done to the teacher", {k: _change(v) for k, v in facts["changes"].items()})


def note_bits(bits: float | None, out: Path) -> None:
    """Say what is left to do to a student whose blocks the search took for quantised."""
    if bits is not None:
        output.note(f"The search took its blocks to have {bits:g} bits per weight, and it is written in floats: "
                    f"hf-qep quantize {out} --bits {bits:g}")  # fmt: skip


def _change(change: Any) -> str:
    return " -> ".join(map(str, change)) if isinstance(change, list) else str(change)
