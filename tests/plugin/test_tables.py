"""Packed embeddings and heads saved, loaded and used: ties, dtypes and bytes are those of the model that was saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_qep import QepConfig
from hf_qep.accounting import bits_report
from hf_qep.cli.inspect import describe_checkpoint
from hf_qep.engine.calibration import Calibration
from hf_qep.engine.job import quantize_model
from hf_qep.errors import CheckpointError
from hf_qep.modules import QepEmbedding, packed_tables
from tests.plugin.conftest import Packed
from tests.plugin.packing import logits
from tests.plugin.test_round_trip import fingerprints, stored_names

OPTIONS = {
    "llama": {"embedding_bits": 4, "head_bits": 8},
    "qwen3": {"embedding_bits": 4},
    "cohere2": {"head_bits": 8},
    "cohere2_vision": {"embedding_bits": 8},
    "qwen3_moe": {"embedding_bits": 8, "head_bits": 4},
    "gpt2": {"embedding_bits": 4},
    "bert": {"embedding_bits": 8},
    "bert_classifier": {"embedding_bits": 4},
}
TIED = ["qwen3", "cohere2", "cohere2_vision", "gpt2", "bert"]


def quantized(model: PreTrainedModel, batch: dict, **options: object) -> PreTrainedModel:
    config = QepConfig(method="rtn", num_samples=8, seq_len=16, **options)
    quantize_model(model, config, Calibration(batch, {}, "", batch["input_ids"].numel()))
    return model


@pytest.fixture(scope="module")
def packed(tiny_model: Callable, tiny_batch: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`packed(family)`: the saved checkpoint of a model with packed tables."""

    @cache
    def build(family: str) -> Packed:
        model = quantized(tiny_model(family), tiny_batch(family, batch_size=8), **OPTIONS[family])
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        batch = tiny_batch(family)
        return Packed(folder, model, batch, logits(model, batch))

    return build


