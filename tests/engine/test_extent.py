"""What is to be quantised and how much work it is, from a model on meta."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from hf_qep.config import QepConfig
from hf_qep.engine.extent import count_operations, empty_model, weights_to_quantize
from hf_qep.engine.job import quantize_model
from hf_qep.engine.planning.output import plan_output
from hf_qep.errors import ArchitectureError, ConfigError
from tests.engine.test_job import calibration
from tests.tiny_models import build_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere2", "gpt2", "qwen3_moe"])
def test_the_weights_are_those_that_get_signs(family):
    model, recipe = build_model(family), QepConfig(method="rtn", num_samples=12, seq_len=16, batch_size=4)
    planned = weights_to_quantize(empty_model(model.config, model.dtype), recipe)
    report = quantize_model(model, recipe, calibration())
    assert planned == sum(layer.out_features * layer.in_features for layer in report.layers)


def test_what_the_user_skips_stays_float():
    config = build_model("llama").config
    whole = plan_output(config, QepConfig(), torch.float32)
    part = plan_output(config, QepConfig(skip_modules=["down_proj"]), torch.float32)
    assert part.linear_weights < whole.linear_weights and part.tensors > whole.tensors


def test_more_tokens_and_wider_layers_take_more_work():
    def work(width, rows):
        config = tf.LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, vocab_size=128)
        return count_operations(empty_model(config, torch.float32), QepConfig(num_samples=rows, seq_len=64))

    assert work(64, 8) < work(64, 64) and work(64, 8) < work(256, 8)


def test_a_recipe_that_cannot_be_had_is_refused_by_the_plan_too():
    with pytest.raises(ConfigError, match="divide"):
        plan_output(build_model("llama").config, QepConfig(group_size=48), torch.float32)
    with pytest.raises(ArchitectureError, match="list of blocks|nothing is left"):
        plan_output(tf.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8), QepConfig(), torch.float32)


def test_a_model_of_60_thousand_million_weights_takes_no_memory():
    config = tf.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256)
    model = empty_model(config, torch.bfloat16)
    assert all(p.is_meta for p in model.parameters()) and weights_to_quantize(model, QepConfig()) > 60e9
    assert torch.get_default_device() == torch.device("cpu")
