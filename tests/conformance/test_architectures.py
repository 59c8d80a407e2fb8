"""Every family is described, observed and run block by block in the same way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_qep.architectures.access import get_bias, get_weight
from hf_qep.architectures.observe import LinearObserver
from hf_qep.architectures.skeleton import block_inputs, run_block
from hf_qep.architectures.structure import describe
from tests.conftest import FAMILIES

PARALLEL = [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]]
SEQUENTIAL = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
BERT = [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]
EXPECTED_GROUPS = {
    "llama": SEQUENTIAL,
    "qwen3": SEQUENTIAL,
    "cohere2": PARALLEL,
    "cohere2_vision": PARALLEL,
    "qwen3_moe": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_up_proj"] * 4, ["down_proj"] * 4],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "bert": BERT,
    "bert_classifier": BERT,
    "vit": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]],
}


def eager(model):
    """Experts as a loop of linears, for models that have them."""
    model.set_experts_implementation("eager")
    return model


def last_hidden(model, structure, batch):
    """Output of the last block in the model's own forward pass."""
    seen = []
    hook = model.get_submodule(structure.blocks[-1].name).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(**batch, use_cache=False) if hasattr(model.config, "use_cache") else model(**batch)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_one_tensor_form_a_group_and_groups_are_in_execution_order(family, tiny_model, tiny_batch):
    structure = describe(tiny_model(family), tiny_batch(family))
    for block in structure.blocks:
        leaves = [[ref.name.rpartition(".")[2] for ref in group.linears] for group in block.groups]
        assert leaves == EXPECTED_GROUPS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_one_by_one_give_exactly_the_models_hidden_states(family, tiny_model, tiny_batch):
    model = eager(tiny_model(family))
    structure = describe(model, tiny_batch(family))
    batches = [tiny_batch(family, seed=seed) for seed in (1, 2, 3)]
    inputs = block_inputs(model, structure, batches)
    for number, batch in enumerate(batches):
        hidden = inputs.first_hidden[number]
        for index, block in enumerate(structure.blocks):
            hidden = run_block(model, block, hidden, inputs.call(index, number, hidden.device))
        assert (hidden - last_hidden(model, structure, batch)).abs().max().item() == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_observer_sees_what_module_hooks_see(family, tiny_model, tiny_batch):
    model, batch = eager(tiny_model(family)), tiny_batch(family)
    refs = [ref for ref in describe(model, batch).linears() if ref.expert is None]
    by_hook, by_observer = {}, {}
    for ref in refs:
        module = model.get_submodule(ref.name)
        module.register_forward_pre_hook(lambda m, args, name=ref.name: by_hook.update({name: args[0].clone()}))
    weights = {ref: get_weight(model, ref) for ref in refs}
    with torch.no_grad(), LinearObserver(weights, lambda ref, x: by_observer.update({ref.name: x.clone()})):
        model(**batch)
    assert list(by_hook) == list(by_observer)
    for ref in refs:
        assert torch.equal(by_hook[ref.name].flatten(0, -2), by_observer[ref.name].flatten(0, -2))
        assert by_observer[ref.name].shape[-1] == ref.in_features


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_is_either_listed_or_skipped_with_a_reason(family, tiny_model, tiny_batch):
    model = tiny_model(family)
    structure = describe(model, tiny_batch(family))
    listed = {ref.name for ref in structure.linears()}
    for block in structure.blocks:
        for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
            if isinstance(module, nn.Linear):
                assert name in listed or structure.skipped[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_describing_leaves_the_model_as_it_was(family, tiny_model, tiny_batch):
    model = tiny_model(family).train()
    model.get_submodule(describe(model, tiny_batch(family)).blocks[0].name).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    experts, cache = model.get_experts_implementation(), getattr(model.config, "use_cache", None)
    describe(model, tiny_batch(family))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.get_experts_implementation() == experts
    assert getattr(model.config, "use_cache", None) == cache
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_views_oriented_out_by_in(family, tiny_model, tiny_batch):
    model = tiny_model(family)
    for ref in describe(model, tiny_batch(family)).linears():
        weight, bias = get_weight(model, ref), get_bias(model, ref)
        assert weight.shape == (ref.out_features, ref.in_features)
        assert bias is None or bias.shape == (ref.out_features,)
        before = weight.clone()
        weight.add_(1)
        assert torch.equal(get_weight(model, ref), before + 1), "writing into the view must change the model"


@pytest.mark.parametrize("family", ["llama", "cohere2", "cohere2_vision", "bert", "vit", "gpt2"])
def test_a_headless_model_has_the_same_linears_without_the_prefix(family, tiny_model, tiny_batch):
    model = tiny_model(family)
    headless = model.base_model
    assert headless is not model
    with_head = [ref.name for ref in describe(model, tiny_batch(family)).linears()]
    without = [f"{model.base_model_prefix}.{ref.name}" for ref in describe(headless, tiny_batch(family)).linears()]
    assert without == with_head


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_does_not_depend_on_dtype_or_batch_size(family, tiny_model, tiny_batch):
    model = tiny_model(family)
    small = describe(model, tiny_batch(family, batch_size=1))
    half_batch = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in tiny_batch(family).items()
    }
    assert describe(model.bfloat16(), half_batch) == small
