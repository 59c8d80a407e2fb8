"""Vision transformers that begin with heads which look at one patch each.

A vision transformer from scratch learns little from a few thousand images: its class token sees the mean of all
patches, and where a stroke lies is lost in it. Here every head of a layer begins with the class token looking at one
patch, the next layer's heads at the next patches, and values and outputs begin orthogonal; all of it is learnt further.
That is a cousin of mimetic initialisation (arXiv 2305.09828). Teacher and hand-made students begin alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from hf_qep.errors import ConfigError

SHARPNESS = 5.0
"""Of the gaze of a head in the beginning. At 6 an untrained one-shot guess was best of 1, 3, 6, 10 and 20."""


@dataclass(frozen=True)
class Size:
    """Sizes of a vision transformer. ffn: units of the feed-forward network. patch: pixels of a side."""

    hidden: int = 128
    layers: int = 5
    heads: int = 8
    ffn: int = 256
    patch: int = 7

    def to_dict(self) -> dict[str, int]:
        """JSON value."""
        return asdict(self)


def build(size: Size, *, side: int, channels: int, width: int, seed: int) -> ViTModel:
    """A model with fresh weights, whose `pooler_output` is the embedding, (rows, width).

    side, channels: of the images. Raises ConfigError where there is no direction of the stream left for a patch.
    """
    config = ViTConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn,
        image_size=side,
        patch_size=size.patch,
        num_channels=channels,
        pooler_output_size=width,
        pooler_act="linear",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        encoder_stride=size.patch,
    )
    if (patches := (side // size.patch) ** 2) + 1 >= size.hidden:
        raise ConfigError(f"{patches} patches need a hidden size above {patches + 1}, not {size.hidden}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTModel(config)
        place_heads(model)
    return model.eval()


@torch.no_grad()
def embed(model: Any, pixels: Tensor, batch: int = 256) -> Tensor:
    """Embeddings of prepared images, (rows, width) float32, of length 1."""
    parts = [model(pixel_values=part.to(model.device)).pooler_output.float() for part in pixels.split(batch)]
    return nn.functional.normalize(torch.cat(parts), dim=-1).cpu()


@torch.no_grad()
def place_heads(model: Any) -> None:
    """Let the heads of a vision transformer begin with one patch each, in place, from torch's global generator.

    The hidden size must be above the number of patches. Layers without attention are passed over.
    """
    hidden, embeddings = model.config.hidden_size, model.embeddings
    places = embeddings.position_embeddings
    patches = places.shape[1] - 1
    directions = nn.init.orthogonal_(torch.empty(hidden, hidden))[: patches + 1]
    gaze, patch = directions[-1], directions[:-1]
    embeddings.cls_token.zero_()
    places.zero_()
    places[0, 0], places[0, 1:] = gaze * hidden**0.5 / 2, patch
    projection = embeddings.patch_embeddings.projection
    weight = torch.randn(projection.weight.shape) * 2 / projection.weight[0].numel() ** 0.5
    rest = torch.eye(hidden) - directions.T @ directions  # what is seen stays out of the directions of the places
    projection.weight.copy_((rest @ weight.flatten(1)).view_as(weight))
    projection.bias.zero_()
    heads = 0
    for layer in model.layers:
        if hasattr(layer.attention, "q_proj"):
            heads += _place(layer.attention, heads, gaze, patch)
    nn.init.orthogonal_(model.pooler.dense.weight)


def _place(attention: Any, before: int, gaze: Tensor, patch: Tensor) -> int:
    """Heads of one layer, which look at the patches behind the `before` that earlier heads look at; their number."""
    width, count = attention.head_dim, attention.q_proj.out_features // attention.head_dim
    for linear in (attention.q_proj, attention.k_proj):
        nn.init.normal_(linear.weight, std=0.02)
    for head in range(count):
        attention.q_proj.weight[head * width] += 2 * SHARPNESS * gaze / len(gaze) ** 0.5
        attention.k_proj.weight[head * width] += SHARPNESS * patch[(before + head) % len(patch)]
    nn.init.orthogonal_(attention.v_proj.weight)
    nn.init.orthogonal_(attention.o_proj.weight, gain=0.7)
    return count
