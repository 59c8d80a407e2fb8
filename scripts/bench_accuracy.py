"""What quantisation costs, ours beside the baselines and OneComp: same model, calibration tokens and held-out text.

    python scripts/bench_accuracy.py --model hf_qep/demo_model --seeds 0,1,2 --results results.jsonl
    python scripts/bench_accuracy.py --model MODEL --dataset train.jsonl --text held.jsonl --cloze held.jsonl \\
        --peer-python onecomp-venv/bin/python --results results.jsonl
    python scripts/bench_accuracy.py --model MODEL --ablation tuning --results results.jsonl
    python scripts/bench_accuracy.py --results results.jsonl --table

Every row is measured in a process of its own and appended to the results file; what is in the file is not measured
again, so an interrupted run goes on where it stopped. `peer_onecomp.py` says how to make OneComp's environment.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accuracy_row import Row, Setting, key_of
from accuracy_table import print_tables

ROW_SCRIPT = Path(__file__).with_name("accuracy_row.py")

PRESETS: dict[str, dict[str, Any]] = {
    effort: {"method": "auto", "effort": effort} for effort in ("fast", "balanced", "best")
}
"""Ours, at any number of bits. All rows have the calibration tokens of --num-samples, whatever an effort would take."""

ANY_SIZE: dict[str, dict[str, Any]] = {"admm": {"method": "factored", "propagation": 0.0}}
"""Baselines that take any number of bits: two sign matrices by ADMM, without propagation and without tuning."""

ONE_SIZE: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "propagation": 0.0},
    "onebit": {"method": "onebit", "propagation": 0.0},
    "gptq + propagation": {"method": "gptq"},
    "onebit + propagation": {"method": "onebit"},
    "sign": {"method": "sign"},
}
"""Baselines with one sign per weight; their bits are 1 and what the scales take."""

PEER_ANY_SIZE = ("dbf", "dbf-unbalanced", "mdbf", "mdbf-aware")
PEER_ONE_SIZE = ("onebit", "onebit-unbalanced", "jointq1", "jointq2")
PEER_WITHOUT_QEP = ("jointq1", "jointq2")
PEER_TRAINED = (("onebit-unbalanced", "blockwise"), ("dbf-unbalanced", "blockwise"), ("dbf-unbalanced", "global"))
"""OneComp's solvers that its own training after the solver can start from, with that training."""

TRAINING: dict[str, dict[str, Any]] = {
    "solved": {},
    "blocks tuned": {"tune_epochs": 4},
    "distilled": {"distill_epochs": 8},
}
"""What follows the solver."""

ABLATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "tuning": [
        (f"{solver}, {'QEP' if alpha else 'no QEP'}, {how}", {"method": solver, "propagation": alpha, **training})
        for solver in ("sign", "factored")
        for alpha in (0.0, 1.0)
        for how, training in TRAINING.items()
    ],
    "allocation": [
        (f"{method}, {how}", {"method": method, **training})
        for method in ("factored", "auto")
        for how, training in TRAINING.items()
    ],
    "qqa": [
        (f"{method}, {how}", {"method": method, **training})
        for method in ("sign", "qqa")
        for how, training in TRAINING.items()
    ],
}  # fmt: skip
"""Name -> (label, recipe). `tokens` and `text` change the calibration instead and are made in `ablation_rows`."""


def comparison_rows(bits: list[float], groups: list[str]) -> Iterator[Row]:
    """Rows of the main table, seeds apart, the quickest first."""
    if "baselines" in groups:
        yield from (Row(name, "baselines", 1.0, 0, recipe) for name, recipe in ONE_SIZE.items())
    if "peer" in groups:
        for name in PEER_ONE_SIZE:
            yield from (peer_row(name, 1.0, qep) for qep in (False, True) if not qep or name not in PEER_WITHOUT_QEP)
        yield from (peer_row(name, 1.0, True, post) for name, post in PEER_TRAINED if name in PEER_ONE_SIZE)
    for b in bits:
        if "baselines" in groups:
            yield from (Row(name, "baselines", b, 0, {**recipe, "bits": b}) for name, recipe in ANY_SIZE.items())
        if "peer" in groups:
            for name in PEER_ANY_SIZE:
                yield from (peer_row(name, b, qep) for qep in (False, True))
            yield from (peer_row(name, b, True, post) for name, post in PEER_TRAINED if name in PEER_ANY_SIZE)
        if "ours" in groups:
            yield from (Row(name, "ours", b, 0, {**recipe, "bits": b}) for name, recipe in PRESETS.items())


