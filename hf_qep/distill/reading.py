"""Files and data sets of the Hub, read into the rows of a task.

Columns are called as elsewhere in the ecosystem: `prompt` and `completion` for a language model, `text` and `label`,
`image` and `label`, `image` and `objects` (`bbox` as x, y, width, height in pixels, `category`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, IGNORED, TEXT_CLASSES, TaskData
from hf_qep.errors import ConfigError
from hf_qep.extras import require

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
DATA_HINT = "a jsonl, csv or parquet file, a folder of images by class, or a data set id:config:split"


@dataclass(frozen=True)
class Columns:
    """Where things stand in a row. template: text with {column} in the place of columns, instead of the column `text`
    or `prompt`. label: the right class, or the completion of a language model."""

    text: str | None = None
    template: str | None = None
    label: str | None = None
    image: str = "image"
    objects: str = "objects"


def read_rows(source: str, limit: int | None = None, seed: int = 0) -> Any:
    """The `datasets.Dataset` of a file, a folder of images or a data set of the Hub; `limit` rows, drawn at random.

    Raises ConfigError where nothing can be read.
    """
    datasets = require("distill", "datasets")
    path = Path(source)
    try:
        if path.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
        elif path.is_file():
            if path.suffix not in BUILDERS:
                raise ConfigError(f"{path.name!r} cannot be read as rows; give {DATA_HINT}")
            rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
        else:
            name, _, rest = source.partition(":")
            config, _, split = rest.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split or "train")
    except ConfigError:
        raise
    except Exception as error:  # the library raises its own, the Hub's and those of every parser
        raise ConfigError(f"no rows could be read from {source!r} ({error}); give {DATA_HINT}") from error
    if not len(rows):
        raise ConfigError(f"{source!r} has no rows")
    if limit is not None and limit < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        rows = rows.select(chosen.tolist())
    return rows


def read_task(
    source: str,
    task: str,
    processor: Any,
    *,
    columns: Columns | None = None,
    classes: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    max_length: int = 512,
    limit: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Rows of a task as tensors.

    processor: the teacher's tokenizer or image processor. classes: names in the order of the model's outputs; default:
    as the data set declares them, else in alphabetical order. answers: completions of a language model that are its
    classes; each must begin with a token of its own. max_length: tokens per row; longer prompts lose their beginning.
    Raises ConfigError for columns or labels that are missing, and answers that cannot be told apart.
    """
    rows = read_rows(source, limit, seed)
    columns = columns or Columns()
    if task == CAUSAL_LM:
        return _completions(rows, processor, columns, answers, max_length)
    if answers is not None:
        raise ConfigError(f"answers belong to {CAUSAL_LM}; {task} has classes")
    if task == DETECTION:
        return _detection(rows, processor, columns, classes)
    if task == TEXT_CLASSES:
        texts = _texts(rows, columns, "text")
        encoded = processor(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        inputs = {name: encoded[name] for name in processor.model_input_names if name in encoded}
    else:
        inputs = {"pixel_values": _pixels(rows, processor, columns)}
    column = columns.label or "label"
    if task == EMBEDDING and column not in rows.column_names:
        return TaskData(task, inputs)
    names = tuple(classes or _class_names(rows, column))
    return TaskData(task, inputs, _class_numbers(rows, column, names), names)


def _texts(rows: Any, columns: Columns, default: str) -> list[str]:
    if columns.template is None:
        return [str(text) for text in _column(rows, columns.text or default)]
    try:
        return [columns.template.format(**row) for row in rows]
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"the template asks for {error}, and the columns are {', '.join(rows.column_names)}"
        ) from error


def _column(rows: Any, name: str) -> list[Any]:
    if name not in rows.column_names:
        raise ConfigError(f"there is no column `{name}`; the columns are {', '.join(rows.column_names)}")
    return list(rows[name])


