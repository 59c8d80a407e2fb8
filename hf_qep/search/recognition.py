"""One-shot recognition: what embeddings are worth where rows have classes, item by item.

Every row whose class has another one is asked for once. It is to be named among some classes, of each of which one row
is known: the nearest of them by cosine names it, and nothing is learnt for that (Lake et al., Science 2015). Which rows
are known is drawn from a seed and depends on the labels alone, so that two models answer the same questions. A row is
known in several of them, so answers depend on each other a little, which standard errors over items leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.distill.samples import IGNORED
from hf_qep.errors import ConfigError

WAYS = 20
"""Classes among which a row is named, as in Omniglot's official runs."""
AT_ONCE = 1024
"""Questions that are answered at once."""
KEYS = 1 << 22
"""Random numbers that are drawn at once."""


@dataclass(frozen=True)
class Episodes:
    """Questions about rows.

    queries: (questions,) int64, the row that is to be named. supports: (questions, ways) int64, a row of each class.
    answers: (questions,) int64, the column of the right one, which is in no column more often than in another, so that
    an embedding for which all are equally near is right in 1 / ways of them.
    """

    queries: Tensor
    supports: Tensor
    answers: Tensor

    @property
    def ways(self) -> int:
        """Classes among which a row is named."""
        return self.supports.shape[1]

    def described(self) -> str:
        """What is asked, in words."""
        return f"one-shot recognition among {self.ways} classes: nearest by cosine to one image of each"


def can_recognise(labels: Tensor) -> bool:
    """Whether rows with labels (rows,) int64 can be asked about: two classes, two rows of one. IGNORED is no class."""
    counts = labels[labels != IGNORED].unique(return_counts=True)[1]
    return len(counts) > 1 and int(counts.max()) > 1


def episodes(labels: Tensor, *, ways: int = WAYS, seed: int = 0) -> Episodes:
    """A question about every row whose class has another row; a class of a single row is only there to be mistaken for.

    labels: (rows,) int64; rows with the label IGNORED are in no question. ways: fewer where there are fewer classes.
    Raises ConfigError where there is nothing to tell apart.
    """
    if ways < 2:
        raise ConfigError(f"a row is named among at least 2 classes, not {ways}")
    if not can_recognise(labels):
        raise ConfigError("to be recognised, rows need two classes at least, and two rows of one of them; label more")
    return Episodes(*map(torch.cat, zip(*_drawn(labels.cpu(), ways, seed), strict=True)))


def recognised(embeddings: Tensor, asked: Episodes) -> Tensor:
    """Whether each question is answered rightly, (questions,) bool. embeddings: (rows, width) of all rows."""
    found = F.normalize(embeddings.float(), dim=-1)
    pairs = zip(asked.queries.split(AT_ONCE), asked.supports.split(AT_ONCE), strict=True)
    named = [(found[supports] @ found[queries].unsqueeze(-1)).argmax(1)[:, 0] for queries, supports in pairs]
    return torch.cat(named) == asked.answers


def _drawn(labels: Tensor, ways: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, supports and answers, some questions at a time."""
    rows = (labels != IGNORED).nonzero()[:, 0]
    _, classes, counts = labels[rows].unique(return_inverse=True, return_counts=True)
    order = classes.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)  # place of each row among those of its class
    rank[order] = torch.arange(len(order)) - starts[classes[order]]
    ways, make = min(ways, len(counts)), torch.Generator().manual_seed(seed)
    for part in (counts[classes] > 1).nonzero()[:, 0].split(max(1, KEYS // len(counts))):
        chosen, answers = _chosen(classes[part], len(counts), ways, make)
        own = chosen == classes[part].unsqueeze(1)
        left = counts[chosen] - own.long()  # of its own class, all but the query
        draw = torch.rand(chosen.shape, generator=make, dtype=torch.float64)
        draw = (draw * left).long().minimum(left - 1)  # a product can be rounded up to `left`
        draw += own & (draw >= rank[part].unsqueeze(1))
        yield rows[part], rows[order[starts[chosen] + draw]], answers


def _chosen(own: Tensor, classes: int, ways: int, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """Different classes for each question, (questions, ways), its own in a drawn column; that column, (questions,)."""
    keys = torch.rand((len(own), classes), generator=make).scatter_(1, own.unsqueeze(1), 2.0)
    chosen = keys.topk(ways).indices  # the own class first
    answers = torch.randint(ways, (len(own),), generator=make)
    every = torch.arange(len(own))
    chosen[:, 0] = chosen[every, answers]
    chosen[every, answers] = own
    return chosen, answers
