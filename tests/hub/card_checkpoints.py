"""A checkpoint whose record holds all that a card can show, and a way to find every number of a card again."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.retention import retention
from hf_qep.evaluation.schema import to_json
from hf_qep.files import bundled
from hf_qep.hub.cards.distilled import unsealed
from hf_qep.hub.cards.facts import CardFacts
from hf_qep.hub.cards.numbers import derived
from hf_qep.hub.cards.tables import family_bits, family_error

RECORD, SAMPLES, MANIFEST = "hf_qep_eval.json", "hf_qep_samples.json", "hf_qep_manifest.json"


def edit(folder: Path, name: str, change: Any) -> None:
    """Change a JSON file through `change(values)`."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def task(name: str, theirs: float, ours: float, chance: float | None, *, n: int = 400, **more: Any) -> dict[str, Any]:
    """A task result as a record holds it."""
    scores = [Estimate(x, math.sqrt(x * (1 - x) / n), n) for x in (theirs, ours)]
    metric = {
        "name": "acc",
        "baseline": to_json(scores[0]),
        "subject": to_json(scores[1]),
        "retention": to_json(retention(*scores, chance)),
    }
    return {
        "name": name, "prompt": f"own:{name}", "form": "cloze", "num_fewshot": 0, "items": n, "available": n, "seed": 0,
        "chance": chance, "majority": None, "metrics": [metric], "note": None, **more,
    }  # fmt: skip


def enrich(folder: Path) -> Path:
    """Add tasks, speed and peak memory to the record."""

    def change(record: dict[str, Any]) -> None:
        record["tasks"] = [task("reading", 0.812, 0.733, 0.25), task("guessing", 0.641, 0.262, 0.25)]
        for who, rate in (("baseline", 91.37), ("subject", 61.93)):
            record["cost"][who]["peak_bytes"] = int(rate * 1e5)
            record["cost"][who]["speed"] = {
                "prefill": {"value": rate * 11, "stderr": rate / 20, "n": 3},
                "decode": {"value": rate, "stderr": rate / 50, "n": 3},
                "prompt_tokens": 64,
                "new_tokens": 32,
            }
        record["environment"]["accelerator"] = "Test Accelerator"

    edit(folder, RECORD, change)
    return folder


def leaves(value: Any) -> Iterator[Any]:
    """All keys and scalars of a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])")


def numbers_in(text: str) -> list[str]:
    """Numbers as they are written; those inside of words are none."""
    return [found.strip(",") for found in NUMBER.findall(text)]


def unexplained_numbers(card: str, facts: CardFacts, folder: Path) -> list[str]:
    """Numbers of a card that are neither in the files nor follow from them by a formula of `cards/numbers.py`."""
    sources = [
        json.loads((folder / name).read_text()) for name in (RECORD, SAMPLES, MANIFEST) if (folder / name).is_file()
    ]
    values = [leaf for source in sources for leaf in leaves(source)]
    values += [file.size for file in facts.files] + [facts.file_bytes, facts.float_bytes]
    values += list(leaves(to_json(facts.baselines)))
    known = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    known += [float(v) for v in derived(facts).values() if v is not None]
    families: dict[str, list[Any]] = {}
    for layer in facts.made.layers:
        families.setdefault(layer.family, []).append(layer)
        known.append(layer.bits)
    for members in families.values():
        known += [family_bits(members), float(len(members)), family_error(members) or 0.0]
    known += [100 * v for v in known] + [v / (1 << shift) for v in known for shift in (10, 20, 30)]
    known += [float(i + 1) for i in range(len(facts.samples.items) if facts.samples else 0)]
    texts = [v for v in values if isinstance(v, str)] + [f.sha256 for f in facts.files] + [facts.path, facts.title]
    texts.append(facts.record.created[:10])
    words = {number for text in texts for number in numbers_in(text)}
    words |= {number for path in bundled("model_cards").rglob("*.jinja") for number in numbers_in(path.read_text())}
    words |= {"0", "1"}  # "0: identical" and "1 - cosine" name measurements
    body = re.sub(r"<!--.*?-->\s*\Z", "", card, flags=re.DOTALL)
    return [number for number in numbers_in(body) if number not in words and not is_among(number, known)]


def unexplained_of_student(card: str, facts: dict[str, Any]) -> list[str]:
    """Numbers of a student's card that are not among the fields of `StudentFacts`, nor a ratio of sizes that it states,
    nor words of a template."""
    values = list(leaves(facts))
    known = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    ratios = [facts["teacher"][key] / facts["student"][key] for key in ("bytes", "parameters")]
    known += [100 * v for v in known] + [v / (1 << shift) for v in known for shift in (10, 20, 30)] + ratios
    texts = [v for v in values if isinstance(v, str)]
    texts += [path.read_text() for path in bundled("model_cards").rglob("*student*.jinja")]
    words = {number for text in texts for number in numbers_in(text)}
    return [number for number in numbers_in(unsealed(card)) if number not in words and not is_among(number, known)]


def is_among(number: str, known: list[float]) -> bool:
    """Whether a number as it is written is one of `known`, rounded."""
    plain = number.replace(",", "")
    decimals = len(plain.partition(".")[2])
    half = 0.5 * 10**-decimals
    return any(abs(value - float(plain)) <= half * (1 + 1e-6) for value in known)


def student() -> dict[str, Any]:
    """Facts of a student that does not exist."""
    some = {"value": 0.83, "stderr": 0.02, "n": 350}
    taught = {"value": 0.79, "stderr": 0.021, "n": 350}
    model = {"name": "acme/large", "revision": "a" * 40, "parameters": 7_000_000, "bytes": 14_000_000, "licence": "mit"}
    start = model | {"name": "acme/small", "revision": None, "parameters": 700_000, "bytes": 1_400_000}
    kept = to_json(retention(Estimate(**some), Estimate(**taught), 0.5))
    return copy.deepcopy(
        {
            "name": "tiny-sorter", "made_by": "alice", "pipeline_tag": "text-classification",
            "auto_class": "AutoModelForSequenceClassification", "specialised_for": "sorting letters to a newspaper",
            "not_for": "anything that is no letter", "teacher": model, "start": start,
            "student": start | {"name": "tiny-sorter"},
            "transfer": [{"name": "acme/letters", "examples": 9000, "labels": "the teacher's probabilities"}],
            "tasks": [{"name": "letters", "metric": "accuracy", "chance": 0.5, "teacher": some, "start": None,
                       "student": taught, "retention": kept}],
            "others": [{"name": "labels only", "score": {"value": 0.71, "stderr": 0.024, "n": 350}}],
            "changes": {"layers removed": "2, 3", "feed-forward units": "3072 before, 800 now"},
            "latency_ms": {"teacher": 41.5, "student": 3.25},
            "command": "hf-qep distill acme/large", "seed": 3, "seconds": 812.5, "versions": {"torch": "2.13.0"},
            "languages": ["en"],
        }
    )  # fmt: skip
