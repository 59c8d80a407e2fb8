"""Tiny students, teachers and rows of every task."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from hf_qep.distill.samples import IGNORED, TaskData

YES, NO = 7, 9
VOCAB, LENGTH, IMAGE, CLASSES, QUERIES = 32, 10, 16, 3, 6


def language_model(seed: int = 0, width: int = 32, layers: int = 2, vocab: int = VOCAB) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": vocab}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = tf.LlamaConfig(**sizes, **heads, initializer_range=0.15, tie_word_embeddings=False, pad_token_id=0)
    return tf.LlamaForCausalLM(config).eval()


def text_classifier(seed: int = 0, width: int = 32, layers: int = 2, classes: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": VOCAB}
    config = tf.BertConfig(**sizes, num_attention_heads=4, initializer_range=0.15, num_labels=classes)
    return tf.BertForSequenceClassification(config).eval()


def _vision(width: int, **more: int) -> tf.ViTConfig:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.ViTConfig(**sizes, **more, image_size=IMAGE, patch_size=4, initializer_range=0.15)


def image_classifier(seed: int = 0, width: int = 32) -> PreTrainedModel:
    torch.manual_seed(seed)
    return tf.ViTForImageClassification(_vision(width, num_labels=CLASSES)).eval()


def image_encoder(seed: int = 0, width: int = 32) -> PreTrainedModel:
    torch.manual_seed(seed)
    return tf.ViTModel(_vision(width, pooler_output_size=32)).eval()


def detector(seed: int = 0, width: int = 16, queries: int = QUERIES, classes: int = CLASSES) -> PreTrainedModel:
    torch.manual_seed(seed)
    ends = ("encoder", "decoder")
    sizes = {f"{end}_layers": 1 for end in ends} | {f"{end}_ffn_dim": 32 for end in ends}
    sizes |= {f"{end}_attention_heads": 2 for end in ends}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    backbone = tf.ResNetConfig(**stages, layer_type="basic")
    config = tf.DetrConfig(
        backbone_config=backbone, **sizes, d_model=width, num_queries=queries, num_labels=classes, dropout=0.0
    )
    return tf.DetrForObjectDetection(config).eval()


def _tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(10, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def questions(rows: int = 24, seed: int = 0) -> TaskData:
    """Rows whose last token says whether the first is odd, padded on the right by different lengths."""
    tokens = _tokens(rows, seed)
    length = 5 + torch.arange(rows) % (LENGTH - 5)
    places = torch.arange(LENGTH)
    tokens[torch.arange(rows), length] = torch.where(tokens[:, 0] % 2 == 1, YES, NO)
    mask = (places <= length[:, None]).long()
    labels = torch.where(places == length[:, None], tokens, IGNORED)
    return TaskData("causal-lm", {"input_ids": tokens * mask, "attention_mask": mask}, labels, ("no", "yes"), (NO, YES))


def texts(rows: int = 24, seed: int = 0) -> TaskData:
    """Rows of tokens of which different numbers, at their ends, are answers."""
    tokens = _tokens(rows, seed)
    start = 2 + torch.arange(rows) % (LENGTH - 3)
    labels = torch.where(torch.arange(LENGTH) >= start[:, None], tokens, IGNORED)
    return TaskData("causal-lm", {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels)


def sentences(rows: int = 24, seed: int = 0) -> TaskData:
    tokens = _tokens(rows, seed)
    return TaskData("text-classification", {"input_ids": tokens}, tokens[:, 0] % 2, ("even", "odd"))


def images(rows: int = 24, seed: int = 0, task: str = "image-classification") -> TaskData:
    """Noise, brighter by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator) + labels.sub(1)[:, None, None, None]
    return TaskData(task, {"pixel_values": pixels}, labels)


def scenes(rows: int = 8, seed: int = 0) -> TaskData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 32, 32, generator=generator)
    labels = [
        {
            "class_labels": torch.tensor([n % CLASSES]),
            "boxes": torch.tensor([[0.3 + 0.05 * (n % 8), 0.5, 0.2, 0.2]]),
        }
        for n in range(rows)
    ]
    return TaskData("object-detection", {"pixel_values": pixels}, labels)


TASKS = {
    "questions": (language_model, questions),
    "texts": (language_model, texts),
    "sentences": (text_classifier, sentences),
    "images": (image_classifier, images),
    "embeddings": (image_encoder, lambda rows=24, seed=0: images(rows, seed, "image-embedding")),
    "scenes": (detector, scenes),
}


def state(model: PreTrainedModel) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def bytes_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
