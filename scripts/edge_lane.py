"""A process with one model of transformers that answers `bench_edge.py` line by line; see `speed_models.py` for times.

python scripts/edge_lane.py FOLDER [--activation int8] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
import transformers as tf
from speed_models import generate, quiet, set_activation

import hf_qep  # noqa: F401, registers the method


def answer(model: Any, threads: int, ids: list[int], new: int) -> dict[str, Any]:
    """Times of the ids and of `new` further tokens."""
    torch.set_num_threads(threads)
    return generate(model, torch.tensor([ids]), new)


def main() -> None:
    """Load, say so, and answer lines until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--activation", choices=["exact", "int8"])
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("verb") == "load":
            with quiet():
                model = tf.AutoModelForCausalLM.from_pretrained(args.folder, dtype=args.dtype).eval()
            set_activation(model, args.activation)
            found: dict[str, Any] = {}
        else:
            with torch.inference_mode():
                found = answer(model, **request)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
