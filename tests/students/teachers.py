"""Tiny teachers of every family that students can be cut from, with inputs and one tensor of outputs each."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import build_batch, build_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}


def _clip() -> PreTrainedModel:
    config = tf.CLIPVisionConfig(**SIZES, image_size=16, patch_size=4, projection_dim=24, initializer_range=0.08)
    return tf.CLIPVisionModelWithProjection(config)


def _detr() -> PreTrainedModel:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return tf.DetrForObjectDetection(
        tf.DetrConfig(
            backbone_config=backbone,
            use_timm_backbone=False,
            d_model=64,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=80,
            num_queries=5,
            num_labels=3,
        )
    )


_OWN = {"clip_vision_model": _clip, "detr": _detr}
FAMILIES = ["llama", "qwen3", "cohere2", "bert", "bert_classifier", "vit", *_OWN]
DECODERS = ["llama", "qwen3", "cohere2"]


@cache
def _built(family: str) -> PreTrainedModel:
    if family not in _OWN:
        return build_model(family)
    torch.manual_seed(0)
    model = _OWN[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model.eval()


def teacher(family: str) -> PreTrainedModel:
    """A fresh copy of the tiny model of a family, in eval mode."""
    return copy.deepcopy(_built(family))


def batch(family: str) -> dict[str, Tensor]:
    """Forward keyword arguments."""
    if family not in _OWN:
        return build_batch(family)
    size = 16 if family == "clip_vision_model" else 32
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """All float outputs of a forward pass that do not depend on how a student is built, flat."""
    result = model(**inputs, use_cache=False) if "input_ids" in inputs else model(**inputs)
    names = ("logits", "pred_boxes", "image_embeds", "last_hidden_state")
    return torch.cat([result[name].flatten() for name in names if result.get(name) is not None])
