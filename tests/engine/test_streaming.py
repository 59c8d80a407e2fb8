"""A model that is read block by block becomes, byte for byte, what one in memory becomes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_qep.cli.job import quantize_and_save, stream_and_save
from hf_qep.config import QepConfig
from hf_qep.distill.teacher import take_teacher
from hf_qep.engine.calibration import calibration_of
from hf_qep.engine.headers import MANIFEST
from hf_qep.engine.job import quantize_model
from hf_qep.engine.on_demand import load_on_demand
from hf_qep.engine.source import load_float_model
from tests.tiny_models import VOCAB, build_batch

ROWS, LENGTH = 8, 16
RECIPES = {
    "llama": {"method": "rtn"},
    "qwen3": {"method": "sign", "embedding_bits": 8},
    "cohere2": {"method": "gptq"},
    "cohere2_vision": {"method": "rtn"},
    "qwen3_moe": {"method": "sign"},
    "gpt2": {"method": "onebit", "propagation": 0.5},
    "bert": {"method": "rtn"},
    "vit": {"method": "sign"},
}


def rows(family):
    if family in ("vit", "cohere2_vision"):
        return build_batch(family, batch_size=ROWS)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


def config(family="llama", **options):
    common = {"dataset": rows(family), "num_samples": ROWS, "batch_size": 3}
    return QepConfig(**common | RECIPES[family] | options)


def in_memory(folder, out, recipe, dtype=None, **options):
    model, tokenizer = load_float_model(folder)
    stored = model.dtype
    options |= {"stored_as": stored} if dtype else {}
    return quantize_and_save(model.to(dtype), tokenizer, recipe, out, base_model="base", base_folder=folder, **options)


def streamed(folder, out, recipe, dtype=None, **options):
    model, blocks, tokenizer = load_on_demand(folder)
    options |= {"stored_as": model.dtype} if dtype else {}
    blocks.place(None, dtype)
    return stream_and_save(model, blocks, tokenizer, recipe, out, base_model="base", base_folder=folder, **options)


def files(folder):
    """Contents of a folder; of the manifest without the times, which no two runs share."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found.pop(MANIFEST))
    manifest["report"].pop("seconds")
    return found, manifest


@pytest.mark.parametrize("family", RECIPES)
def test_the_files_are_those_of_a_model_in_memory(tiny_model, tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path / "m")
    in_memory(tmp_path / "m", tmp_path / "whole", config(family))
    saved = streamed(tmp_path / "m", tmp_path / "streamed", config(family), stream_budget=5000)
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "whole", "streamed"}
    assert saved.reloaded.is_quantized


TRAINING = {"distill_epochs": 1, "distill_signs": False}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2", "bert", "cohere2_vision"])
def test_a_model_whose_scales_train_at_the_end_is_read_block_by_block(tiny_model, tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path / "m")
    in_memory(tmp_path / "m", tmp_path / "whole", config(family, **TRAINING))
    saved = streamed(tmp_path / "m", tmp_path / "streamed", config(family, **TRAINING))
    assert saved.report.distillation.epoch == (family != "bert")  # which one epoch does not make any better
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")


def test_training_in_another_dtype_gives_the_same_files(tiny_model, tmp_path):
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    recipe = config("qwen3", **TRAINING)
    in_memory(tmp_path / "m", tmp_path / "whole", recipe, torch.float32)
    streamed(tmp_path / "m", tmp_path / "streamed", recipe, torch.float32)
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "bert"])
def test_the_stream_behind_the_last_block_says_what_the_float_model_says(tiny_model, monkeypatch, family):
    said = []

    def watch(model, config, inputs, teacher, *args, **options):
        said.append(teacher.said)

    monkeypatch.setattr("hf_qep.engine.job.distill_model", watch)
    model, recipe = tiny_model(family), config(family, **TRAINING)
    calibration = calibration_of(recipe, None, model)
    expected = take_teacher(model, calibration.batches(recipe.batch_size)).said
    quantize_model(model, recipe, calibration)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(said[0], expected)
    else:
        assert torch.equal(said[0].log_p, expected.log_p)


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", None)])
def test_the_files_are_the_same_whatever_it_is_computed_in(tiny_model, tmp_path, stored, computed):
    tiny_model("gpt2").to(getattr(torch, stored)).save_pretrained(tmp_path / "m")
    dtype = getattr(torch, computed) if computed else None
    for run, name in ((in_memory, "whole"), (streamed, "streamed")):
        run(tmp_path / "m", tmp_path / name, config("gpt2"), dtype)
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_weights_are_those_of_a_model_that_is_quantised_while_it_is_loaded(tiny_model, tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config(family))
    model.save_pretrained(tmp_path / "loaded")
    streamed(tmp_path / "m", tmp_path / "streamed", config(family))
    found, expected = (tmp_path / name / "model.safetensors" for name in ("streamed", "loaded"))
    assert found.read_bytes() == expected.read_bytes()


def test_shards_have_the_usual_names_and_contents(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m", max_shard_size="60KB")
    for way, name in ((in_memory, "whole"), (streamed, "streamed")):
        way(tmp_path / "m", tmp_path / name, config(), max_shard_size="40KB")
    found, made = files(tmp_path / "whole")[0], files(tmp_path / "streamed")[0]
    index, own = (json.loads(each.pop("model.safetensors.index.json")) for each in (found, made))
    assert len(set(index["weight_map"].values())) > 2
    assert made == found and own["weight_map"] == index["weight_map"]
    assert own["metadata"]["total_size"] == index["metadata"]["total_size"]


def test_the_result_does_not_depend_on_the_length_of_a_header(tiny_model, tmp_path):
    for name, pad in (("a", ""), ("b", "x" * 20)):
        tiny_model("vit").save_pretrained(tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt", "note": pad})
        in_memory(tmp_path / name, tmp_path / f"out-{name}", config("vit"))
    assert files(tmp_path / "out-a") == files(tmp_path / "out-b")
