"""What a generalist can do with a few examples, in worlds that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from crm.prompts import ANSWERS, BOS, PAD, asked, shown, write
from crm.worlds import World

from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.distill.prompted import PromptedTeacher
from hf_qep.distill.reading import answer_tokens
from hf_qep.distill.said import take_said
from hf_qep.distill.samples import CAUSAL_LM, IGNORED, TaskData
from hf_qep.progress import SILENT, Progress

SHOTS = (0, 2, 4, 8)
EXAMPLES, QUERIES = 100, 101
"""Seeds of the deals that are shown and of those that are asked about."""


def skill(
    teacher: Any,
    tokenizer: Any,
    *,
    worlds: int,
    queries: int = 16,
    shots: Sequence[int] = SHOTS,
    progress: Progress = SILENT,
) -> list[dict[str, float]]:
    """For each number of examples: accuracy as the teacher answers, AUC, and what can be reached at best.

    worlds: numbered from 0, like none that a teacher learned from. `usual` is the share of the commoner answer of each
    world. The same deals are asked about behind every number of examples.
    """
    found = {count: ([], []) for count in shots}
    best, usual, outcomes = [], [], []
    with progress.bar("asking about worlds never seen", worlds, "world") as bar:
        for number in range(worlds):
            world = World(number)
            seen, new = world.deals(max(shots), EXAMPLES), world.deals(queries, QUERIES)
            texts = write(world, world.rows(seen))
            data = rows_of(tokenizer, write(world, world.rows(new)), new.won)
            for count in shots:
                text = shown(world.question, texts[:count], seen.won[:count].tolist())
                prompt = torch.tensor([BOS, *tokenizer(text)["input_ids"]])
                log_p = take_said(PromptedTeacher(teacher, prompt), data, batch_size=queries).log_p.float()
                margin = (log_p[:, 1] - log_p[:, 0]).numpy()
                found[count][0].append(margin)
                found[count][1].append((margin > 0) == new.won)
            outcomes.append(new.won)
            best.append(world.bayes)
            usual.append(max(new.won.mean(), 1 - new.won.mean()))
            bar.advance()
    yes = np.concatenate(outcomes)
    return [
        {
            "shots": count,
            "accuracy": float(np.concatenate(right).mean()),
            "auc": area_under_curve(np.concatenate(margins), yes),
            "bayes": float(np.mean(best)),
            "usual": float(np.mean(usual)),
        }
        for count, (margins, right) in found.items()
    ]


def rows_of(tokenizer: Any, texts: Sequence[str], yes: np.ndarray) -> TaskData:
    """Deals as rows that end in their outcomes."""
    answers = answer_tokens(tokenizer, ANSWERS)
    prompts = tokenizer([asked(text) for text in texts])["input_ids"]
    width = max(map(len, prompts)) + 1
    ids = torch.full((len(prompts), width), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for n, prompt in enumerate(prompts):
        row = torch.tensor([*prompt, answers[int(yes[n])]])
        ids[n, : len(row)], mask[n, : len(row)], labels[n, len(row) - 1] = row, 1, row[-1]
    return TaskData(CAUSAL_LM, {"input_ids": ids, "attention_mask": mask}, labels, ANSWERS, answers)
