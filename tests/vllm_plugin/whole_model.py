"""One process of a real vLLM on a processor: build a model, load it, and compare its layers with those of transformers.

    python -m tests.vllm_plugin.whole_model FOLDER RANK RANKS PORT

Prints the largest difference. Attention is not run: what it computes is no business of the plugin.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_qep.vllm_plugin import register


def build(folder: str, rank: int, ranks: int, port: str) -> tuple[Any, Any]:
    """The model as vLLM builds and loads it, and the context in which it lives."""
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    more = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64, "enforce_eager": True}
    model_config = ModelConfig(model=folder, tokenizer=folder, **more)
    parallel = ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp")
    device, how = DeviceConfig(device="cpu"), LoadConfig()
    config = VllmConfig(model_config=model_config, device_config=device, load_config=how, parallel_config=parallel)
    context = set_current_vllm_config(config)
    context.__enter__()
    init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
    initialize_model_parallel(ranks, 1, backend="gloo")
    model = initialize_model(vllm_config=config)
    DefaultModelLoader(how).load_weights(model, model_config)
    process_weights_after_loading(model, model_config, torch.device("cpu"))
    return model, context


def difference(served: nn.Module, wanted: nn.Module, rank: int, ranks: int) -> float:
    """Largest difference between a rank's outputs and transformers', over linears, embedding and logits."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    g, worst = torch.Generator().manual_seed(0), 0.0
    for i, layer in enumerate(wanted.model.layers):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            linear, own = layer.get_submodule(name), served.get_submodule(f"model.layers.{i}.{name}")
            x = torch.randn(3, linear.in_features, generator=g)
            y = own(x.split(own.input_size_per_partition, -1)[rank].contiguous())[0]
            if ranks > 1 and not own.reduce_results:  # Cohere adds attention and mlp first
                y = tensor_model_parallel_all_reduce(y)
            worst = max(worst, (y - linear(x)).abs().max().item())
        own = served.get_submodule(f"model.layers.{i}.self_attn.qkv_proj")
        x = torch.randn(3, own.input_size, generator=g)
        for part, y in zip("qkv", own(x)[0].split(own.output_partition_sizes, -1), strict=True):
            at = rank if part == "q" else rank // own.num_kv_head_replicas
            share = getattr(layer.self_attn, f"{part}_proj")(x).split(y.shape[1], -1)[at]
            worst = max(worst, (y - share).abs().max().item())
    ids, x = torch.arange(0, 100, 7), torch.randn(3, wanted.config.hidden_size, generator=g)
    worst = max(worst, (served.model.embed_tokens(ids) - wanted.get_input_embeddings()(ids)).abs().max().item())
    logits = wanted.get_output_embeddings()(x) * getattr(wanted.config, "logit_scale", 1.0)
    return max(worst, (served.compute_logits(x) - logits).abs().max().item())


@torch.no_grad()
def main(folder: str, rank: int, ranks: int, port: str) -> None:
    """See the file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # before vLLM patches its classes
    register()
    served, context = build(folder, rank, ranks, port)
    print("DIFFERENCE", difference(served, wanted, rank, ranks), flush=True)
    context.__exit__(None, None, None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
