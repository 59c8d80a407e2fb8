"""`inspect` agrees with what is stored, reads no weights, and refuses what it cannot read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_qep.cli.inspect import describe_checkpoint
from hf_qep.errors import CheckpointError
from hf_qep.formats import factored, sign
from tests.cli.test_commands import refusal, run

OUT, IN = 8, 40  # 40 is no multiple of 32: the last word is padded


def write_checkpoint(folder, tensors, layers=None):
    """A checkpoint folder with these tensors; layers as QepConfig stores them."""
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["Tiny"]}
    if layers is not None:
        config["quantization_config"] = {"quant_method": "qep", "method": "sign", "layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def zeros(module, spec, prefix):
    return {f"{prefix}.{n}": torch.zeros(s, dtype=d) for n, (s, d) in module.layout(spec, OUT, IN).items()}


@pytest.mark.parametrize(
    ("module", "spec"),
    [(sign, sign.Spec(column_scale=True)), (factored, factored.Spec(rank=16))],
    ids=["sign", "factored"],
)
def test_bits_of_a_layer_are_those_of_its_format(tmp_path, module, spec):
    embedding = {"embed.weight": torch.zeros(10, IN, dtype=torch.bfloat16)}
    entry = {"format": module.NAME, "modules": ["block.proj"]}
    found = describe_checkpoint(
        write_checkpoint(tmp_path / "c", zeros(module, spec, "block.proj") | embedding, [entry])
    )
    stored = module.stored_bits(spec, OUT, IN)
    (layer,) = found["layers"]
    assert layer["shape"] == [OUT, IN]
    assert layer["bytes"] * 8 == stored
    assert found["bits_linear"] == pytest.approx(stored / (OUT * IN))
    assert found["bits_model"] == pytest.approx((stored + 16 * 10 * IN) / (OUT * IN + 10 * IN))
    assert [x["name"] for x in found["skipped"]] == ["embed.weight"]
    assert found["format"] == [module.NAME]


def test_a_stack_of_experts_counts_every_expert(tmp_path):
    spec, name = sign.Spec(column_scale=True), "mlp.experts.up"
    stacked = {n: torch.stack([t] * 3) for n, t in zeros(sign, spec, name).items()}
    stacked[name] = stacked.pop(f"{name}.weight")
    found = describe_checkpoint(write_checkpoint(tmp_path / "c", stacked, [{"format": "sign", "modules": [name]}]))
    assert found["layers"][0]["shape"] == [3, OUT, IN]
    assert found["bits_linear"] == pytest.approx(sign.stored_bits(spec, OUT, IN) / (OUT * IN))
    assert found["skipped"] == []


def test_a_bias_is_not_counted_as_part_of_the_packed_weight(tmp_path):
    spec = sign.Spec(column_scale=True)
    tensors = zeros(sign, spec, "proj") | {"proj.bias": torch.zeros(OUT)}
    found = describe_checkpoint(write_checkpoint(tmp_path / "c", tensors, [{"format": "sign", "modules": ["proj"]}]))
    assert found["layers"][0]["bytes"] * 8 == sign.stored_bits(spec, OUT, IN)
    assert found["bits_model"] > found["bits_linear"]


def test_layers_stored_under_names_of_another_version_are_found(tmp_path):
    tensors = zeros(sign, sign.Spec(column_scale=True), "encoder.layer.0.query")
    entry = {"format": "sign", "modules": ["layers.0.q_proj"]}
    (layer,) = describe_checkpoint(write_checkpoint(tmp_path / "c", tensors, [entry]))["layers"]
    assert (layer["name"], layer["shape"], layer["format"]) == ("encoder.layer.0.query", [OUT, IN], "sign")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float32, 32)])
def test_a_float_checkpoint_has_the_bits_of_its_dtype(tmp_path, dtype, bits):
    found = describe_checkpoint(write_checkpoint(tmp_path / "c", {"proj.weight": torch.zeros(OUT, IN, dtype=dtype)}))
    assert found["bits_linear"] == found["bits_model"] == bits
    assert found["method"] is None
    assert found["layers"] == []


def test_json_has_the_promised_keys(tmp_path):
    folder = write_checkpoint(tmp_path / "c", {"proj.weight": torch.zeros(OUT, IN)})
    found = json.loads(run("inspect", folder, "--json").stdout)
    promised = {"bits_linear", "bits_model", "file_bytes", "method", "format", "layers", "skipped"}
    assert promised <= found.keys()
    assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_tables_show_layers_and_sizes(tmp_path):
    layers = [{"format": "sign", "modules": ["proj"]}]
    folder = write_checkpoint(tmp_path / "c", zeros(sign, sign.Spec(column_scale=True), "proj"), layers)
    shown = run("inspect", folder).stdout
    assert f"{OUT} x {IN}" in shown
    assert "proj" in shown


def test_a_folder_without_config_is_refused(tmp_path):
    assert "config.json" in refusal(run("inspect", tmp_path))


def test_a_truncated_file_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "c", {"proj.weight": torch.zeros(OUT, IN)})
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refusal(run("inspect", folder))


def test_fewer_packed_layers_than_the_config_lists_are_refused(tmp_path):
    tensors = zeros(sign, sign.Spec(), "a")
    folder = write_checkpoint(tmp_path / "c", tensors, [{"format": "sign", "modules": ["a", "b"]}])
    with pytest.raises(CheckpointError, match="lists 2 quantised modules, but the files hold 1"):
        describe_checkpoint(folder)


def test_scales_without_signs_are_refused(tmp_path):
    folder = write_checkpoint(
        tmp_path / "c", {"a.weight_scale": torch.zeros(2, 1)}, [{"format": "sign", "modules": ["a"]}]
    )
    with pytest.raises(CheckpointError, match="no packed signs"):
        describe_checkpoint(folder)
