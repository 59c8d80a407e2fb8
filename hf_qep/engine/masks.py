"""Padding: tokens that fill up a row count for nothing."""

from __future__ import annotations

from torch import Tensor

MASK = "attention_mask"


def padding_mask(batch: dict[str, Tensor]) -> Tensor | None:
    """Bool (rows, tokens), False where a row is filled up; None if nothing is."""
    mask = batch.get(MASK)
    return mask.bool() if mask is not None and mask.ndim == 2 and not mask.all() else None


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens (n, width) of x (..., width) that the mask keeps; x itself if there is none, or if x has other tokens
    than the mask speaks of, such as those that a router sent to one expert."""
    if mask is None or x.shape[:-1].numel() != mask.numel():
        return x
    return x.flatten(0, -2)[mask.flatten().to(x.device)]