def peer_row(method: str, bits: float, qep: bool, post: str | None = None) -> Row:
    """A row of OneComp."""
    label = " + ".join([f"OneComp {method}", *(["QEP"] if qep else []), *([post] if post else [])])
    recipe = {"method": method, "qep": qep} | ({"post": post} if post else {})
    return Row(label, "peer", bits, 0, recipe, peer=True)


def ablation_rows(name: str, bits: list[float], setting: Setting, text_kinds: dict[str, str | None]) -> Iterator[Row]:
    """Rows of one ablation, seeds apart. `tokens` counts down from all calibration rows to 1/4 and 1/16."""
    if name == "tokens":
        for times in (1, 4, 16):
            few = {"num_samples": max(1, setting.num_samples * times // 16)}
            for how, training in TRAINING.items():
                yield Row(f"x{times}, {how}", name, 1.0, 0, {"method": "sign", **training}, setting=few)
    elif name == "text":
        for kind, dataset in text_kinds.items():
            for how, training in TRAINING.items():
                recipe = {"method": "sign", **training}
                yield Row(f"{kind}, {how}", name, 1.0, 0, recipe, setting={"dataset": dataset})
    else:
        for label, recipe in ABLATIONS[name]:
            sizes = [1.0] if recipe["method"] in ("sign", "qqa") else bits
            yield from (Row(label, name, b, 0, {**recipe, "bits": b}) for b in sizes)


def with_seeds(rows: list[Row], seeds: list[int]) -> list[Row]:
    """Every row at every seed, all of one seed first; the cloze items are answered at the first seed only."""
    return [
        Row(**{**asdict(row), "seed": seed, "cloze": seed == seeds[0] and row.group in ("ours", "baselines", "peer")})
        for seed in seeds
        for row in rows
    ]


def carry_out(
    setting: Setting, rows: list[Row], results: Path, work: Path, peer_python: str | None, seconds: float = math.inf
) -> int:
    """Measure what the results file lacks; returns how many rows failed. No row is begun after `seconds`."""
    work.mkdir(parents=True, exist_ok=True)
    began, failed, known = time.monotonic(), 0, {line["key"] for line in read_results(results)}
    for number, row in enumerate(rows, 1):
        key = key_of(setting, row)
        if key in known:
            continue
        if time.monotonic() - began > seconds:
            print("out of time; the same command goes on from here")
            break
        print(f"[{number}/{len(rows)}] {setting.name}: {row.label}, {row.bits:g} bits, seed {row.seed}", flush=True)
        found = run_row(setting, row, work, peer_python)
        failed += found["status"] != "ok"
        print(f"    {summary(found)}", flush=True)
        line = {"key": key, "model": setting.name, **asdict(row), "calibration": calibration_of(setting), **found}
        line["cloze"] = found.get("cloze")  # the score, not whether it was asked for
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return failed


def run_row(setting: Setting, row: Row, work: Path, peer_python: str | None) -> dict[str, Any]:
    """Measure one row in a process of its own; a row that fails says why."""
    order, result = work / f"order-{key_of(setting, row)}.json", work / f"result-{key_of(setting, row)}.json"
    spec = {"setting": asdict(setting), "row": asdict(row), "work": str(work), "peer_python": peer_python}
    order.write_text(json.dumps(spec), encoding="utf-8")
    try:
        done = subprocess.run([sys.executable, ROW_SCRIPT, order, result], capture_output=True, text=True)
        if done.returncode == 0:
            return {"status": "ok", **json.loads(result.read_text(encoding="utf-8"))}
        said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {"status": "failed", "reason": (said or done.stderr.splitlines() or ["killed"])[0][:500]}
    finally:
        order.unlink()
        result.unlink(missing_ok=True)


def calibration_of(setting: Setting) -> dict[str, Any]:
    """What the table says about the calibration."""
    name = "self" if setting.dataset is None else re.sub(r"[^,*]*/", "", setting.dataset)
    return {"dataset": name, "num_samples": setting.num_samples, "seq_len": setting.seq_len}


def summary(found: dict[str, Any]) -> str:
    """A row in one line, for the one who waits."""
    if found["status"] != "ok":
        return found["reason"]
    distance = found.get("kl") or found["cosine_distance"]
    cloze = f", cloze {found['cloze']['quantized']['value']:.3f}" if found["cloze"] else ""
    return f"{found['bits_linear']:.3f} bits, distance {distance['value']:.4g}{cloze}, {found['seconds']:.0f} s"


def read_results(file: Path) -> list[dict[str, Any]]:
    """Lines of a results file; none if it is not there yet. A last line that was cut off is left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, required=True, help="jsonl file to append to, or to print from")
    add("--table", action="store_true", help="print the results as Markdown and measure nothing")
    add("--model", help="folder or Hub id of the float model")
    add("--name", help="of the model, in the table; left out: the last part of --model")
    add("--dataset", help="calibration text; left out: the model writes its own")
    add("--num-samples", type=int, default=128)
    add("--seq-len", type=int, default=256)
    add("--text", help="held-out text; left out: the bundled tales")
    add("--window", type=int, help="tokens per window of that text")
    add("--max-tokens", type=int, help="score no more of that text")
    add("--cloze", help="task file, or held-out text to make cloze items of")
    add("--cloze-items", type=int, default=2000)
    add("--bits", default="1.1,1.5,2.0", help="limits of stored bits per weight")
    add("--seeds", default="0", help="of calibration and solvers; the cloze items are answered at the first")
    add("--rows", default="baselines,peer,ours", help="groups of rows")
    add("--only", default="", help="regular expression that the label of a row must match")
    add("--ablation", choices=[*ABLATIONS, "tokens", "text"], help="instead of the comparison")
    add("--text-kinds", default="self=self", help="for the ablation `text`: NAME=SPEC;NAME=SPEC")
    add("--peer-python", help="interpreter of OneComp's environment; left out: no rows of OneComp")
    add("--minutes", type=float, default=math.inf, help="begin no row after so many")
    add("--device", default="cpu", help="for ours and the measurements; OneComp runs on the processor")
    add("--work", type=Path, help="folder for tokens and answers that rows share; left out: beside --results")
    return parser.parse_args(words)


def main() -> None:
    """Measure or print."""
    args = parse()
    if args.table:
        print_tables(read_results(args.results))
        return
    if args.model is None:
        sys.exit("bench_accuracy.py needs --model to measure, or --table to print")
    shared = ("dataset", "num_samples", "seq_len", "text", "window", "max_tokens", "cloze", "cloze_items", "device")
    name = args.name or Path(args.model).name
    setting = Setting(name=name, model=args.model, **{field: getattr(args, field) for field in shared})
    bits = [float(word) for word in args.bits.split(",")]
    kinds = {k: None if v == "self" else v for k, _, v in (pair.partition("=") for pair in args.text_kinds.split(";"))}
    groups = [group for group in args.rows.split(",") if group != "peer" or args.peer_python]
    rows = list(ablation_rows(args.ablation, bits, setting, kinds) if args.ablation else comparison_rows(bits, groups))
    rows = with_seeds([r for r in rows if re.search(args.only, r.label)], [int(s) for s in args.seeds.split(",")])
    work = args.work or args.results.with_suffix(".work")
    sys.exit(1 if carry_out(setting, rows, args.results, work, args.peer_python, 60 * args.minutes) else 0)


if __name__ == "__main__":
    main()
