"""Saved and loaded again, a packed model gives the same logits bit for bit, however it is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_qep import QepConfig
from hf_qep.errors import CheckpointError
from hf_qep.formats import factored, sign
from hf_qep.modules import PackedTensors, packed_modules
from tests.plugin.conftest import Packed
from tests.plugin.packing import logits, pack_model
from tests.tiny_models import FAMILIES


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def fingerprints(folder: Path) -> dict[str, str]:
    """Hash of every weight file, and the quantisation config (after a load transformers writes more into the rest)."""
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    return hashes | {"config": str(json.loads((folder / "config.json").read_text())["quantization_config"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_found_and_the_logits_are_equal(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    loaded, info = type(saved.model).from_pretrained(saved.folder, output_loading_info=True)
    assert {what: names for what, names in info.items() if names} == {}
    assert saved.difference(loaded) == 0.0
    assert list(packed_modules(loaded)) == list(packed_modules(saved.model))
    assert not any(p.requires_grad for m in packed_modules(loaded).values() for p in m.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_save_writes_the_same_bytes(family: str, packed: Callable[[str], Packed], tmp_path: Path) -> None:
    saved = packed(family)
    type(saved.model).from_pretrained(saved.folder).save_pretrained(tmp_path)
    assert fingerprints(tmp_path) == fingerprints(saved.folder)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "vit"])
def test_a_copy_and_its_checkpoint_equal_the_original(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    twin = copy.deepcopy(type(saved.model).from_pretrained(saved.folder))
    twin.save_pretrained(tmp_path)
    assert saved.difference(twin) == 0.0
    assert fingerprints(tmp_path) == fingerprints(saved.folder)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "vit", "cohere2_vision"])
def test_a_checkpoint_in_shards_or_in_module_names_loads_equally(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    saved.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    saved.model.save_pretrained(tmp_path / "modules", save_original_format=False)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for folder in ("shards", "modules"):
        assert saved.difference(type(saved.model).from_pretrained(tmp_path / folder)) == 0.0, folder


@pytest.mark.parametrize(
    "spec",
    [
        sign.Spec(),
        sign.Spec(group_size=16),
        sign.Spec(group_size=16, column_scale=True),
        factored.Spec(24),
        factored.Spec(24, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_every_format_survives(
    spec: object, family: str, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    model, batch = pack_model(tiny_model(family), spec), tiny_batch(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert {m.spec for m in packed_modules(loaded).values()} == {spec}


def test_packed_tensors_keep_the_names_of_the_float_checkpoint(
    packed: Callable[[str], Packed], tiny_model: Callable, tmp_path: Path
) -> None:
    for family in ("vit", "bert", "gpt2", "cohere2_vision"):
        tiny_model(family).save_pretrained(tmp_path / family)
        companions = {n for n in stored_names(packed(family).folder) if n.endswith("_scale")}
        assert companions
        assert stored_names(packed(family).folder) - companions == stored_names(tmp_path / family), family
    experts = {n for n in stored_names(packed("qwen3_moe").folder) if ".0.mlp.experts." in n}
    assert {n.split("experts.")[1] for n in experts} == {
        f"{leaf}{end}" for leaf in ("gate_up_proj", "down_proj") for end in ("", ".weight_scale", ".column_scale")
    }


def test_a_mixture_of_packed_and_float_experts_survives(
    tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    model, batch = pack_model(tiny_model("qwen3_moe"), names=names), tiny_batch("qwen3_moe")
    model.save_pretrained(tmp_path)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored_names(tmp_path)
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in stored_names(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {what: found for what, found in info.items() if found} == {}
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    loaded.save_pretrained(tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(tmp_path)


def test_a_key_mapping_of_the_user_is_kept_and_needed_again(
    tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    model, batch = tiny_model("cohere2_vision"), tiny_batch("cohere2_vision")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {n.replace("model.language_model.", "text.", 1): t.clone() for n, t in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mapping = {r"^text\.": "model.language_model."}
    from_old = pack_model(type(model).from_pretrained(tmp_path, key_mapping=mapping))
    from_old.save_pretrained(tmp_path / "packed")
    assert "text.layers.0.mlp.up_proj.weight_scale" in stored_names(tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed", key_mapping=mapping)
    assert torch.equal(logits(loaded, batch), logits(from_old, batch))
    with pytest.raises(CheckpointError, match="missing"):
        type(model).from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"dtype": "auto"},
        {"use_safetensors": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_placement_does_not_change_the_logits(family: str, options: dict, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    assert saved.difference(AutoModelForCausalLM.from_pretrained(saved.folder, **options)) == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_weights_on_disk_give_the_same_logits_and_the_same_checkpoint(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    layer = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    children = {n for n, _ in saved.model.named_modules() if n.count(".") <= layer.count(".")}
    leaves = {n for n in children if n and not any(other.startswith(n + ".") for other in children)}
    placement = {n: "disk" if n == layer else "cpu" for n in leaves}
    loaded = AutoModelForCausalLM.from_pretrained(
        saved.folder, device_map=placement, offload_folder=tmp_path / "offload"
    )
    assert any(p.is_meta for p in loaded.get_submodule(layer).parameters())
    assert saved.difference(loaded) < 1e-5  # what comes from disk at every use is multiplied by the reference
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert saved.difference(again) == 0.0


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in FAMILIES), ("llama", torch.float16), ("qwen3_moe", torch.float16)],
    ids=str,
)
def test_a_dtype_saved_and_loaded_gives_the_same_logits(
    dtype: torch.dtype, family: str, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "float")
    model = pack_model(type(tiny_model(family)).from_pretrained(tmp_path / "float", dtype=dtype))
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_batch(family).items()}
    model.save_pretrained(tmp_path)
    for asked in (dtype, "auto"):
        loaded = type(model).from_pretrained(tmp_path, dtype=asked)
        assert torch.equal(logits(loaded, batch), logits(model, batch))
        scales = {p.dtype for m in packed_modules(loaded).values() for n, p in m.named_parameters() if "scale" in n}
        assert scales == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_in_another_dtype_keeps_every_stored_bit(dtype: torch.dtype, packed: Callable[[str], Packed]) -> None:
    saved = packed("llama")
    loaded = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=dtype)
    assert loaded.dtype == dtype
    for name, module in packed_modules(loaded).items():
        for leaf, tensor in module.tensors().items():
            assert torch.equal(tensor, saved.model.get_submodule(name).tensors()[leaf])


@pytest.mark.parametrize("family", ["llama", "cohere2", "qwen3_moe", "gpt2", "bert", "vit", "cohere2_vision"])
def test_the_body_alone_loads_and_saves(family: str, packed: Callable[[str], Packed], tmp_path: Path) -> None:
    saved = packed(family)
    body = AutoModel.from_pretrained(saved.folder)
    with torch.no_grad():
        expected = saved.model.base_model(**saved.batch)[0]
    assert torch.equal(logits(body, saved.batch), expected)
    body.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), saved.batch), expected)


def test_a_body_saved_alone_loads_under_a_head(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    saved = packed("llama")
    AutoModel.from_pretrained(saved.folder).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(packed_modules(whole)) == list(packed_modules(saved.model))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_a_classifier_on_a_causal_checkpoint_has_the_packed_body(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    classifier = AutoModelForSequenceClassification.from_pretrained(saved.folder, num_labels=3)
    assert torch.equal(logits(classifier.base_model, saved.batch), logits(saved.model.base_model, saved.batch))
    assert classifier(**saved.batch).logits.shape[-1] == 3


@pytest.mark.parametrize("family", ["qwen3", "cohere2", "cohere2_vision"])
def test_tied_embeddings_stay_tied_and_are_stored_once(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    loaded = type(saved.model).from_pretrained(saved.folder)
    assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert not any(n.startswith("lm_head") for n in stored_names(saved.folder))


def test_names_in_the_config_follow_the_renamings_of_the_family(
    packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed("vit")
    loaded = type(saved.model).from_pretrained(saved.folder)
    config = AutoConfig.from_pretrained(saved.folder)
    entry = config.quantization_config["layers"][0]
    entry["modules"] = [n.removesuffix(".weight_scale") for n in stored_names(saved.folder) if "weight_scale" in n]
    assert not any(n in dict(loaded.named_modules()) for n in entry["modules"])
    assert saved.difference(type(saved.model).from_pretrained(saved.folder, config=config)) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantising_gives_the_float_classes_and_nearly_the_same_logits(
    family: str, packed: Callable[[str], Packed], tiny_model: Callable, tmp_path: Path
) -> None:
    saved, original = packed(family), tiny_model(family)
    at_load = type(saved.model).from_pretrained(saved.folder, quantization_config=QepConfig(layers=[], dequantize=True))
    afterwards = type(saved.model).from_pretrained(saved.folder)
    afterwards.dequantize()
    for model in (at_load, afterwards):
        assert not any(isinstance(m, PackedTensors) for m in model.modules())
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
        assert not model.is_quantized
        assert not hasattr(model.config, "quantization_config")
        assert saved.difference(model) < 1e-4
        folder = tmp_path / ("at_load" if model is at_load else "afterwards")
        model.save_pretrained(folder)
        original.save_pretrained(tmp_path / "original")
        assert stored_names(folder) == stored_names(tmp_path / "original")
        assert torch.equal(logits(type(model).from_pretrained(folder), saved.batch), logits(model, saved.batch))
    assert isinstance(next(m for m in at_load.modules() if isinstance(m, nn.Linear)), nn.Linear)
