"""Markdown tables of `hf-qep compare --json` outputs, every recipe beside its distance to the others.

hf-qep compare hf_qep/demo_model --methods rtn,gptq,onebit,sign --propagation 0,0.5,1 --json > demo.json
python scripts/method_table.py demo.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LANGUAGE = {"kl": "KL", "top1_agreement": "top-1", "perplexity": "perplexity"}
ENCODER = {"cosine_distance": "1 - cosine", "neighbour_overlap": "neighbours"}


def main() -> None:
    """One table per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="outputs of `hf-qep compare --json`")
    for path in parser.parse_args().files:
        print("\n".join(table(json.loads(path.read_text(encoding="utf-8")))), end="\n\n")


def table(found: dict[str, Any]) -> list[str]:
    """Lines of one table; the first measurement is the one to compare by, with its standard error."""
    rows = [row for row in found["rows"] if row["status"] == "ok"]
    names = LANGUAGE if rows[0]["kl"] else ENCODER
    columns = ["method", "group", "QEP", "damping", "tuned", "distilled", "bits, linears", *names.values()]
    tokens = next(row[next(iter(names))]["n"] for row in rows)
    title = f"{Path(found['model']).name}, {tokens} {'tokens' if rows[0]['kl'] else 'sentences'} of {found['text']}"
    if rows[0]["float_perplexity"]:
        title += f", float perplexity {rows[0]['float_perplexity']['value']:.4g}"
    lines = [title, "", f"| {' | '.join(columns)} |", "|---" * 2 + "|--:" * (len(columns) - 2) + "|"]
    for row in rows:
        recipe = [row["method"], str(row["group_size"] or "row"), f"{row['propagation']:g}", f"{row['damping']:g}"]
        recipe += [str(row.get(name) or 0) for name in ("tune_epochs", "distill_epochs")]
        measured = [shown(row[name], with_error=name in ("kl", "cosine_distance")) for name in names]
        lines.append(f"| {' | '.join([*recipe, format(row['bits_linear'], '.3f'), *measured])} |")
    return lines


def shown(value: dict[str, Any], *, with_error: bool) -> str:
    """A measurement with four digits and, if wanted, its standard error with one."""
    error = f" ± {value['stderr']:.1g}" if with_error and value["stderr"] is not None else ""
    return f"{value['value']:.4g}{error}"


if __name__ == "__main__":
    main()
