"""What vLLM asks before it builds a model, how the plugin gets to it, and what is refused there."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_qep import vllm_plugin
from hf_qep.config import FORMAT_VERSION, QepConfig
from hf_qep.errors import CheckpointError, ConfigError, ExtraMissingError, FormatVersionError, UnknownNameError
from hf_qep.formats import sign
from tests.vllm_plugin.conftest import LAYERS, forget
from tests.vllm_plugin.test_layers import FACTORED, SIGN, config_of

ROOT = Path(__file__).resolve().parents[2]


def stored(**changes: Any) -> dict[str, Any]:
    """`quantization_config` of a checkpoint with one packed linear."""
    config = QepConfig(layers=[])
    config.set_layers({"model.layers.0.mlp.down_proj": SIGN})
    return config.to_dict() | changes


def test_the_entry_point_leads_to_register():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["qep"].partition(":")
    assert getattr(sys.modules[module], name) is vllm_plugin.register


def test_registering_again_changes_nothing(vllm):
    first = vllm.quantization.get_quantization_config("qep")
    vllm_plugin.register()
    vllm_plugin.register()
    assert vllm.quantization.get_quantization_config("qep") is first
    assert vllm.quantization.QUANTIZATION_METHODS.count("qep") == 1


def test_vllm_learns_what_it_asks(vllm):
    config = vllm.quantization.get_quantization_config("qep").from_config(stored())
    assert isinstance(config, vllm.quantization.QuantizationConfig)
    assert config.get_name() == "qep" and config.get_config_filenames() == [] and config.get_min_capability() == 80
    assert {torch.float16, torch.bfloat16} <= set(config.get_supported_act_dtypes())


def test_configs_travel_to_other_processes(vllm):
    config = config_of({"model.layers.0.mlp.down_proj": FACTORED})
    vllm.oot.clear()
    copy = pickle.loads(pickle.dumps(config))
    assert type(copy) is type(config) and copy.specs == config.specs
    assert "VocabParallelEmbedding" in vllm.oot, "a process that only unpickles the config serves its tables too"


def test_the_layer_class_of_another_plugin_stays(vllm):
    vllm.oot["VocabParallelEmbedding"] = other = type("Other", (vllm.tables.VocabParallelEmbedding,), {})
    vllm.quantization.get_quantization_config("qep").from_config(stored())
    assert vllm.oot["VocabParallelEmbedding"] is other


@pytest.mark.parametrize(
    ("listed", "asked"),
    [
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),  # saved from a class without a head
        ("model.layers.0.mlp.down_proj", "layers.0.mlp.down_proj"),
        ("model.language_model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
    ],
)
def test_modules_are_found_by_their_names_in_vllm(vllm, listed, asked):
    config = config_of({listed: SIGN})
    config.apply_vllm_mapper(
        vllm.utils.WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    )
    with vllm.at(0, 1):
        layer = vllm.linear.RowParallelLinear(96, 40, False, quant_config=config, prefix=asked)
        other = vllm.linear.RowParallelLinear(96, 40, False, quant_config=config, prefix=asked.replace("0", "1"))
    assert layer.weight.numel() == 0 and other.weight.shape == (40, 96)


def test_a_newer_checkpoint_is_refused(vllm):
    method = vllm.quantization.get_quantization_config("qep")
    with pytest.raises(FormatVersionError, match="pip install --upgrade hf-qep"):
        method.from_config(stored(format_version=FORMAT_VERSION + 1))


@pytest.mark.parametrize("layers", [None, []])
def test_a_recipe_is_no_checkpoint(vllm, layers):
    method = vllm.quantization.get_quantization_config("qep")
    with pytest.raises(CheckpointError, match="lists no `layers`"):
        method.from_config(stored(layers=layers))


def test_entries_of_layers_that_mean_nothing_are_refused(vllm):
    method = vllm.quantization.get_quantization_config("qep")
    with pytest.raises(UnknownNameError, match="unknown format `ternary`"):
        method.from_config(stored(layers=[{"format": "ternary", "modules": ["a"]}]))
    with pytest.raises(CheckpointError, match="names no modules"):
        method.from_config(stored(layers=[{"format": "sign"}]))


def test_packed_experts_are_refused_before_the_model_is_built(vllm):
    method = vllm.quantization.get_quantization_config("qep")
    layers = [{"format": "sign", "modules": ["model.layers.0.mlp.experts.gate_up_proj"]}]
    with pytest.raises(ConfigError, match=r"experts.gate_up_proj` is a packed stack of experts"):
        method.from_config(stored(layers=layers))


def test_two_embeddings_without_a_name_cannot_be_told_apart(vllm):
    table = {"format": "integer", "bits": 8, "group_size": None}
    config = vllm.quantization.get_quantization_config("qep").from_config(
        stored(layers=[table | {"modules": ["model.embed_tokens", "model.other_tokens"]}])
    )
    with vllm.at(0, 1), pytest.raises(ConfigError, match="a table without a name"):
        vllm.tables.VocabParallelEmbedding(128, 64, quant_config=config)


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    forget()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ExtraMissingError, match="`vllm`, which is not installed; run: pip install"):
        vllm_plugin.register()


@pytest.mark.parametrize("module", [f"{LAYERS}.quantization", f"{LAYERS}.linear"])
def test_a_vllm_with_other_interfaces_is_named_with_its_version(vllm, monkeypatch, module):
    if vllm.real:
        pytest.skip("the installed one is new enough")
    forget()
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.4.1", raising=False)
    with pytest.raises(ConfigError, match=r"vLLM 0\.4\.1 has no `vllm.*pip install 'vllm>=0\.33'"):
        vllm_plugin.register()
        config_of({"a": SIGN}).get_quant_method(torch.nn.Linear(1, 1), "a")


def test_importing_the_package_imports_no_plugin():
    code = "import sys, hf_qep, hf_qep.vllm_plugin as p; print('hf_qep.vllm_plugin.config' in sys.modules)"
    code = f"import sys, hf_qep; print('hf_qep.vllm_plugin' in sys.modules); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_rounded_activations_are_those_of_the_checkpoint(vllm):
    config = vllm.quantization.get_quantization_config("qep").from_config(stored(activation="int8"))
    with vllm.at(0, 1):
        layer = vllm.linear.RowParallelLinear(96, 40, False, quant_config=config, prefix="model.layers.0.mlp.down_proj")
    assert layer.qep_parts[0].activation == "int8" and layer.qep_parts[0].spec == sign.Spec(column_scale=True)
