"""One-shot recognition: one drawing of each of twenty characters is known, and one by another hand is to be named.

Nearest by cosine; nothing is learnt in an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.errors import ConfigError
from unseen.glyphs import Glyphs, Run

Embed = Callable[[Tensor], Tensor]
"""Drawings (rows, 1, side, side) to embeddings (rows, width)."""
WAYS = 20
AT_ONCE = 1000
"""Bootstrap draws that are held in memory."""


def official(embed: Embed, runs: Sequence[Run]) -> Tensor:
    """Whether each query of the official runs is named rightly, (runs, queries) bool."""
    return torch.stack([_nearest(embed(run.queries), embed(run.support)) == run.answers for run in runs])


def episodes(embed: Embed, glyphs: Glyphs, count: int, seed: int = 0, ways: int = WAYS) -> Tensor:
    """The same for `count` episodes of random characters, each drawn by two random hands, (count, ways) bool.

    Raises ConfigError where there are too few characters.
    """
    if len(glyphs.characters) < ways:
        raise ConfigError(f"{ways} ways need at least {ways} characters, not {len(glyphs.characters)}")
    rows = [(glyphs.labels == number).nonzero()[:, 0] for number in range(len(glyphs.characters))]
    found, generator = F.normalize(embed(glyphs.images), dim=-1), torch.Generator().manual_seed(seed)
    right = []
    for _ in range(count):
        chosen = torch.randperm(len(rows), generator=generator)[:ways].tolist()
        pairs = torch.stack([rows[c][torch.randperm(len(rows[c]), generator=generator)[:2]] for c in chosen])
        right.append(_nearest(found[pairs[:, 1]], found[pairs[:, 0]]) == torch.arange(ways))
    return torch.stack(right)


def interval(
    ours: Tensor, theirs: Tensor, *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the difference of two shares of right answers, over trials and over seeds.

    ours, theirs: (seeds, trials) bool or float, the same trials in the same order, so that they are drawn together;
    seeds of either side are drawn on their own, for they have nothing to do with each other.
    """
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = ours.double(), theirs.double()
    if ours.shape[1] != theirs.shape[1]:
        raise ConfigError(f"{ours.shape[1]} trials cannot be compared with {theirs.shape[1]} other ones")
    found = []
    for start in range(0, draws, AT_ONCE):
        count = min(AT_ONCE, draws - start)
        drawn = [_drawn(side, count, generator) for side in (ours, theirs)]
        trials = torch.randint(ours.shape[1], (count, ours.shape[1]), generator=generator)
        found.append((drawn[0] - drawn[1]).gather(1, trials).mean(1))
    tail = (1 - level) / 2
    low, high = torch.cat(found).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _drawn(side: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means over seeds that are drawn again, (count, trials)."""
    seeds = torch.randint(len(side), (count, len(side)), generator=generator)
    return F.one_hot(seeds, len(side)).double().mean(1) @ side


def _nearest(queries: Tensor, support: Tensor) -> Tensor:
    return (F.normalize(queries, dim=-1) @ F.normalize(support, dim=-1).T).argmax(-1)
