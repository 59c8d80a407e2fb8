"""What a model writes if it always takes the most probable token."""

from __future__ import annotations

from typing import Any

import torch


def continue_greedily(model: Any, ids: torch.Tensor, tokenizer: Any, max_new_tokens: int) -> list[int]:
    """New tokens after `ids` (1, tokens), the most probable one each time, without the one that ends the text.

    An own loop, because `generate` mixes in what the model's generation config prefers, such as a repetition penalty.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    ends = _ends(model, tokenizer)
    step = all_ids = ids.to(next(model.parameters()).device)
    cache, found = None, []
    with torch.inference_mode():
        for _ in range(min(max_new_tokens, longest - ids.shape[1])):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            if token.item() in ends:
                break
            found.append(int(token))
            all_ids = torch.cat([all_ids, token.to(all_ids.device)], dim=1)
            cache = getattr(out, "past_key_values", None)
            step = all_ids if cache is None else all_ids[:, -1:]
    return found


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
