"""The generalist: a language model that learns from many made-up worlds to judge deals after a few examples.

Every row of its training is another world: the question, then deals with their outcomes, as many as there is room for.
Worlds begin with few columns, and rows with few deals, and both grow (`curriculum`): among twenty deals a model does
not find the one that is asked about before it knows what to look for. The loss of the answers counts fully, that of
all other tokens a little, and an eighth is general text. No world comes twice, and those of the evaluation never.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from crm.prompts import ARROW, BOS, EOS, PAD, SPECIAL, shown, write
from crm.worlds import Recipe, World
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_qep.files import write_aside, write_text_aside
from hf_qep.progress import SILENT, Progress

FIRST_WORLD, TOKENIZER_WORLD = 1_000_000, 900_000_000
"""Numbers of the worlds that a teacher and its tokenizer see; those below the first are for evaluation."""
OTHERS = 0.03
"""Weight of the tokens that are no answer: most of them cannot be foretold."""
STAGES = ((0.3, 8), (0.45, 4), (0.6, 2), (math.inf, 1))
"""Up to these shares of the training a row is cut into so many."""
SHORTEST = 56
"""Tokens of a row that surely holds a whole deal of the first worlds."""
LEAST_TOKENS = 10
"""Of a deal; there is no use in drawing more of them than fit into a row."""
GENERAL = 8
"""One in so many rows is general text."""
MOST_ROWS = 1_000
"""Worlds that are set aside for a step."""
LOG, PLAN = "training.jsonl", "plan.json"


@dataclass(frozen=True)
class TeacherPlan:
    """Sizes and schedule. tokens: of the longest rows, and batch: how many of them a step has; of shorter ones it has
    more. rates: of matrices (Muon) and of everything else (AdamW). keep: steps between checkpoints."""

    vocabulary: int = 1280
    hidden_size: int = 384
    intermediate_size: int = 1056
    layers: int = 4
    heads: int = 6
    kv_heads: int = 3
    positions: int = 1024
    tokens: int = 448
    batch: int = 8
    steps: int = 900
    rates: tuple[float, float] = (5e-3, 1.5e-3)
    warmup: float = 0.04
    seed: int = 0
    keep: int = 50
    tokenizer_worlds: int = 2_500


def curriculum(share: float) -> tuple[int, Recipe]:
    """Into how many parts a row is cut, and its worlds, at a share of the training."""
    growth = min(1.0, max(0.0, (share - 0.15) / 0.55))
    least = 2 + round(3 * growth)
    recipe = Recipe(
        fields=(least, max(2 + round(8 * growth), least + 1)),
        sentences=(1, 2 if share > 0.4 else 1),
        interactions=(0, 2 if share > 0.6 else 0),
        own=0.3 + 0.2 * growth,
    )
    return next(parts for end, parts in STAGES if share < end), recipe


def world_text(seed: int, deals: int, recipe: Recipe | None = None) -> str:
    """A world's question and deals with their outcomes."""
    world = World(seed, recipe)
    drawn = world.deals(deals, 0)
    return shown(world.question, write(world, world.rows(drawn)), drawn.won.tolist())


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def pretrain(plan: TeacherPlan, general: list[str], folder: Path, progress: Progress = SILENT) -> None:
    """Train a teacher and save it in `folder` with its tokenizer, its plan and the course of its losses.

    general: texts about other things. A training that was stopped goes on from its last checkpoint beside the folder.
    """
    tokenizer = train_tokenizer(_texts(plan, general), plan.vocabulary)
    text = np.concatenate([np.array(tokenizer(part)["input_ids"], dtype=np.int64) for part in general])
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(_config(plan))
    run = _Run(model, plan, folder.with_name(f"{folder.name}.checkpoint"))
    with progress.bar("teaching the generalist", plan.steps) as bar:
        bar.advance(run.begin())
        for step in range(run.done, plan.steps):
            ids, answers = batch(plan, step, tokenizer, text)
            run.step(step, ids, answers)
            bar.advance()
    with write_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_text_aside(aside / PLAN, json.dumps(asdict(plan), indent=1) + "\n")
        write_text_aside(aside / LOG, "".join(json.dumps(line) + "\n" for line in run.log))
    run.path.unlink(missing_ok=True)


