"""Columns made alike before signs are found, and what `export` restricts."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qep.architectures.feeds import FACTOR, FEEDS
from hf_qep.architectures.structure import describe
from hf_qep.config import QepConfig
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.equalizing import equalize
from hf_qep.engine.job import quantize_model
from hf_qep.errors import ArchitectureError, ConfigError
from hf_qep.formats import sign
from hf_qep.modules import packed_modules
from tests.engine.test_streaming import files, in_memory, streamed
from tests.export.conftest import BUILDERS, TOKENS, wide_model
from tests.tiny_models import build_model

IDS = torch.randint(3, TOKENS, (12, 48), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS[:2]).logits


def blocks_of(model, **options):
    return describe(model, {"input_ids": IDS[:1, :16]}, **options).blocks


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def stretched(model, seed=0):
    """The same function, with columns of widely different magnitudes."""
    generator = torch.Generator().manual_seed(seed)

    def spread(n):
        return torch.exp(torch.randn(n, generator=generator))

    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in FEEDS[model.config.model_type].items():
                factor = spread(128)
                layer.get_submodule(norm).weight.div_(factor)
                for name in readers:
                    layer.get_submodule(name).weight.mul_(factor)
            up, down = (layer.get_submodule(name) for name in FACTOR)
            factor = spread(256)
            up.weight.div_(factor[:, None])
            down.weight.mul_(factor)
    return model


@pytest.mark.parametrize("family", BUILDERS)
def test_the_model_computes_what_it_did_and_columns_are_alike(family):
    model = stretched(wide_model(family))
    before = logits(model)
    for block in blocks_of(model):
        factors = equalize(model, block, family)
        assert {ref.name.rpartition(".")[2] for ref in factors} == {
            *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
        }
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    for layer in model.model.layers:
        for readers in FEEDS[family].values():
            columns = sum(layer.get_submodule(name).weight.abs().sum(0) for name in readers)
            torch.testing.assert_close(columns, columns.mean().expand_as(columns), rtol=1e-4, atol=0)


def test_a_bias_of_up_goes_along():
    model = wide_model("llama", mlp_bias=True)
    before = logits(model)
    for block in blocks_of(model):
        equalize(model, block, "llama")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_where_a_reader_stays_float_the_norm_stays_as_it_is():
    model = wide_model("llama")
    before, norms = logits(model), [layer.input_layernorm.weight.clone() for layer in model.model.layers]
    for block in blocks_of(model, skip_modules=["k_proj"]):
        found = equalize(model, block, "llama")
        assert not any("q_proj" in ref.name for ref in found)
    for layer, norm in zip(model.model.layers, norms, strict=True):
        assert torch.equal(layer.input_layernorm.weight, norm)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_column_of_zeros_and_a_norm_of_zero_stay_finite():
    model = wide_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 0
            for name in FEEDS["llama"]["post_attention_layernorm"]:
                layer.get_submodule(name).weight[:, 5] = 0
            layer.mlp.down_proj.weight[:, 7] = 0
    before = logits(model)
    for block in blocks_of(model):
        equalize(model, block, "llama")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def quantized(model, **options):
    config = QepConfig(num_samples=12, seq_len=48, batch_size=4, **options)
    quantize_model(model, config, load_calibration(IDS, None, num_samples=12, seq_len=48, seed=0))
    return model


@pytest.mark.parametrize("residual", [True, False])
def test_the_answer_does_not_depend_on_how_magnitudes_are_spread_between_neighbours(residual):
    model = wide_model("cohere2")
    wanted = logits(model)
    plain = relative(logits(quantized(copy.deepcopy(model), export="gguf", residual=residual)), wanted)
    spread = relative(logits(quantized(stretched(copy.deepcopy(model)), export="gguf", residual=residual)), wanted)
    without = relative(logits(quantized(stretched(model), method="rtn", group_size=128, residual=residual)), wanted)
    assert spread < 1.05 * plain + 0.02
    assert without > 1.1 * spread


def test_linears_have_what_the_blocks_of_llama_cpp_hold():
    model = quantized(wide_model("qwen3"), export="gguf")
    modules = packed_modules(model).values()
    assert {module.spec for module in modules} == {sign.Spec(group_size=128)}
    assert len(modules) == 14
    assert model.config.quantization_config.export == "gguf"
    assert QepConfig(**model.config.quantization_config.to_dict()).export == "gguf"


def test_training_keeps_to_it():
    model = quantized(wide_model("cohere2"), export="gguf", distill_epochs=1)
    assert {module.spec for module in packed_modules(model).values()} == {sign.Spec(group_size=128)}


def test_what_it_does_not_know_is_refused_before_the_work():
    with pytest.raises(ArchitectureError, match="knows the families llama, .*, not 'gpt2'"):
        model = build_model("gpt2")
        model.config.vocab_size = TOKENS
        quantized(model.resize_token_embeddings(TOKENS) and model, export="gguf", group_size=128)
    with pytest.raises(ConfigError, match="down_proj` has 192 columns, and export=.* a multiple of 128"):
        quantized(wide_model("llama", intermediate_size=192), export="gguf")
    for options, match in [
        ({"export": "onnx"}, "export must be 'gguf' or None"),
        ({"export": "gguf", "method": "factored"}, "needs method `sign`"),
        ({"export": "gguf", "group_size": 64}, "multiple of 128"),
    ]:
        with pytest.raises(ConfigError, match=match):
            QepConfig(**options)
    assert QepConfig(export="gguf").group_size == 128
    assert QepConfig(export="gguf", group_size=256).group_size == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_block_by_block_it_becomes_the_same_files(tmp_path, dtype):
    wide_model("cohere2").to(dtype).save_pretrained(tmp_path / "m")
    config = QepConfig(export="gguf", dataset={"input_ids": IDS}, num_samples=12, batch_size=4)
    in_memory(tmp_path / "m", tmp_path / "whole", config)
    streamed(tmp_path / "m", tmp_path / "streamed", config, stream_budget=5000)
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")
