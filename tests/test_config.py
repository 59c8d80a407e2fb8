from __future__ import annotations

import copy
import json

import pytest
import torch

from hf_qep.config import FORMAT_VERSION, QepConfig
from hf_qep.errors import CheckpointError, ConfigError, FormatVersionError, UnknownNameError
from hf_qep.formats import factored, sign


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bits", 0.1),
        ("bits", 16),
        ("bits", "1"),
        ("bits", float("nan")),
        ("propagation", 1.5),
        ("propagation", -0.1),
        ("damping", 0.0),
        ("num_samples", 0),
        ("seq_len", 2.5),
        ("batch_size", True),
        ("seed", -1),
        ("group_size", 0),
        ("skip_modules", "lm_head"),
        ("output_curvature", "yes"),
        ("embedding_bits", 3),
        ("embedding_bits", 4.0),
        ("head_bits", True),
        ("head_bits", "8"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_name_and_value(option, value):
    with pytest.raises(ConfigError) as caught:
        QepConfig(**{option: value})
    assert option in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "auto", "max_memory": "much"}, "14GB.*'much'"),
        ({"method": "auto", "max_memory": 0}, "14GB.*0"),
        ({"method": "sign", "max_memory": "1GB"}, "needs method `auto`.*`sign`"),
        ({"method": "auto", "group_size": 64}, "leave group_size=64 out"),
        ({"method": "auto", "bits": 3.0}, "bits"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        QepConfig(**options)


def test_an_unknown_method_names_the_known_ones_and_the_nearest():
    with pytest.raises(UnknownNameError, match=r"sgin.*onebit.*did you mean `sign`"):
        QepConfig(method="sgin")


def test_a_newer_format_version_asks_for_an_upgrade():
    with pytest.raises(FormatVersionError, match="pip install --upgrade hf-qep"):
        QepConfig.from_dict({"quant_method": "qep", "format_version": FORMAT_VERSION + 1, "layers": []})


def test_layers_survive_json_grouped_by_equal_spec():
    specs = {"a": sign.Spec(128, True), "b": factored.Spec(64), "c": sign.Spec(128, True)}
    config = QepConfig()
    config.set_layers(specs)
    again = QepConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert len(again.layers) == 2
    assert again.layer_specs() == specs


@pytest.mark.parametrize(
    "layers",
    [
        [{"format": "nope", "modules": []}],
        [{"format": "sign", "modules": [], "colour": 1}],
        [{"format": "sign"}],
        [3],
        [{"format": "factored", "rank": "8", "modules": []}],
        [{"format": "sign", "group_size": 0, "modules": []}],
    ],
)
def test_layers_that_make_no_sense_are_refused(layers):
    with pytest.raises((CheckpointError, ConfigError, UnknownNameError)):
        QepConfig(layers=layers)


def test_a_checkpoint_of_an_unknown_method_loads_as_long_as_its_format_is_known():
    config = QepConfig(method="invented-later", layers=[{"format": "sign", "modules": ["a"]}])
    assert config.layer_specs() == {"a": sign.Spec()}


def test_run_time_values_are_shared_by_copies_and_absent_from_the_file():
    data = [torch.zeros(1, 4, dtype=torch.long)]
    config = QepConfig(dataset=data, tokenizer=(x for x in ()), dequantize=True)
    assert copy.deepcopy(config).dataset is data
    stored = config.to_dict()
    assert stored["dataset"] is None and not {"tokenizer", "dequantize", "trainable_scales"} & stored.keys()
    assert config.get_loading_attributes() == {"dequantize": True, "trainable_scales": False}


def test_unknown_keys_of_a_later_version_are_ignored():
    assert QepConfig.from_dict({"quant_method": "qep", "later": 1}).bits == 1.0