def batch(
    plan: TeacherPlan, step: int, tokenizer: PreTrainedTokenizerFast, general: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Tokens (rows, tokens + 1) int64, padded, and which of them are answers, bool."""
    (parts, recipe), arrow = curriculum(step / plan.steps), tokenizer(ARROW)["input_ids"][0]
    parts = max(1, min(parts, plan.tokens // SHORTEST))
    rows, tokens = plan.batch * parts, plan.tokens // parts
    ids, worlds = torch.full((rows, tokens + 1), PAD), rows - max(1, rows // GENERAL)
    first = FIRST_WORLD + step * MOST_ROWS
    for row in range(worlds):
        text = world_text(first + row, tokens // LEAST_TOKENS, recipe)
        found = [BOS, *tokenizer(text)["input_ids"]][: tokens + 1]
        ids[row, : len(found)] = torch.tensor(found)
    make = np.random.default_rng([plan.seed, step])
    for row in range(worlds, rows):
        start = int(make.integers(len(general) - tokens))
        ids[row] = torch.from_numpy(general[start : start + tokens + 1])
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:worlds, 1:] = ids[:worlds, :-1] == arrow
    return ids, answers


class _Run:
    """A training with its optimisers, which can be written down."""

    def __init__(self, model: nn.Module, plan: TeacherPlan, path: Path) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        chosen = {id(p) for p in matrices}
        self.rest = [p for p in model.parameters() if id(p) not in chosen]
        self.model, self.plan, self.path = model, plan, path
        self.optimizers = (
            torch.optim.Muon(matrices, lr=plan.rates[0], weight_decay=0.01),
            torch.optim.AdamW(self.rest, lr=plan.rates[1], betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.done, self.log = 0, []

    def begin(self) -> int:
        """Steps that were done before."""
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            if state["plan"] == repr(self.plan):
                self.model.load_state_dict(state["model"])
                for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(kept)
                self.done, self.log = state["done"], state["log"]
        return self.done

    def step(self, step: int, ids: Tensor, answers: Tensor) -> None:
        """One step, and a checkpoint where one is due."""
        rise = min(1.0, (step + 1) / (self.plan.warmup * self.plan.steps))
        share = rise * (0.05 + 0.475 * (1 + math.cos(math.pi * step / self.plan.steps)))
        for optimizer, rate in zip(self.optimizers, self.plan.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
        answered, other = losses(self.model, ids, answers)
        (answered + OTHERS * other).backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.log.append({"step": step, "answers": round(answered.item(), 4), "others": round(other.item(), 4)})
        self.done = step + 1
        if self.done % self.plan.keep == 0 and self.done < self.plan.steps:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, in one step."""
        state = {
            "plan": repr(self.plan),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "done": self.done,
            "log": self.log,
        }
        aside = self.path.with_suffix(".aside")
        torch.save(state, aside)
        aside.replace(self.path)


def losses(model: nn.Module, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the answers and of all other tokens, of rows (rows, tokens) int64.

    In bfloat16 where the matrices are multiplied: twice as fast on processors that can, and slower on none of today.
    """
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    target = ids[:, 1:]
    each = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    said = answers[:, 1:]
    return each[said].mean(), each[(target != PAD) & ~said].mean()


def _config(plan: TeacherPlan) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=plan.hidden_size // plan.heads,
        max_position_embeddings=plan.positions,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _texts(plan: TeacherPlan, general: list[str]) -> Iterator[str]:
    """What the tokenizer learns from: mostly worlds."""
    for number in range(plan.tokenizer_worlds):
        yield world_text(TOKENIZER_WORLD + number, 10)
    yield from (part[: 400 * plan.tokenizer_worlds // max(1, len(general))] for part in general)


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """A teacher and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)
