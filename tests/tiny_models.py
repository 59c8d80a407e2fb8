"""Tiny seeded models of every family, built from configurations: hidden 64, two or three layers, vocabulary 128."""

from __future__ import annotations

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB, LENGTH, BATCH, IMAGE, IMAGE_TOKEN = 128, 16, 2, 16, 127
PAD, BOS, EOS = 0, 1, 2
# The default of 0.02 makes the logits of so small a model nearly constant: no error could be seen in them.
_COMMON = {"hidden_size": 64, "initializer_range": 0.08}
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_DECODER = {
    **_COMMON,
    **_SPECIAL,
    "vocab_size": VOCAB,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ENCODER = {**_COMMON, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_COHERE2 = {
    **_DECODER,
    "num_hidden_layers": 3,
    "logit_scale": 0.25,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def _llama() -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER, tie_word_embeddings=False))


def _qwen3() -> PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER, head_dim=16, tie_word_embeddings=True))


def _cohere2() -> PreTrainedModel:
    return tf.Cohere2ForCausalLM(tf.Cohere2Config(**_COHERE2))


def _cohere2_vision() -> PreTrainedModel:
    vision = {**_ENCODER, "model_type": "siglip_vision_model", "image_size": IMAGE, "patch_size": 4}
    config = tf.Cohere2VisionConfig(
        text_config={"model_type": "cohere2", **_COHERE2},
        vision_config=vision,
        alignment_intermediate_size=96,
        image_token_id=IMAGE_TOKEN,
    )
    return tf.Cohere2VisionForConditionalGeneration(config)


def _qwen3_moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_DECODER, **experts, head_dim=16, tie_word_embeddings=False))


def _gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 128, "vocab_size": VOCAB}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **_SPECIAL, initializer_range=0.08))


def _bert_config() -> tf.BertConfig:
    return tf.BertConfig(**_ENCODER, vocab_size=VOCAB, max_position_embeddings=128, pad_token_id=PAD, num_labels=3)


def _bert() -> PreTrainedModel:
    return tf.BertForMaskedLM(_bert_config())


def _bert_classifier() -> PreTrainedModel:
    return tf.BertForSequenceClassification(_bert_config())


def _vit() -> PreTrainedModel:
    return tf.ViTForImageClassification(tf.ViTConfig(**_ENCODER, image_size=IMAGE, patch_size=4, num_labels=5))


_BUILDERS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "cohere2": _cohere2,
    "cohere2_vision": _cohere2_vision,
    "qwen3_moe": _qwen3_moe,
    "gpt2": _gpt2,
    "bert": _bert,
    "bert_classifier": _bert_classifier,
    "vit": _vit,
}
FAMILIES = list(_BUILDERS)
CAUSAL_FAMILIES = ["llama", "qwen3", "cohere2", "cohere2_vision", "qwen3_moe", "gpt2"]


def build_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model in eval mode; biases and norms are perturbed too, so that none of them is trivially 0 or 1."""
    torch.manual_seed(seed)
    model = _BUILDERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def build_batch(family: str, seed: int = 0, batch_size: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    """Forward keyword arguments: `input_ids` (batch, length) int64 and / or `pixel_values` (batch, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, IMAGE, IMAGE, generator=generator)
    if family == "vit":
        return {"pixel_values": images}
    ids = torch.randint(3, VOCAB - 1, (batch_size, length), generator=generator)
    if family != "cohere2_vision":
        return {"input_ids": ids}
    ids[:, 2:6] = IMAGE_TOKEN  # (16 / 4)^2 patches, merged 2 x 2
    return {"input_ids": ids, "pixel_values": images}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character or newline (100 ids), so every English text is encoded without loss."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **tokens)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer
