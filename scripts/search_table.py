"""The tables of the benchmark of the search, from its journals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from hf_qep.algorithms.ranks import bootstrap_interval, regret_at_1, spearman
from hf_qep.files import write_text_aside


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value of a file, made and written if it is not there."""
    if not path.exists():
        write_text_aside(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """Results by key of one task's journal."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line for line in lines if "key" in line}


def foretelling(lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How proxies order the candidates, against the mean truth of all seeds."""
    keys = [key.removeprefix("spec/") for key in lines if key.startswith("spec/")]
    seeds = sorted({key.split("/")[1] for key in lines if key.startswith("truth/")})
    keys = [key for key in keys if all(f"truth/{seed}/{key}" in lines for seed in seeds)]
    each = {seed: [lines[f"truth/{seed}/{key}"]["loss"] for key in keys] for seed in seeds}
    truth = [mean(values) for values in zip(*each.values(), strict=True)]
    error = mean(lines[f"truth/{seed}/{key}"]["error"] for seed in seeds for key in keys)
    names = dict.fromkeys(key.split("/")[1] for key in lines if key.startswith("proxy/"))
    rows = []
    for name in names:
        values = [lines[f"proxy/{name}/{key}"]["value"] for key in keys]
        low, high = bootstrap_interval(spearman, values, truth, seed=0)
        seconds = mean(lines[f"proxy/{name}/{key}"]["seconds"] for key in keys)
        rows.append(
            {"proxy": name, "spearman": spearman(values, truth), "low": low, "high": high,
             "regret": regret_at_1(values, truth), "seconds": seconds}
        )  # fmt: skip
    ceiling = spearman(*list(each.values())[:2]) if len(seeds) > 1 else math.nan
    return {
        "candidates": len(keys),
        "ceiling": ceiling,
        "standard_error": error,
        "least": min(truth),
        "most": max(truth),
        "seconds": mean(lines[f"truth/{seed}/{key}"]["seconds"] for seed in seeds for key in keys),
        "rows": sorted(rows, key=lambda row: -row["spearman"]),
    }


def comparison(lines: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out loss of our winner and of the usual recipes."""
    rows = []
    for key, line in lines.items():
        if key.startswith("rival/") and key.count("/") == 1:
            taught = [lines[k] for k in lines if k.startswith(f"{key}/")]
            losses = [t["loss"] for t in taught]
            cost = line["cost"]
            rows.append(
                {"student": key.removeprefix("rival/"), "loss": mean(losses), "losses": losses,
                 "error": mean(t["error"] for t in taught), "latency_ms": cost["latency_ms"],
                 "parameters": cost["parameters"], "layers": len(line["spec"]["layers"])}
            )  # fmt: skip
    return rows


def cost_errors(lines: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """(predicted - measured) / measured of students that the model of costs had not seen."""
    found: dict[str, list[float]] = {}
    for key, line in lines.items():
        if key.startswith("cost/"):
            for name, true in line["measured"].items():
                found.setdefault(name, []).append(line["predicted"][name] / true - 1)
    return found


def show(work: Path, tasks: list[str], path: Path | None) -> None:
    """Print the tables of all tasks in Markdown; also as JSON to `path`."""
    found = {}
    for task in tasks:
        lines = lines_of(work / task / "results.jsonl")
        found[task] = {
            "proxies": foretelling(lines),
            "comparison": comparison(lines),
            "cost_errors": cost_errors(lines),
        }
        _print(task, found[task])
    if path is not None:
        write_text_aside(path, json.dumps(found, indent=1))


def _print(task: str, found: dict[str, Any]) -> None:
    proxies = found["proxies"]
    print(f"\n## {task}\n")
    print(
        f"{proxies['candidates']} candidates, loss {proxies['least']:.4f} to {proxies['most']:.4f} after the long "
        f"distillation ({proxies['seconds']:.1f} s each); Spearman between two seeds {proxies['ceiling']:.3f}; "
        f"standard error of a loss {proxies['standard_error']:.4f}\n"
    )
    print("| proxy | Spearman | 90 % interval | regret@1 | seconds |\n|---|---|---|---|---|")
    for row in proxies["rows"]:
        print(
            f"| {row['proxy']} | {row['spearman']:.3f} | {row['low']:.2f} to {row['high']:.2f} | "
            f"{row['regret']:.4f} | {row['seconds']:.2f} |"
        )
    print("\n| student | held-out loss | each seed | s.e. | ms | layers | parameters |\n|---|---|---|---|---|---|---|")
    for row in found["comparison"]:
        seeds = " ".join(f"{loss:.4f}" for loss in row["losses"])
        print(
            f"| {row['student']} | {row['loss']:.4f} | {seeds} | {row['error']:.4f} | {row['latency_ms']:.2f} | "
            f"{row['layers']} | {row['parameters']:.0f} |"
        )
    for name, errors in found["cost_errors"].items():
        size = [abs(e) for e in errors]
        print(f"\ncost model, {name}: mean error {mean(size):.1%}, largest {max(size):.1%}, {len(errors)} students")
