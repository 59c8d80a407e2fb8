"""config.json made to exhaust memory, to run code or to pass off one model for another."""

from __future__ import annotations

import pytest
import torch

from hf_qep.engine.source import check_checkpoint, check_finite, load_float_model
from hf_qep.errors import AlreadyQuantizedError, CheckpointError, NonFiniteError
from tests.hostile.conftest import edit_json


def lie(folder, **changes):
    edit_json(folder / "config.json", lambda config: config.update(changes))


@pytest.mark.parametrize("value", [0, -64, 2**31 + 1, 2**80, 64.0, "64", True, [64, -1]])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_impossible_sizes_are_refused_with_key_and_value(checkpoint, key, value):
    lie(checkpoint, **{key: value})
    with pytest.raises(CheckpointError, match=f"config.json has {key} = .*whole number from 1 to {2**31}"):
        check_checkpoint(checkpoint)


def test_impossible_sizes_are_found_in_nested_configs(checkpoint):
    lie(checkpoint, text_config={"deep": {"hidden_size": -1}})
    with pytest.raises(CheckpointError, match=r"text_config\.deep\.hidden_size = -1"):
        check_checkpoint(checkpoint)


def test_a_million_layers_are_refused_before_one_is_built(checkpoint):
    lie(checkpoint, num_hidden_layers=1_000_000)
    with pytest.raises(CheckpointError, match="num_hidden_layers = 1000000, but the files hold 21 tensors"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 2**30},
            r"'(lm_head|model.embed_tokens).weight' has shape \(128, 64\).*asks for \(1073741824, 64\)",
        ),
        ({"intermediate_size": 2**31, "hidden_size": 2**31}, "has shape|no model that can be built"),
        ({"hidden_size": 32}, "has shape"),
        ({"num_attention_heads": 7, "head_dim": None}, "no model that can be built|has shape"),
    ],
)
def test_a_model_that_the_files_do_not_hold_is_refused(checkpoint, changes, message):
    lie(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(checkpoint)


def test_more_weights_than_the_files_hold_are_refused_even_under_other_names(checkpoint):
    lie(checkpoint, architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=2048, n_layer=4, n_head=4)
    with pytest.raises(CheckpointError, match=r"describes \d+ weights, but the files hold 78144"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("model_type", ["no_such_model", None, 7])
def test_an_unknown_model_type_is_refused(checkpoint, model_type):
    lie(checkpoint, model_type=model_type)
    with pytest.raises(CheckpointError, match="describes no model that can be built"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("architecture", ["pipeline", "Trainer", "os", "AutoModel", "__doc__"])
def test_an_architecture_that_is_no_model_class_is_not_called(checkpoint, architecture):
    lie(checkpoint, architectures=[architecture])
    model, _ = load_float_model(checkpoint)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_code_of_the_checkpoint_is_not_run(checkpoint, tmp_path):
    marker = tmp_path / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    lie(checkpoint, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    for refused in (check_checkpoint, load_float_model):
        with pytest.raises(CheckpointError, match="no model that can be built"):
            refused(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "attn_implementation", "_experts_implementation"])
def test_a_config_that_asks_for_foreign_kernels_is_refused(checkpoint, key):
    lie(checkpoint, **{key: "somebody/kernel"})
    with pytest.raises(CheckpointError, match=f"{key} = 'somebody/kernel'"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({"quant_method": "qep", "bits": 1.0}, "qep"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 4}, "unknown"),
        ("x", "unknown"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_checkpoint_is_refused_by_its_method(checkpoint, entry, method, nested):
    lie(checkpoint, **({"text_config": {"quantization_config": entry}} if nested else {"quantization_config": entry}))
    with pytest.raises(AlreadyQuantizedError, match=f"'{method}'.*original float model.*dequantize"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tiny_model, tmp_path, value):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"1 weights .*'model\.layers\.1\.mlp\.down_proj\.weight'.*download"):
        load_float_model(tmp_path / "model")


def test_many_weights_that_are_not_finite_make_a_short_message(tiny_model):
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="21 weights.* and 16 more"):
        check_finite(model)


def test_a_weight_that_overflows_in_the_dtype_asked_for_is_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = 1e6
    model.save_pretrained(tmp_path / "model")
    assert load_float_model(tmp_path / "model")[0].dtype == torch.float32
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight.*float32"):
        load_float_model(tmp_path / "model", dtype="float16")
