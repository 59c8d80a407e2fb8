"""A language model that reads a prompt before every row: instructions and examples that a student never sees.

What it says about a row is what it says few-shot. A student that learns from it needs no prompt, which is most of what
a few-shot model reads (context distillation, Askell et al. 2021, arXiv 2112.00861, section 3).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.errors import ConfigError


def prompt_tokens(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a prompt, (tokens,) int64, as the tokenizer encodes a text; where that adds nothing, with the token
    that begins a text in front, if there is one."""
    ids, bare = (list(tokenizer(text, add_special_tokens=adds)["input_ids"]) for adds in (True, False))
    if ids == bare and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor(ids, dtype=torch.int64)


class PromptedTeacher(nn.Module):
    """A causal language model behind a prompt.

    model: in eval mode. prompt_ids: (tokens,) int64, in front of every row, with the token that begins a text. Its keys
    and values are computed once, when the first row comes, and again after the weights were moved. Rows are padded on
    the right. Gives outputs as the model does, for the tokens of the row alone. Raises ConfigError for a prompt without
    tokens, with unknown ones, or one that leaves no room for a row.
    """

    def __init__(self, model: PreTrainedModel, prompt_ids: Tensor) -> None:
        super().__init__()
        if prompt_ids.ndim != 1 or not len(prompt_ids):
            raise ConfigError(
                f"a prompt is a row of at least one token, not a tensor of shape {tuple(prompt_ids.shape)}"
            )
        if not 0 <= int(prompt_ids.min()) <= int(prompt_ids.max()) < model.config.vocab_size:
            raise ConfigError(f"the prompt has tokens that the model, with {model.config.vocab_size}, does not know")
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and len(prompt_ids) >= room:
            raise ConfigError(f"a prompt of {len(prompt_ids)} tokens leaves no room for rows among {room}; shorten it")
        self.model = model
        self.register_buffer("prompt_ids", prompt_ids.clone())
        self._read: tuple[torch.device, Any] | None = None

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def num_parameters(self) -> int:
        """Weights of the model; a prompt has none."""
        return self.model.num_parameters()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        """Outputs for rows (rows, tokens) int64. attention_mask: of the rows, without the prompt."""
        rows, tokens = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        room = getattr(self.config, "max_position_embeddings", None)
        if room is not None and len(self.prompt_ids) + tokens > room:
            raise ConfigError(
                f"a prompt of {len(self.prompt_ids)} and a row of {tokens} tokens are more than the model's {room}; "
                "show fewer examples"
            )
        before = attention_mask.new_ones(rows, len(self.prompt_ids))
        cache = copy.deepcopy(self._cache())
        cache.batch_repeat_interleave(rows)
        return self.model(
            input_ids=input_ids,
            attention_mask=torch.cat([before, attention_mask], 1),
            past_key_values=cache,
            **others,
        )

    def _cache(self) -> Any:
        """Keys and values of the prompt, of one row."""
        if self._read is None or self._read[0] != self.device:
            ids = self.prompt_ids.to(self.device).unsqueeze(0)
            self._read = self.device, self.model(input_ids=ids, use_cache=True).past_key_values
        return self._read[1]
