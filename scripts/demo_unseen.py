"""Better recognition of objects never seen: students that keep their teacher's space against those that learn classes.

    python scripts/demo_unseen.py --work runs/unseen --data ../shared/data
    python scripts/demo_unseen.py --work runs/unseen-quick --preset quick
    python scripts/demo_unseen.py --work runs/unseen --fetch   (without a folder of data: it is fetched)

A teacher learns to tell handwritten characters apart, students of the same latency are distilled from it on two
alphabets, Greek and Latin, and all are asked to recognise characters of other alphabets from one drawing each. With
CIFAR-10 classes are held out as further evidence, and a detector finds and names characters that it never saw. A run
that was stopped goes on where it was. In the folder: results.json, report.md, a plot per task, per task the teacher and
our student, and in space/ our student of the characters as it can be published, with its record and its card.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from libraries import silence
from unseen import show
from unseen.detection import PART as DETECTION
from unseen.detection import detect
from unseen.fetch import fetch_omniglot, fetch_photos
from unseen.offer import offer
from unseen.outcome import summary
from unseen.pipeline import Job, run_task
from unseen.presets import PRESETS, Preset

from hf_qep.errors import QepError
from hf_qep.files import write_text_aside
from hf_qep.progress import Progress

TASKS = ("omniglot", "cifar")
PARTS = (*TASKS, DETECTION)
PAGE = Path(__file__).resolve().parent / "unseen" / "README.md"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, write what they found, and return it."""
    silence()
    preset = PRESETS[arguments.preset]()
    data = folder_of_data(arguments, preset)
    progress, found = Progress(arguments.quiet or arguments.json), {}
    for part in arguments.parts or parts_of(preset):
        began = time.monotonic()
        say(arguments, f"{part} ...")
        found[part], text = run_part(part, arguments, preset, data, progress)
        write_text_aside(arguments.work / f"{part}.md", text)
        say(arguments, f"{text}\n{part}: {time.monotonic() - began:.0f} s")
        if arguments.page:
            show.insert(PAGE, part if preset.name == "default" else f"{part}-{preset.name}", text)
    whole = {"preset": preset.to_dict(), "machine": machine(), "parts": found}
    write_text_aside(arguments.work / "results.json", json.dumps(whole, indent=1) + "\n")
    write_text_aside(arguments.work / "report.md", "\n".join(report(arguments.work, list(found))))
    return whole


def run_part(
    part: str, arguments: argparse.Namespace, preset: Preset, data: Path | None, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Results of one part as a JSON value, and what to show of them. Detection goes on from Omniglot's teacher."""
    task = part if part in TASKS else TASKS[0]
    job = Job(task, preset, data, arguments.work / task)
    if part == DETECTION:
        return detect(job, arguments.work / part, workers=arguments.workers, progress=progress)
    results = run_task(job, workers=arguments.workers, progress=progress)
    results["summary"] = summary(results)
    show.draw(results, results["summary"], arguments.work / f"{part}.svg")
    if part == TASKS[0]:
        offer(job, results, arguments.work / "space", progress=progress)
    return results, show.table(results, results["summary"])


def parts_of(preset: Preset) -> tuple[str, ...]:
    """The parts that a preset has."""
    return tuple(part for part in PARTS if part != "cifar" or preset.cifar is not None)


def folder_of_data(arguments: argparse.Namespace, preset: Preset) -> Path | None:
    """Where the data lies, fetched if that is wanted; None where all is invented."""
    if preset.invented:
        return None
    if arguments.fetch:
        data = arguments.data or arguments.work / "data"
        fetch_omniglot(data)
        if preset.cifar is not None:
            fetch_photos(data)
        return data
    default = Path(os.environ["HF_QEP_DATA"]) if "HF_QEP_DATA" in os.environ else SHARED
    return arguments.data or (default if default.is_dir() else None)


def report(work: Path, parts: list[str]) -> list[str]:
    """Lines of report.md."""
    lines = []
    for part in parts:
        lines += [f"## {part}", "", (work / f"{part}.md").read_text(encoding="utf-8")]
        lines += [f"![{part}]({part}.svg)", ""] if (work / f"{part}.svg").exists() else []
    return lines


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    return {
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def say(arguments: argparse.Namespace, text: str) -> None:
    """To people, unless they asked for silence or for JSON."""
    if not (arguments.quiet or arguments.json):
        print(text, file=sys.stderr, flush=True)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--data", type=Path, help="folder of data; else HF_QEP_DATA, else ../shared/data")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all by default; detection needs omniglot's teacher")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--fetch", action="store_true", help="fetch what is missing in the folder of data")
    parser.add_argument("--page", action="store_true", help="also write the tables into the page of the demonstration")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    parser.add_argument("--json", action="store_true", help="print results.json and nothing else")
    return parser.parse_args(words)


if __name__ == "__main__":
    asked = parsed()
    try:
        everything = main(asked)
    except QepError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    if asked.json:
        print(json.dumps(everything))