def _completions(
    rows: Any, tokenizer: Any, columns: Columns, answers: Sequence[str] | None, max_length: int
) -> TaskData:
    """Prompts with their completions; only the completion is an answer."""
    prompts = _texts(rows, columns, "prompt")
    label = columns.label or "completion"
    completions = [str(text) for text in _class_texts(rows, label)]
    known = None if answers is None else answer_tokens(tokenizer, answers)
    if answers is not None and (strange := set(completions) - set(answers)):
        raise ConfigError(f"the column `{label}` says {sorted(strange)[0]!r}, which is none of {', '.join(answers)}")
    ids, labels = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        head = tokenizer(prompt)["input_ids"]
        if known is not None:
            tail = [known[answers.index(completion)]]
        else:
            tail = tokenizer(completion, add_special_tokens=False)["input_ids"]
            tail += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tail = tail[: max_length - 1]
        head = head[-(max_length - len(tail)) :]
        ids.append(head + tail)
        labels.append([IGNORED] * len(head) + tail)
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    inputs = {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }
    padded = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
    return TaskData(CAUSAL_LM, inputs, padded, None if answers is None else tuple(answers), known)


def answer_tokens(tokenizer: Any, answers: Sequence[str]) -> tuple[int, ...]:
    """First token of each answer as it follows a prompt. Raises ConfigError where two answers begin with the same."""
    ids = []
    for answer in answers:
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ConfigError(f"the answer {answer!r} has no tokens")
        ids.append(tokens[0])
    if len(set(ids)) < len(ids):
        twins = next((a, b) for i, a in enumerate(answers) for j, b in enumerate(answers[:i]) if ids[i] == ids[j])
        raise ConfigError(f"the answers {twins[1]!r} and {twins[0]!r} begin with the same token; choose other words")
    return tuple(ids)


def _class_texts(rows: Any, column: str) -> list[Any]:
    """Values of a column, class numbers as names where the data set declares them."""
    values, feature = _column(rows, column), rows.features[column]
    return [feature.int2str(v) for v in values] if hasattr(feature, "int2str") else values


def _class_names(rows: Any, column: str) -> tuple[str, ...]:
    feature = rows.features.get(column)
    if getattr(feature, "names", None):
        return tuple(feature.names)
    values = set(_column(rows, column))
    if all(isinstance(v, int) for v in values):
        return tuple(str(v) for v in range(max(values) + 1))
    return tuple(sorted(str(v) for v in values))


def _class_numbers(rows: Any, column: str, names: Sequence[str]) -> torch.Tensor:
    numbers = []
    for value in _class_texts(rows, column):
        number = names.index(value) if value in names else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise ConfigError(f"the label {value!r} is none of the {len(names)} classes {', '.join(names[:10])}")
        numbers.append(number)
    return torch.tensor(numbers)


def _images(rows: Any, columns: Columns) -> list[Any]:
    image = require("distill", "PIL.Image")
    found = []
    for value in _column(rows, columns.image):
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            value = io.BytesIO(value)
        found.append((value if hasattr(value, "convert") else image.open(value)).convert("RGB"))
    return found


def _pixels(rows: Any, processor: Any, columns: Columns) -> torch.Tensor:
    return processor(_images(rows, columns), return_tensors="pt")["pixel_values"]


def _detection(rows: Any, processor: Any, columns: Columns, classes: Sequence[str] | None) -> TaskData:
    images = _images(rows, columns)
    notes = [_coco(n, objects) for n, objects in enumerate(_column(rows, columns.objects))]
    encoded = processor(images, annotations=notes, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("pixel_values", "pixel_mask") if name in encoded}
    labels = [{name: row[name] for name in ("class_labels", "boxes")} for row in encoded["labels"]]
    return TaskData(DETECTION, inputs, labels, None if classes is None else tuple(classes))


def _coco(number: int, objects: dict[str, Any]) -> dict[str, Any]:
    """Annotations of one image as image processors take them."""
    pairs = zip(objects["category"], objects["bbox"], strict=True)
    boxes = [
        {"image_id": number, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for category, box in pairs
    ]
    return {"image_id": number, "annotations": boxes}
