"""A local agent: a 1-bit model of 2.8M parameters calls tools, on a processor, behind an OpenAI-compatible server.

    python scripts/demo_agent.py ask
    python scripts/demo_agent.py ask "How cold is it in Oslo?" "Please add 17 and 25."
    python scripts/demo_agent.py make --out runs/agent
    python scripts/demo_agent.py rows --out hf_qep/demo_text/tool_calls.jsonl

`ask` serves the specialist that lies in scripts/agent/packed (or --model FOLDER) with `hf-qep serve` and lets an
agent of smolagents work on the tasks; without any, on some of held-out phrasings, whose right answers are known. `make`
teaches such a specialist from the bundled demo model, packs it to signs, and measures exact match of its tool calls
before and after (`hf_qep_eval.json`). `rows` writes the requests of held-out phrasings that are bundled.

The specialist knows four tools, some dozens of cities and names, and numbers of up to three digits; nothing else.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from agent.play import play
from agent.requests import Row, call_rows
from agent.server import served
from libraries import silence

from hf_qep.errors import CheckpointError, QepError
from hf_qep.extras import require
from hf_qep.files import write_text_aside
from hf_qep.progress import Progress

BUNDLED = Path(__file__).resolve().parent / "agent" / "packed"
ROWS, ROWS_SEED = 64, 1
SHOWN, SHOWN_SEED = 6, 12
"""Tasks without words of the user: how many, and what draws them."""


def ask(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Serve the model and let the agent work. Raises QepError."""
    for package in ("smolagents", "openai"):
        require("agent", package)
    if not (args.model / "config.json").is_file():
        raise CheckpointError(f"no model lies in {args.model.name!r}; make one with: demo_agent.py make --out FOLDER")
    tasks: list[tuple[str, Row | None]] = [(task, None) for task in args.task]
    if not tasks:
        drawn = call_rows(args.count, held_out=True, seed=SHOWN_SEED)
        tasks = [(row["messages"][0]["content"], row["expected"][0]) for row in drawn]
    with served(args.model.resolve()) as url:
        rows = play(url, str(args.model.resolve()), tasks, progress)
    known = [row["right"] for row in rows if row["right"] is not None]
    right = {"right": sum(known), "of": len(known)} if known else {}
    return {"model": args.model.name, "tasks": rows, **right, "record": _record_of(args.model)}


def _record_of(model: Path) -> dict[str, Any] | None:
    """Exact match of tool calls in the model's evaluation record: {float, packed, n}; None without one."""
    from hf_qep.evaluation.record import FILE_NAME, EvalRecord

    if not (model / FILE_NAME).exists():
        return None
    tasks = [task for task in EvalRecord.read(model).tasks if task.form == "tool_calls"]
    if not tasks:
        return None
    exact = tasks[0].metrics[0]
    return {"original": exact.baseline.value, "packed": exact.subject.value, "n": exact.subject.n}


def make(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Teach, pack and measure a specialist. Raises QepError."""
    from agent.specialist import PRESETS, make_specialist

    return make_specialist(args.out, PRESETS[args.preset], progress)


def rows(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Write the bundled requests."""
    lines = [json.dumps(row) for row in call_rows(args.count, held_out=True, seed=ROWS_SEED)]
    write_text_aside(args.out, "\n".join(lines) + "\n")
    return {"rows": len(lines), "file": args.out.name}


def _parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("ask", help="serve the specialist and let an agent work on tasks")
    asking.add_argument("task", nargs="*", help="requests; left out: some whose answers are known")
    asking.add_argument("--count", type=int, default=SHOWN, help="tasks to draw where none is given")
    asking.add_argument("--model", type=Path, default=BUNDLED, help="folder of a specialist")
    making = commands.add_parser("make", help="teach, pack and measure a specialist")
    making.add_argument("--out", type=Path, required=True, help="folder for both models")
    making.add_argument("--preset", default="full", choices=("full", "quick"), help="quick shows that everything runs")
    writing = commands.add_parser("rows", help="write the bundled requests")
    writing.add_argument("--out", type=Path, required=True, help="JSON lines")
    writing.add_argument("--count", type=int, default=ROWS, help="number of requests")
    for command in (asking, making, writing):
        command.add_argument("--json", action="store_true", help="print the outcome as JSON")
        command.add_argument("--quiet", action="store_true", help="no progress, no table")
    return parser.parse_args(words)


def _show(outcome: dict[str, Any]) -> None:
    for row in outcome.pop("tasks", []):
        print(row["task"])
        for call in row["calls"]:
            given = ", ".join(f"{key}={value!r}" for key, value in (call["arguments"] or {}).items())
            print(f"  {call['name']}({given}) -> {call['result']}")
        mark = {True: " (right)", False: " (wrong)", None: ""}[row["right"]]
        print(f"  {row['error'] or row['answer']}{mark}, {row['seconds']:.1f} s")
    for key, value in outcome.items():
        print(f"{key}: {value}")


def main(words: list[str] | None = None) -> int:
    """Run one command; 0 done, rightly or wrongly, 2 if it cannot be done."""
    args = _parsed(words)
    silence()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with this program
    try:
        outcome = {"ask": ask, "make": make, "rows": rows}[args.command](args, Progress(args.quiet or args.json))
    except QepError as error:
        print(
            json.dumps({"error": str(error)}) if args.json else f"Error: {error}",
            file=None if args.json else sys.stderr,
        )
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.json:
        print(json.dumps(outcome, indent=1))
    elif not args.quiet:
        _show(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
