"""Files and data sets of the Hub, read into the rows of a task.

Columns are called as elsewhere in the ecosystem: `prompt` and `completion` for a language model, `text` and `label`,
`image` and `label`, `image` and `objects` (`bbox` as x, y, width, height in pixels, `category`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_qep.distill.pictures import detection, pixels
from hf_qep.distill.samples import CAUSAL_LM, DETECTION, EMBEDDING, IGNORED, TEXT_CLASSES, TaskData
from hf_qep.errors import ConfigError
from hf_qep.extras import require

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
DATA_HINT = "a jsonl, csv or parquet file, a folder of images by class, or a data set id:config:split"
MOST_CLASSES = 100_000
"""Numbers above this are no classes but ids of something."""


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
    if path.is_file() and path.suffix not in BUILDERS:
        raise ConfigError(f"{path.name!r} cannot be read as rows; give {DATA_HINT}")
    try:
        if path.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
        elif path.is_file():
            rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
        else:
            name, _, rest = source.partition(":")
            config, _, split = rest.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split or "train")
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
    as the data set declares them, else in alphabetical order, with a warning. answers: completions of a language model
    that are its classes; each must begin with a token of its own. max_length: tokens per row; longer prompts lose their
    beginning, longer completions and texts their end. Paths of images are relative to the file that names them. Raises
    ConfigError for columns or labels that are missing, values that are none, and answers that cannot be told apart.
    """
    if answers is not None and task != CAUSAL_LM:
        raise ConfigError(f"answers belong to {CAUSAL_LM}; {task} has classes")
    if max_length < 2:
        raise ConfigError(f"a row needs room for at least 2 tokens, not {max_length}")
    rows = read_rows(source, limit, seed)
    columns = columns or Columns()
    if task == CAUSAL_LM:
        return _completions(rows, processor, columns, answers, max_length)
    beside = Path(source).parent
    if task == DETECTION:
        names = classes or _class_names_of_objects(rows, columns.objects)
        images, objects = _column(rows, columns.image), _column(rows, columns.objects)
        return detection(images, objects, processor, beside, names)
    if task == TEXT_CLASSES:
        inputs = _encoded(_texts(rows, columns, "text"), processor, max_length)
    else:
        inputs = {"pixel_values": pixels(_column(rows, columns.image), processor, beside)}
    column = columns.label or "label"
    if task == EMBEDDING and column not in rows.column_names:
        return TaskData(task, inputs)
    values = _labels(rows, column)
    names = tuple(classes or _class_names(rows, column, values))
    return TaskData(task, inputs, _class_numbers(values, names), names)


def _encoded(texts: list[str], tokenizer: Any, max_length: int) -> dict[str, torch.Tensor]:
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "the teacher's tokenizer has no padding token; set its pad_token, and pad_token_id of the model"
        )
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}


def _texts(rows: Any, columns: Columns, default: str) -> list[str]:
    if columns.template is None:
        return [str(text) for text in _known(rows, columns.text or default)]
    try:
        return [columns.template.format(**row) for row in rows]
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the template asks for {error}, and the columns are {', '.join(rows.column_names)}"
        ) from error


def _column(rows: Any, name: str) -> list[Any]:
    if name not in rows.column_names:
        raise ConfigError(f"there is no column `{name}`; the columns are {', '.join(rows.column_names)}")
    feature = rows.features[name]
    if hasattr(feature, "decode_example") and hasattr(feature, "decode"):  # images are opened by `pictures`
        rows = rows.cast_column(name, type(feature)(decode=False))
    return list(rows[name])


def _known(rows: Any, name: str) -> list[Any]:
    """Values of a column that has one in every row."""
    values = _column(rows, name)
    if None in values:
        raise ConfigError(f"row {values.index(None)} has nothing in the column `{name}`; give it a value or remove it")
    return values


def _completions(
    rows: Any, tokenizer: Any, columns: Columns, answers: Sequence[str] | None, max_length: int
) -> TaskData:
    """Prompts with their completions; only the completion is an answer."""
    prompts = _texts(rows, columns, "prompt")
    label = columns.label or "completion"
    completions = [str(text) for text in _labels(rows, label)]
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


def _labels(rows: Any, column: str) -> list[Any]:
    """Labels, as names where the data set declares them, else as texts or whole numbers."""
    values, feature = _known(rows, column), rows.features[column]
    names = getattr(feature, "names", None)
    if names is None:
        return [int(v) if isinstance(v, bool | float) and float(v).is_integer() else v for v in values]
    return [names[v] if 0 <= v < len(names) else v for v in values]


def _class_names(rows: Any, column: str, values: Sequence[Any]) -> tuple[str, ...]:
    feature = rows.features[column]
    if getattr(feature, "names", None):
        return tuple(feature.names)
    if all(isinstance(v, int) for v in values):
        if max(values) > MOST_CLASSES:
            raise ConfigError(f"the label {max(values)} is no number of a class; give the names of the classes")
        return tuple(str(v) for v in range(max(values) + 1))
    names = tuple(sorted({str(v) for v in values}))
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    warnings.warn(
        f"the outputs of the teacher are taken for {shown}, in alphabetical order; if theirs is another, give the "
        "classes in it",
        stacklevel=2,
    )
    return names


def _class_names_of_objects(rows: Any, column: str) -> tuple[str, ...] | None:
    """Names of the categories, where the data set declares them."""
    feature = rows.features.get(column)
    inner = getattr(feature, "feature", feature)
    category = inner.get("category") if isinstance(inner, dict) else None
    found = getattr(getattr(category, "feature", category), "names", None)
    return tuple(found) if found else None


def _class_numbers(values: Sequence[Any], names: Sequence[str]) -> torch.Tensor:
    numbers = []
    for value in values:
        number = names.index(value) if value in names else value
        if not isinstance(number, int) or not 0 <= number < len(names):
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigError(f"the label {value!r} is none of the {len(names)} classes {shown}")
        numbers.append(number)
    return torch.tensor(numbers)
