"""A checkpoint that is not whole is refused with the names of its tensors, before any weight is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, FineGrainedFP8Config

from hf_qep import QepConfig
from hf_qep.errors import CheckpointError, FormatVersionError, UnknownNameError
from tests.plugin.conftest import Packed

UP = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def damaged(packed: Callable[[str], Packed], tmp_path: Path) -> Callable[..., Path]:
    """`damaged(family, change)`: copy of a checkpoint after `change(tensors)`; without a change, a plain copy."""

    def build(family: str, change: Callable[[dict[str, Tensor]], object] = dict) -> Path:
        folder = Path(shutil.copytree(packed(family).folder, tmp_path / "damaged", dirs_exist_ok=True))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return build


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", f"{UP}.weight"),
        ("llama", f"{UP}.weight_scale"),
        ("llama", f"{UP}.column_scale"),
        ("qwen3_moe", EXPERTS),
        ("qwen3_moe", f"{EXPERTS}.weight_scale"),
        ("bert", "bert.encoder.layer.1.output.dense.bias"),
        ("vit", "vit.encoder.layer.0.intermediate.dense.weight"),
    ],
)
def test_a_missing_tensor_is_named(family: str, name: str, packed: Callable, damaged: Callable) -> None:
    folder = damaged(family, lambda tensors: tensors.pop(name))
    expected = name.replace("encoder.layer.0.intermediate.dense", "layers.0.mlp.fc1") + (".weight" * (name == EXPERTS))
    with pytest.raises(CheckpointError, match=f"missing: `{expected}`"):
        type(packed(family).model).from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (f"{UP}.weight", lambda t: t[:, :1].contiguous(), r"I32 \[96, 1\] instead of int32 \[96, 2\]"),
        (f"{UP}.weight", lambda t: t.to(torch.int64), r"I64 \[96, 2\]"),
        (f"{UP}.weight", lambda t: t.float(), r"F32 \[96, 2\]"),
        (f"{UP}.weight_scale", lambda t: t.float(), r"F32 \[96, 1\] instead of float16 \[96, 1\]"),
        (f"{UP}.weight_scale", lambda t: t.flatten(), r"F16 \[96\]"),
        (f"{UP}.column_scale", lambda t: t[:32].clone(), r"F16 \[32\]"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_named(
    name: str, change: Callable[[Tensor], Tensor], told: str, damaged: Callable
) -> None:
    folder = damaged("llama", lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(CheckpointError, match=f"wrong shape or dtype: `{name} {told}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_that_no_format_knows_is_named(damaged: Callable) -> None:
    folder = damaged("llama", lambda tensors: tensors.update({f"{UP}.zero_point": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"not part of the format: `{UP}.zero_point`"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_signs_that_the_config_does_not_list_are_named(damaged: Callable) -> None:
    folder = damaged("llama")
    change_config(folder, lambda c: c["layers"][0]["modules"].remove(UP))
    with pytest.raises(CheckpointError, match=f"not listed in the quantization config: `{UP}.weight`"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_of_many_missing_tensors_the_first_are_named_and_the_rest_counted(damaged: Callable) -> None:
    folder = damaged("llama", lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("_scale")])
    with pytest.raises(CheckpointError, match="missing: `model.layers.0.self_attn.q_proj.weight_scale`.* and 24 more"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_truncated_file_is_refused(damaged: Callable) -> None:
    folder = damaged("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda c: c.update(format_version=99), FormatVersionError, "pip install --upgrade hf-qep"),
        (lambda c: c["layers"][0].update(format="ternary"), UnknownNameError, "unknown format `ternary`"),
        (lambda c: c["layers"][0].update(tiles=4), CheckpointError, "do not fit format `sign`"),
        (
            lambda c: c["layers"][0]["modules"].append("model.layers.9.fc"),
            CheckpointError,
            "`model.layers.9.fc`, which",
        ),
        (lambda c: c["layers"][0]["modules"].append("model.norm"), CheckpointError, "LlamaRMSNorm, which cannot"),
        (lambda c: c["layers"][0]["modules"].append("model.embed_tokens"), CheckpointError, "Embedding, which cannot"),
        (lambda c: c["layers"][0].pop("modules"), CheckpointError, "names no modules"),
        (lambda c: c["layers"][0].update(group_size=7), ValueError, "group size 7 does not divide"),
        (lambda c: c.update(layers=[]), CheckpointError, "not listed in the quantization config"),
    ],
)
def test_a_config_that_does_not_belong_to_the_files_is_refused(
    change: Callable[[dict], object], error: type[Exception], told: str, damaged: Callable
) -> None:
    folder = damaged("llama")
    change_config(folder, change)
    with pytest.raises(error, match=told):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_class_without_any_of_the_listed_modules_is_refused(damaged: Callable) -> None:
    folder = damaged("llama")
    change_config(folder, lambda c: c["layers"][0].update(modules=["decoder.block.0.up"]))
    with pytest.raises(CheckpointError, match="`decoder.block.0.up`, which LlamaModel does not have"):
        AutoModel.from_pretrained(folder)


def test_a_config_of_another_method_is_refused_by_transformers(packed: Callable[[str], Packed]) -> None:
    with pytest.raises(ValueError, match="quantized with QepConfig but you are passing a FineGrainedFP8Config"):
        AutoModelForCausalLM.from_pretrained(packed("llama").folder, quantization_config=FineGrainedFP8Config())


def test_a_state_dict_in_memory_must_be_whole_as_well(packed: Callable[[str], Packed]) -> None:
    saved = packed("llama")
    tensors = load_file(saved.folder / "model.safetensors")
    load = type(saved.model).from_pretrained
    whole = load(None, config=AutoConfig.from_pretrained(saved.folder), state_dict=dict(tensors))
    assert saved.difference(whole) == 0.0
    del tensors[f"{UP}.weight_scale"]
    with pytest.raises(CheckpointError, match=f"lacks tensors of packed modules: `{UP}.weight_scale`"):
        load(None, config=AutoConfig.from_pretrained(saved.folder), state_dict=tensors)


def test_unknown_keys_of_a_later_version_are_ignored(damaged: Callable, packed: Callable[[str], Packed]) -> None:
    folder = damaged("llama")
    change_config(folder, lambda c: c.update(a_later_option=[1, 2]))
    assert packed("llama").difference(AutoModelForCausalLM.from_pretrained(folder)) == 0.0


@pytest.mark.parametrize("option", ["dequantize", "trainable_scales"])
def test_weights_on_disk_can_be_neither_dequantised_nor_trained(
    option: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="puts some on disk"):
        AutoModelForCausalLM.from_pretrained(
            packed("llama").folder,
            quantization_config=QepConfig(layers=[], **{option: True}),
            device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"},
            offload_folder=tmp_path,
        )
