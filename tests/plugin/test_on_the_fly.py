"""`from_pretrained(float checkpoint, quantization_config=QepConfig(...))` through the engine, and back from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_qep import QepConfig
from hf_qep.accounting import bits_report
from hf_qep.errors import CalibrationError, ConfigError
from hf_qep.modules import packed_modules
from tests.plugin.packing import logits
from tests.tiny_models import FAMILIES

SMALL = {"num_samples": 8, "seq_len": 16, "batch_size": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer")


@pytest.fixture(scope="session")
def float_folder(
    tiny_model: Callable, tiny_tokenizer: object, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`float_folder(family)`: float checkpoint with a tokenizer."""
    folders: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(f"float_{family}")
            tiny_model(family).save_pretrained(folders[family])
            tiny_tokenizer.save_pretrained(folders[family])
        return folders[family]

    return build


def inputs(family: str, tiny_batch: Callable) -> dict[str, Tensor]:
    return tiny_batch(family, seed=1, batch_size=8)


def test_a_budget_is_spent_while_loading(float_folder: Callable, tiny_batch: Callable, tmp_path: Path) -> None:
    config = QepConfig(method="auto", bits=1.6, dataset=inputs("llama", tiny_batch), **SMALL)
    model = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    assert 1.56 < bits_report(model, tmp_path)["bits_linear"] <= 1.6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tiny_batch("llama")), logits(model, tiny_batch("llama")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_checkpoint_becomes_a_packed_one(
    family: str, float_folder: Callable, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    config = QepConfig(dataset=inputs(family, tiny_batch), **SMALL)
    kind = type(tiny_model(family))
    model = kind.from_pretrained(float_folder(family), quantization_config=config)
    names = list(packed_modules(model))
    assert names
    assert model.is_quantized
    assert config.layers is None, "the user's own object may be used again"
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {what: found for what, found in info.items() if found} == {}
    assert list(packed_modules(loaded)) == names
    assert torch.equal(logits(loaded, tiny_batch(family)), logits(model, tiny_batch(family)))


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}], ids=str)
def test_placement_and_dtype_are_respected(options: dict, float_folder: Callable, tiny_batch: Callable) -> None:
    config = QepConfig(dataset=inputs("llama", tiny_batch), **SMALL)
    model = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config, **options)
    assert packed_modules(model)
    assert model.dtype == options.get("dtype", torch.float32)
    assert torch.isfinite(logits(model, tiny_batch("llama"))).all()


def test_the_dict_form_and_text_the_model_writes_itself(float_folder: Callable) -> None:
    config = {"quant_method": "qep", "method": "rtn", **SMALL}
    model = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config)
    assert packed_modules(model)
    assert model.config.quantization_config.method == "rtn"


@pytest.mark.parametrize("tokenizer", ["of the model", "object", "folder"])
def test_text_is_read_with_the_tokenizer(tokenizer: str, float_folder: Callable, tmp_path: Path) -> None:
    folder = float_folder("llama")
    given = {"of the model": None, "object": AutoTokenizer.from_pretrained(folder), "folder": str(folder)}[tokenizer]
    texts = ["The quick brown fox jumps over the lazy dog. " * 4] * 4
    config = QepConfig(method="rtn", dataset=texts, tokenizer=given, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert packed_modules(model)
    model.save_pretrained(tmp_path)


def test_text_without_any_tokenizer_is_refused(tiny_model: Callable, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QepConfig(dataset=["some text"], **SMALL))


def test_one_config_serves_two_models(float_folder: Callable, tiny_batch: Callable) -> None:
    config = QepConfig(method="rtn", dataset=inputs("llama", tiny_batch), **SMALL)
    first = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config)
    listed = first.config.quantization_config.layers
    second = AutoModelForCausalLM.from_pretrained(float_folder("cohere2"), quantization_config=config)
    assert first.config.quantization_config.layers == listed
    assert second.config.quantization_config.layers != listed


def test_skipped_modules_stay_float(float_folder: Callable, tiny_batch: Callable, tmp_path: Path) -> None:
    config = QepConfig(method="rtn", dataset=inputs("llama", tiny_batch), skip_modules=["down_proj"], **SMALL)
    model = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config)
    assert not any("down_proj" in name for name in packed_modules(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tiny_batch("llama")), logits(model, tiny_batch("llama")))


def test_quantising_with_weights_on_disk_is_refused(float_folder: Callable, tmp_path: Path) -> None:
    placement = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ConfigError, match="puts some on disk"):
        AutoModelForCausalLM.from_pretrained(
            float_folder("llama"), quantization_config=QepConfig(), device_map=placement, offload_folder=tmp_path
        )


def test_scales_can_train_right_after_quantising(float_folder: Callable, tiny_batch: Callable) -> None:
    config = QepConfig(method="rtn", dataset=inputs("llama", tiny_batch), trainable_scales=True, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config)
    assert model.hf_quantizer.is_qat_trainable
    scales = [m.weight_scale for m in packed_modules(model).values()]
    assert all(s.requires_grad and s.dtype == torch.float32 for s in scales)


def test_a_pipeline_quantises_while_it_loads(float_folder: Callable, tiny_batch: Callable) -> None:
    config = QepConfig(method="rtn", dataset=inputs("llama", tiny_batch), **SMALL)
    options = {"quantization_config": config}
    pipe = pipeline("text-generation", str(float_folder("llama")), model_kwargs=options, device="cpu")
    assert packed_modules(pipe.model)
    assert pipe("abc", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("abc")


def test_a_dequantised_model_has_the_logits_of_the_packed_one(float_folder: Callable, tiny_batch: Callable) -> None:
    config = QepConfig(dataset=inputs("llama", tiny_batch), **SMALL)
    model = AutoModelForCausalLM.from_pretrained(float_folder("llama"), quantization_config=config)
    before = logits(model, tiny_batch("llama"))
    model.dequantize()
    assert not packed_modules(model)
    assert (logits(model, tiny_batch("llama")) - before).abs().max() < 1e-4