@pytest.mark.parametrize("family", OPTIONS)
def test_a_checkpoint_loads_to_the_same_logits_and_saves_to_the_same_bytes(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    loaded, info = type(saved.model).from_pretrained(saved.folder, output_loading_info=True)
    assert {what: names for what, names in info.items() if names} == {}
    assert saved.difference(loaded) == 0.0
    assert list(packed_tables(loaded)) == list(packed_tables(saved.model)) != []
    assert bits_report(loaded, saved.folder) == bits_report(saved.model, saved.folder)
    loaded.save_pretrained(tmp_path)
    assert fingerprints(tmp_path) == fingerprints(saved.folder)


@pytest.mark.parametrize("family", TIED)
def test_a_tie_is_stored_once_and_restored(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    embedding, head = packed_tables(saved.model)
    listed = QepConfig(**json.loads((saved.folder / "config.json").read_text())["quantization_config"]).layer_specs()
    assert embedding in listed and head not in listed
    assert not any(name.startswith(f"{head}.") for name in stored_names(saved.folder))
    for model in (type(saved.model).from_pretrained(saved.folder), copy.deepcopy(saved.model)):
        model.tie_weights()
        assert model.get_submodule(head).weight is model.get_submodule(embedding).weight
        assert saved.difference(model) == 0.0
    if family == "bert":
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_is_not_that_of_the_scales(
    dtype: torch.dtype, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    model = quantized(tiny_model("qwen3"), tiny_batch("qwen3", batch_size=8), embedding_bits=8).to(dtype)
    assert model.dtype == model.model.dtype == dtype and model.model.embed_tokens(torch.tensor([1])).dtype == dtype
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for wanted in (dtype, torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **({} if wanted == dtype else {"dtype": wanted}))
        assert loaded.dtype == wanted and logits(loaded, tiny_batch("qwen3")).dtype == wanted


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere2_vision"])
def test_shards_and_module_names_load_equally(family: str, packed: Callable[[str], Packed], tmp_path: Path) -> None:
    saved = packed(family)
    saved.model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    saved.model.save_pretrained(tmp_path / "modules", save_original_format=False)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for folder in ("shards", "modules"):
        assert saved.difference(type(saved.model).from_pretrained(tmp_path / folder)) == 0.0, folder


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_model_without_its_head_loads_and_a_tied_head_comes_back(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    body = AutoModel.from_pretrained(saved.folder)
    wanted = saved.model.model(**saved.batch).last_hidden_state
    assert torch.equal(body(**saved.batch).last_hidden_state, wanted)
    if family in TIED:
        body.save_pretrained(tmp_path)
        whole, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and saved.difference(whole) == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tables_on_disk_give_the_same_logits_and_the_same_checkpoint(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    placement = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers": "cpu", "model.norm": "cpu"}
    placement["model.rotary_emb"] = "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(
        saved.folder, device_map=placement, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.embed_tokens.weight.is_meta and saved.difference(loaded) == 0.0
    loaded.save_pretrained(tmp_path / "again")
    assert saved.difference(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_dequantising_gives_plain_modules_that_answer_equally_and_stay_tied(
    family: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    saved = packed(family)
    plain = type(saved.model).from_pretrained(saved.folder).dequantize()
    kinds = {name: type(plain.get_submodule(name)) for name in packed_tables(saved.model)}
    assert set(kinds.values()) == {nn.Embedding, nn.Linear}
    assert saved.difference(plain) <= 1e-5
    weights = {id(plain.get_submodule(name).weight) for name in kinds}
    assert len(weights) == (1 if family in TIED else 2)
    plain.save_pretrained(tmp_path)
    again, info = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert {what: names for what, names in info.items() if names} == {} and saved.difference(again) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2"])
def test_a_loaded_model_writes_the_same_text(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    loaded = AutoModelForCausalLM.from_pretrained(saved.folder)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(**saved.batch, **options), saved.model.generate(**saved.batch, **options))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "embed_tokens"], "all-linear"], ids=str)
def test_adapters_train_on_top(targets: object, packed: Callable[[str], Packed], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    saved = packed("llama")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved.folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**saved.batch, labels=saved.batch["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.folder), tmp_path)
    assert torch.equal(logits(again, saved.batch), logits(model.eval(), saved.batch))


def test_resizing_the_vocabulary_is_refused_and_changes_nothing(packed: Callable[[str], Packed]) -> None:
    saved = packed("llama")
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    with pytest.raises(RuntimeError):  # torch: packed words cannot be a trainable embedding
        model.resize_token_embeddings(160)
    assert isinstance(model.model.embed_tokens, QepEmbedding) and saved.difference(model) == 0.0
    model.dequantize()
    assert model.resize_token_embeddings(160).num_embeddings == 160


@pytest.mark.parametrize("family", [family for family in OPTIONS if family != "qwen3_moe"])  # its width is padded
def test_inspect_agrees_with_the_model(family: str, packed: Callable[[str], Packed]) -> None:
    saved = packed(family)
    found, stored = describe_checkpoint(saved.folder), bits_report(saved.model, saved.folder)
    assert found["table_weights"] == stored["table_weights"]
    for key in ("bits_tables", "bits_model", "model_weights", "file_bytes"):
        assert found[key] == pytest.approx(stored[key], rel=1e-9), key
    assert {tuple(t["shape"]) for t in found["tables"]} == {(128, 64)}
    assert not {t["name"] for t in found["tables"]} & {x["name"].removesuffix(".weight") for x in found["skipped"]}


def test_a_scaled_word_embedding_survives_loading_and_dequantising(tiny_batch: Callable, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 128}
    torch.manual_seed(0)
    model = tf.GemmaForCausalLM(tf.GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    batch = tiny_batch("llama")
    quantized(model, batch, embedding_bits=8).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.embed_tokens.embed_scale == 32**0.5
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    plain = loaded.dequantize()
    assert type(plain.model.embed_tokens).__name__ == "GemmaTextScaledWordEmbedding"
    assert (logits(plain, batch) - logits(model, batch)).abs().max() <= 1e-5


def damaged(saved: Packed, folder: Path, change: Callable[[dict], None]) -> Path:
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((saved.folder / name).read_bytes())
    tensors = load_file(saved.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.embed_tokens.weight"), "missing: `model.embed_tokens.weight`, `lm_head.weight`"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(128, 64)}), "wrong shape or dtype"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(128, 4, dtype=torch.int32)}), "wrong shape"),
        (lambda t: t.update({"model.embed_tokens.scale": torch.zeros(1)}), "not part of the format"),
    ],
)
def test_a_damaged_table_is_named(
    change: Callable, message: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged(packed("qwen3"), tmp_path, change))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"format": "sign", "modules": ["model.embed_tokens"]},
            "class Embedding, which cannot be packed in format `sign`",
        ),
        ({"format": "integer", "bits": 4, "modules": ["model.norm"]}, "class Qwen3RMSNorm, which cannot be packed"),
        ({"format": "integer", "bits": 3, "modules": ["model.embed_tokens"]}, "one of 4, 8"),
        ({"format": "integer", "modules": ["model.embed_tokens"]}, "do not fit format `integer`"),
    ],
)
def test_a_config_that_lies_about_a_table_is_refused(
    entry: dict, message: str, packed: Callable[[str], Packed], tmp_path: Path
) -> None:
    folder = damaged(packed("qwen3"), tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"] = [entry]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
