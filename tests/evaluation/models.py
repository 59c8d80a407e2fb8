"""Language models whose predictions are known in closed form."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class TableModel(nn.Module):
    """Predicts the next token from the last one by a fixed table of logits (vocabulary, vocabulary)."""

    def __init__(self, table: Tensor, longest: int = 64) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(max_position_embeddings=longest, is_encoder_decoder=False)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        return SimpleNamespace(logits=self.table[input_ids])


def uniform(vocabulary: int) -> TableModel:
    return TableModel(torch.zeros(vocabulary, vocabulary))


def random_table(vocabulary: int, seed: int) -> TableModel:
    return TableModel(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)))


class FadingModel(TableModel):
    """Predicts from all tokens before, the k-th last weighted by 0.7^k: more context always changes the result."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        age = torch.arange(input_ids.shape[1])[:, None] - torch.arange(input_ids.shape[1])
        weight = torch.where(age >= 0, 0.7 ** age.clamp_min(0), 0.0)
        return SimpleNamespace(logits=weight @ self.table[input_ids])


def fading(vocabulary: int, seed: int) -> FadingModel:
    return FadingModel(random_table(vocabulary, seed).table.detach())
