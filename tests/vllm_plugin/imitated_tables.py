"""`vocab_parallel_embedding.py` of vLLM 0.33.0, imitated; without added (LoRA) rows."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tests.vllm_plugin.imitation import (
    WORLD,
    PluggableLayer,
    QuantizeMethodBase,
    divide,
    method_has_implemented_embedding,
    set_weight_attrs,
)


class UnquantizedEmbeddingMethod(QuantizeMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ):
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = nn.Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)

    def embedding(self, layer, input_):
        return F.embedding(input_, layer.weight)


class VocabParallelEmbedding(PluggableLayer):
    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        params_dtype=None,
        org_num_embeddings=None,
        padding_size=64,
        quant_config=None,
        prefix="",
        *,
        disable_tp=False,
        reduce_results=True,
        quant_method=None,
        parallel_group=None,
    ):
        super().__init__()
        self.tp_rank, self.tp_size = WORLD.rank, WORLD.size
        self.num_embeddings, self.embedding_dim, self.prefix = num_embeddings, embedding_dim, prefix
        self.org_vocab_size = org_num_embeddings or num_embeddings
        self.num_embeddings_padded = -(-num_embeddings // padding_size) * padding_size
        self.num_embeddings_per_partition = divide(self.num_embeddings_padded, self.tp_size)
        start = min(self.tp_rank * self.num_embeddings_per_partition, self.org_vocab_size)
        end = min((self.tp_rank + 1) * self.num_embeddings_per_partition, self.org_vocab_size)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)
        if quant_method is None and quant_config is not None:
            quant_method = quant_config.get_quant_method(self, prefix)
        if quant_method is None:
            quant_method = UnquantizedEmbeddingMethod()
        if not isinstance(self, ParallelLMHead) and not method_has_implemented_embedding(type(quant_method)):
            raise NotImplementedError(f"The class {type(quant_method).__name__} must implement 'embedding'")
        self.quant_method = quant_method
        self.params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.quant_method.create_weights(
            self,
            embedding_dim,
            [self.num_embeddings_per_partition],
            embedding_dim,
            self.num_embeddings_padded,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param, loaded_weight):
        dim = getattr(param, "output_dim", None)
        if dim is None:
            assert param.data.shape == loaded_weight.shape
            param.data.copy_(loaded_weight)
            return
        start = self.shard_indices.org_vocab_start_index
        assert loaded_weight.shape[dim] == self.org_vocab_size
        loaded_weight = loaded_weight.narrow(dim, start, self.shard_indices.org_vocab_end_index - start)
        param[: loaded_weight.shape[0]].data.copy_(loaded_weight)
        param[loaded_weight.shape[0] :].data.fill_(0)

    def forward(self, input_):
        """This rank's share, before the all-reduce."""
        if self.tp_size == 1:
            return self.quant_method.embedding(self, input_.long())
        start, end = self.shard_indices.org_vocab_start_index, self.shard_indices.org_vocab_end_index
        mask = (input_ >= start) & (input_ < end)
        output = self.quant_method.embedding(self, (mask * (input_ - start)).long())
        return output.masked_fill_(~mask.unsqueeze(-1), 0)


class ParallelLMHead(VocabParallelEmbedding):
    def __init__(self, num_embeddings, embedding_dim, bias=False, *args, quant_config=None, **kwargs):
        super().__init__(num_embeddings, embedding_dim, *args, quant_config=quant_config, **kwargs)
        self.register_parameter("bias", None)

    def tie_weights(self, embed_tokens):
        return self.quant_method.tie_weights(self, embed_tokens)
