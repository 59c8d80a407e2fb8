"""The linears and tables of a decoder as vLLM's models hold them: fused, named and loaded as in `models/llama.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Skeleton(nn.Module):
    """hf: the text config of transformers. prefix: where vLLM puts the language model of this family.

    embedding: what its models give to the embedding; some no name, some not even the config.
    """

    def __init__(self, backend: Any, hf: Any, quant_config: Any, prefix: str, embedding: dict[str, Any]) -> None:
        super().__init__()
        base = f"{prefix}model"
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        self.model = nn.Module()
        self.model.embed_tokens = backend.tables.VocabParallelEmbedding(hf.vocab_size, hf.hidden_size, **embedding)
        self.model.layers = nn.ModuleList()
        for i in range(hf.num_hidden_layers):
            self.model.layers.append(_block(backend, hf, quant_config, f"{base}.layers.{i}", head_dim))
        self.lm_head = backend.tables.ParallelLMHead(
            hf.vocab_size, hf.hidden_size, quant_config=quant_config, prefix=f"{prefix}lm_head"
        )
        if hf.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)


def _block(backend: Any, hf: Any, quant_config: Any, prefix: str, head_dim: int) -> nn.Module:
    linear, bias = backend.linear, bool(getattr(hf, "attention_bias", False))
    more = {"quant_config": quant_config}
    block, heads = nn.Module(), (hf.num_attention_heads, hf.num_key_value_heads)
    block.self_attn, block.mlp = nn.Module(), nn.Module()
    block.self_attn.qkv_proj = linear.QKVParallelLinear(
        hf.hidden_size, head_dim, *heads, bias=bias, **more, prefix=f"{prefix}.self_attn.qkv_proj"
    )
    block.self_attn.o_proj = linear.RowParallelLinear(
        heads[0] * head_dim, hf.hidden_size, bias=bias, **more, prefix=f"{prefix}.self_attn.o_proj"
    )
    block.mlp.gate_up_proj = linear.MergedColumnParallelLinear(
        hf.hidden_size, [hf.intermediate_size] * 2, bias=False, **more, prefix=f"{prefix}.mlp.gate_up_proj"
    )
    block.mlp.down_proj = linear.RowParallelLinear(
        hf.intermediate_size, hf.hidden_size, bias=False, **more, prefix=f"{prefix}.mlp.down_proj"
    )
    return block


def load(backend: Any, model: nn.Module, folder: Path, prefixes: dict[str, str | None]) -> None:
    """Load the files of a checkpoint as vLLM does, and finish as it does."""
    utils = backend.utils
    mapper = utils.WeightsMapper(orig_to_new_stacked=STACKED, orig_to_new_prefix=prefixes)
    utils.AutoWeightsLoader(model).load_weights(_stored(folder), mapper=mapper)
    for module in model.modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            method.process_weights_after_loading(module)


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the linears and tables of the language model."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if not any(other in name for other in ("norm", "vision_tower", "multi_modal")):
                yield name, tensor
