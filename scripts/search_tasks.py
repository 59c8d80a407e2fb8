"""Two small tasks with teachers that a processor trains in a minute, for the benchmark of the search.

`deals`: a language model reads twelve fields and six words of a note, then one of four questions, and answers yes or
no. Each question has a rule of its own with interactions and label noise. The teacher answers all four, the student
learns one: most of what the teacher can do is of no use to it.
`pictures`: a vision transformer tells twelve drawings apart that are moved, turned, scaled and covered with noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.distill.samples import CAUSAL_LM, IGNORED, IMAGE_CLASSES, TaskData

FIELDS, VALUES, WORDS, NOTE, QUESTIONS = 12, 4, 24, 6, 4
FIRST_WORD = 1 + FIELDS * VALUES
FIRST_QUESTION = FIRST_WORD + WORDS
YES = FIRST_QUESTION + QUESTIONS
NO, VOCABULARY = YES + 1, YES + 6
NOISE = 0.05
PRODUCTS = 3
CLASSES, SIZE, POINTS = 12, 20, 5


@dataclass(frozen=True)
class Task:
    """Rows by purpose. teach: what the teacher learned. fit, judge: for the search. train, test: for what is chosen."""

    name: str
    build: Callable[[], PreTrainedModel]
    teach: TaskData
    fit: TaskData
    judge: TaskData
    train: TaskData
    test: TaskData


def deals(seed: int = 0, scale: float = 1.0) -> Task:
    """Fields, notes and questions; the student's question is the first."""
    rules = _rules(torch.Generator().manual_seed(1000))
    make = torch.Generator().manual_seed(seed)
    count = {name: round(n * scale) for name, n in COUNTS.items()}
    teach = _deal_rows(rules, count["teach"], None, make)
    rows = {name: _deal_rows(rules, n, 0, make) for name, n in count.items() if name != "teach"}
    return Task("deals", _deal_teacher, teach, **rows)


COUNTS = {"teach": 24_000, "fit": 1_024, "judge": 512, "train": 4_096, "test": 4_096}


def _rules(make: torch.Generator) -> list[dict[str, Tensor]]:
    """For each question: weights of values and words, and of products of two fields."""
    rules = []
    for _ in range(QUESTIONS):
        pairs = torch.randperm(FIELDS, generator=make)[: 2 * PRODUCTS].reshape(PRODUCTS, 2)
        rule = {"values": 0.5 * torch.randn(FIELDS, VALUES, generator=make), "pairs": pairs}
        rule["tables"] = 1.5 * torch.randn(PRODUCTS, VALUES, VALUES, generator=make)
        rule["words"] = 0.6 * torch.randn(WORDS, generator=make)
        rules.append(rule)
    return rules


def _deal_rows(rules: list[dict[str, Tensor]], count: int, question: int | None, make: torch.Generator) -> TaskData:
    values = torch.randint(VALUES, (count, FIELDS), generator=make)
    words = torch.randint(WORDS, (count, NOTE), generator=make)
    asked = torch.randint(QUESTIONS, (count,), generator=make) if question is None else torch.full((count,), question)
    scores = torch.stack([_score(rule, values, words) for rule in rules])
    yes = scores.gather(0, asked.unsqueeze(0))[0] > 0
    yes ^= torch.rand(count, generator=make) < NOISE
    answer = torch.where(yes, YES, NO)
    tokens = [
        torch.zeros(count, 1, dtype=torch.int64),
        1 + torch.arange(FIELDS) * VALUES + values,
        FIRST_WORD + words,
        (FIRST_QUESTION + asked).unsqueeze(1),
        answer.unsqueeze(1),
    ]
    ids = torch.cat(tokens, 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = answer
    return TaskData(CAUSAL_LM, {"input_ids": ids}, labels, ("yes", "no"), (YES, NO))


def _score(rule: dict[str, Tensor], values: Tensor, words: Tensor) -> Tensor:
    score = rule["values"][torch.arange(FIELDS), values].sum(1) + rule["words"][words].sum(1)
    for (a, b), table in zip(rule["pairs"].tolist(), rule["tables"], strict=True):
        score = score + table[values[:, a], values[:, b]]
    return score


def _deal_teacher() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY - 1,
        bos_token_id=0,
        eos_token_id=VOCABULARY - 2,
    )
    return transformers.LlamaForCausalLM(config)


def pictures(seed: int = 0, scale: float = 1.0) -> Task:
    """Drawings of five strokes each."""
    strokes = torch.rand(CLASSES, POINTS + 1, 2, generator=torch.Generator().manual_seed(2000)) * 1.4 - 0.7
    make = torch.Generator().manual_seed(seed)
    rows = {name: _picture_rows(strokes, round(n * scale / 2), make) for name, n in COUNTS.items()}
    return Task("pictures", _picture_teacher, **rows)


def _picture_rows(strokes: Tensor, count: int, make: torch.Generator) -> TaskData:
    labels = torch.randint(CLASSES, (count,), generator=make)
    angle = 0.25 * torch.randn(count, generator=make)
    size = 0.75 + 0.3 * torch.rand(count, generator=make)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)
    moved = 0.12 * torch.randn(count, 1, 2, generator=make)
    points = (strokes[labels] @ turn) * size[:, None, None] + moved
    points += 0.06 * torch.randn(points.shape, generator=make)
    lines = points[:, :-1, None] + torch.linspace(0, 1, 12)[None, None, :, None] * points.diff(dim=1)[:, :, None]
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    nearest = torch.cat([torch.cdist(grid.expand(len(part), -1, -1), part.flatten(1, 2)).amin(2)
                         for part in lines.split(512)])  # fmt: skip
    ink = (1 - nearest / 0.14).clamp_min(0).reshape(-1, 1, SIZE, SIZE)
    colour = 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=make)
    image = ink * colour + 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=make)
    return TaskData(IMAGE_CLASSES, {"pixel_values": image}, labels, tuple(f"drawing {n}" for n in range(CLASSES)))


def _picture_teacher() -> PreTrainedModel:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=SIZE,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


TASKS: dict[str, Callable[..., Task]] = {"deals": deals, "pictures": pictures}


def teacher_of(task: Task, folder: Path, epochs: int, seed: int = 0) -> PreTrainedModel:
    """The trained teacher, from `folder` if it lies there."""
    from hf_qep.distill.losses import DistillLoss
    from hf_qep.distill.student_trainer import train_student

    stock = type(task.build())
    if (folder / "config.json").is_file():
        return stock.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    teacher = task.build()
    taught, held = task.teach.split(0.05, seed)
    train_student(
        teacher,
        taught,
        held_out=held,
        teacher=None,
        loss=DistillLoss(alpha=1.0),
        epochs=epochs,
        learning_rate=2e-3,
        batch_size=64,
        seed=seed,
    )
    teacher.save_pretrained(folder)
    return teacher.eval()
