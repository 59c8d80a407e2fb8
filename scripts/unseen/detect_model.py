"""An encoder-only DETR: patch tokens are the queries, each with its patch centre as the point it refers to.

A small ResNet of transformers brings the canvas to tokens of 8 x 8 pixels, transformer encoder layers let the tokens
see each other, and heads say for every token whether it stands for an object, its box, and its embedding. Trained as
a set prediction (DETR, arXiv 2005.12872, with the Hungarian matcher and box losses of transformers); there is no
decoder with learned queries, and no non-maximum suppression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from unseen.detect_scenes import Scenes

PATCH = 8
"""Pixels of a side of the ground that one token stands on."""
L1, GIOU = 5.0, 2.0
"""Weights of the box losses, those of DETR."""
NOTHING = 0.1
"""Weight of tokens that stand for no object, DETR's."""
START = 0.35
"""Width and height of a box before training, as a share of the side; ours, about that of the objects."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a detector. widths: of the ResNet's stem and two stages. layers, heads: of the encoder."""

    widths: tuple[int, int, int] = (16, 32, 64)
    layers: int = 1
    heads: int = 4


@dataclass(frozen=True)
class Found:
    """What a detector says of canvases.

    logits: (n, tokens, 2), object and nothing. boxes: (n, tokens, 4), centre x, centre y, width, height as shares of
    the side. embeddings: (n, tokens, width), of length 1.
    """

    logits: Tensor
    boxes: Tensor
    embeddings: Tensor


class Detector(nn.Module):
    """The detector of one side of canvas. side: pixels, a multiple of `PATCH`. width: of the embeddings."""

    def __init__(self, shape: Shape, side: int, width: int) -> None:
        super().__init__()
        stem, *stages = shape.widths
        tokens, inner = (side // PATCH) ** 2, stages[-1]
        config = ResNetConfig(
            num_channels=1, embedding_size=stem, hidden_sizes=stages, depths=[1, 1], layer_type="basic"
        )
        self.backbone = ResNetModel(config)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, inner))
        layer = nn.TransformerEncoderLayer(
            inner, shape.heads, 2 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(inner), enable_nested_tensor=False)
        self.objectness = nn.Linear(inner, 2)
        self.box = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, 4))
        self.embed = nn.Sequential(nn.Linear(inner, 2 * inner), nn.GELU(), nn.Linear(2 * inner, width))
        nn.init.zeros_(self.box[-1].weight)
        nn.init.zeros_(self.box[-1].bias)
        axis = (torch.arange(side // PATCH) + 0.5) * PATCH / side
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        start = torch.stack([x, y, torch.full_like(x, START), torch.full_like(x, START)], -1).reshape(-1, 4)
        self.register_buffer("start", start.logit())

    def forward(self, images: Tensor) -> Found:
        """images: (n, 1, side, side) from 0 to 1."""
        maps = self.backbone((images - 0.5) * 4).last_hidden_state
        tokens = self.encoder(maps.flatten(2).transpose(1, 2) + self.place)
        embeddings = F.normalize(self.embed(tokens), dim=-1)
        return Found(self.objectness(tokens), (self.start + self.box(tokens)).sigmoid(), embeddings)


class SetLoss(nn.Module):
    """DETR's loss over one class "object": cross-entropy of matched and other tokens, L1 and GIoU of matched boxes."""

    def __init__(self) -> None:
        super().__init__()
        matcher = HungarianMatcher(class_cost=1.0, bbox_cost=L1, giou_cost=GIOU)
        self.loss = ImageLoss(matcher, num_classes=1, eos_coef=NOTHING, losses=["labels", "boxes"])

    def forward(self, found: Found, scenes: Scenes) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The loss, and which token (canvas, token) stands for which object of the scenes, (objects,) int64 each."""
        outputs = {"logits": found.logits, "pred_boxes": found.boxes}
        per_canvas = torch.bincount(scenes.owner, minlength=len(scenes.images)).tolist()
        targets = [
            {"class_labels": torch.zeros(len(boxes), dtype=torch.int64), "boxes": boxes}
            for boxes in scenes.boxes.split(per_canvas)
        ]
        pairs = self.loss.matcher(outputs, targets)
        said = {name: self.loss.get_loss(name, outputs, targets, pairs, len(scenes.owner)) for name in self.loss.losses}
        starts = torch.tensor([0, *per_canvas]).cumsum(0)
        objects = torch.cat([theirs + starts[n] for n, (_, theirs) in enumerate(pairs)])
        total = said["labels"]["loss_ce"] + L1 * said["boxes"]["loss_bbox"] + GIOU * said["boxes"]["loss_giou"]
        return total, self.loss._get_source_permutation_idx(pairs), objects
