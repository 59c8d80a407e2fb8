"""Weights that are read block by block are those of a model that was loaded whole, and only one block is there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_qep.architectures.structure import describe
from hf_qep.engine.on_demand import load_on_demand
from hf_qep.engine.source import load_float_model
from hf_qep.errors import ArchitectureError, CheckpointError, NonFiniteError

FAMILIES = ["llama", "qwen3", "cohere2", "cohere2_vision", "qwen3_moe", "gpt2", "bert", "bert_classifier", "vit"]


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def tensors(module):
    """Parameters and buffers, those that are not stored among them."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def in_memory(model, blocks):
    """Names of the blocks that have weights."""
    return [n for n in blocks.names if not any(p.is_meta for p in model.get_submodule(n).parameters())]


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_that_of_from_pretrained(tiny_model, tmp_path, family, dtype, shard):
    saved(tiny_model(family).to(dtype), tmp_path / "m", max_shard_size=shard)
    whole, _ = load_float_model(tmp_path / "m")
    model, blocks, _ = load_on_demand(tmp_path / "m")
    assert type(model) is type(whole) and model.dtype == whole.dtype and not model.training
    assert in_memory(model, blocks) == []
    with blocks.holding_all():
        expected, found = tensors(whole), tensors(model)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert in_memory(model, blocks) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_structure_are_those_of_the_whole_model(tiny_model, tiny_batch, tmp_path, family):
    saved(tiny_model(family), tmp_path / "m")
    whole, _ = load_float_model(tmp_path / "m")
    model, blocks, _ = load_on_demand(tmp_path / "m")
    seen = []
    for name in blocks.names:
        member = model.get_submodule(name)
        member.register_forward_hook(lambda *_: seen.append(in_memory(model, blocks)), prepend=True)
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch(family))[0], whole(**tiny_batch(family))[0])
    assert seen == [[name] for name in blocks.names]
    one = {key: value[:1] for key, value in tiny_batch(family).items()}
    assert describe(model, one) == describe(whole, one)


def test_a_stand_in_for_a_block_reads_nothing_and_a_failed_pass_leaves_nothing(tiny_model, tiny_batch, tmp_path):
    model, blocks, _ = load_on_demand(saved(tiny_model("llama"), tmp_path / "m"))
    member = model.get_submodule(blocks.names[0])
    member.forward = lambda hidden, *args, **kwargs: hidden
    model.get_submodule(blocks.names[1]).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**tiny_batch("llama"))
    assert in_memory(model, blocks) == []


def test_weights_go_where_the_model_goes(tiny_model, tmp_path):
    saved(tiny_model("cohere2").to(torch.bfloat16), tmp_path / "m")
    whole, _ = load_float_model(tmp_path / "m")
    whole = whole.to(torch.float32)
    model, blocks, _ = load_on_demand(tmp_path / "m")
    blocks.place(None, torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with blocks.holding_all():
        found = tensors(model)
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors(whole).items())


def damaged(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_of_a_block_that_is_not_finite_is_found_as_it_is_read(tiny_model, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    damaged(saved(tiny_model("llama"), tmp_path / "m"), lambda state: state[name][3, 5:6].fill_(float("nan")))
    model, blocks, _ = load_on_demand(tmp_path / "m")
    with blocks.holding(blocks.names[0]):
        pass
    with pytest.raises(NonFiniteError, match=name), blocks.holding(blocks.names[1]):
        pass


def test_a_weight_of_a_block_that_is_missing_is_found_as_it_is_read(tiny_model, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    damaged(saved(tiny_model("llama"), tmp_path / "m"), lambda state: state.pop(name))
    _, blocks, _ = load_on_demand(tmp_path / "m")
    with pytest.raises(CheckpointError, match=f"lack 1 weights.*{name}"), blocks.holding(blocks.names[1]):
        pass


def test_a_weight_outside_the_blocks_that_is_missing_is_found_at_once(tiny_model, tmp_path):
    damaged(saved(tiny_model("llama"), tmp_path / "m"), lambda state: state.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        load_on_demand(tmp_path / "m")


def test_a_shard_that_vanishes_is_named(tiny_model, tmp_path):
    folder = saved(tiny_model("llama"), tmp_path / "m", max_shard_size="60KB")
    _, blocks, _ = load_on_demand(folder)
    for file in folder.glob("model-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model-0.*has changed"), blocks.holding(blocks.names[1]):
        pass
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="model-0.*gone"), blocks.holding(blocks.names[1]):
        pass


def test_a_model_without_a_list_of_blocks_is_refused(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    saved(model, tmp_path / "m")

    def none(model):
        raise ArchitectureError("no list")

    monkeypatch.setattr("hf_qep.engine.on_demand.block_list", none)
    with pytest.raises(ArchitectureError, match="no list"):
        load_on_demand(tmp_path / "m")
