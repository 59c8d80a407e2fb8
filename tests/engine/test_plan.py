"""The plan from a configuration alone against what a run really writes."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from hf_qep.accounting import bits_report
from hf_qep.config import QepConfig
from hf_qep.engine.job import quantize_model
from hf_qep.engine.plan import plan_quantization
from hf_qep.errors import ArchitectureError, ConfigError
from tests.engine.test_job import calibration
from tests.tiny_models import build_model

TEXT = ["llama", "qwen3", "cohere2", "gpt2", "qwen3_moe"]


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("method", ["sign", "gptq"])
def test_planned_bytes_and_bits_are_those_of_the_quantised_model(family, method):
    model = build_model(family)
    recipe = QepConfig(method=method, num_samples=12, seq_len=16, batch_size=4)
    plan = plan_quantization(model.config, recipe, dtype=model.dtype)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    quantize_model(model, recipe, calibration())
    found = bits_report(model)
    assert plan.bits_linear == pytest.approx(found["bits_linear"], rel=1e-9)
    assert plan.quantized_weights == found["linear_weights"]
    assert plan.file_bytes == pytest.approx(found["weight_bytes"], rel=1e-3)


def test_what_the_user_skips_stays_float():
    config = build_model("llama").config
    whole = plan_quantization(config, QepConfig())
    part = plan_quantization(config, QepConfig(skip_modules=["down_proj"]))
    assert part.quantized_weights < whole.quantized_weights and part.file_bytes > whole.file_bytes


def test_command_a_is_planned_in_a_moment_without_its_weights():
    config = tf.Cohere2Config(
        hidden_size=12288, intermediate_size=36864, num_hidden_layers=64, num_attention_heads=96, num_key_value_heads=8,
        vocab_size=256000,
    )  # fmt: skip
    plan = plan_quantization(config, QepConfig(num_samples=256, seq_len=2048), rate=1e14)
    assert plan.parameters == pytest.approx(111e9, rel=0.01)
    assert 1.0 < plan.bits_linear < 1.01 and plan.bits_model < 1.5
    assert plan.kept == ("model.embed_tokens",)
    assert plan.memory_bytes > plan.float_bytes and plan.seconds == pytest.approx(plan.operations / 1e14)


def test_more_tokens_and_wider_layers_take_more_memory_and_work():
    def config(width):
        return tf.LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, vocab_size=128)

    small = plan_quantization(config(64), QepConfig(num_samples=8, seq_len=64))
    long = plan_quantization(config(64), QepConfig(num_samples=64, seq_len=64))
    wide = plan_quantization(config(256), QepConfig(num_samples=8, seq_len=64))
    for name in ("memory_bytes", "operations"):
        assert getattr(small, name) < getattr(long, name) and getattr(small, name) < getattr(wide, name)


def test_a_recipe_that_cannot_be_had_is_refused_by_the_plan_too():
    with pytest.raises(ConfigError, match="divide"):
        plan_quantization(build_model("llama").config, QepConfig(group_size=48))
    with pytest.raises(ArchitectureError, match="list of blocks|nothing is left"):
        plan_quantization(tf.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8), QepConfig())


def test_planning_allocates_no_weights():
    config = tf.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256)
    before = torch.get_default_device()
    plan = plan_quantization(config, QepConfig())
    assert plan.parameters > 60e9 and torch.get_default_device() == before
