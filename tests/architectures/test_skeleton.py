"""The stub pass and the observer: what they record, what they share, what they put back."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn import functional

from hf_qep.architectures.access import get_weight
from hf_qep.architectures.observe import LinearObserver, StopForward
from hf_qep.architectures.skeleton import TensorPool, block_inputs, run_block
from hf_qep.architectures.structure import describe


def masks(inputs, block, batches):
    return [inputs.calls[block][b].kwargs["attention_mask"] for b in range(batches)]


def test_each_block_is_given_its_own_mask(tiny_model, tiny_batch):
    model = tiny_model("cohere2")
    inputs = block_inputs(model, describe(model, tiny_batch("cohere2")), [tiny_batch("cohere2")])
    sliding, full, sliding_again = (masks(inputs, block, 1)[0] for block in range(3))
    assert sliding is sliding_again
    assert full is None or not torch.equal(sliding, full)


def test_equal_tensors_are_stored_once_and_different_ones_apart(tiny_model, tiny_batch):
    model = tiny_model("llama")
    structure = describe(model, tiny_batch("llama"))
    left, right = torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long)
    left[:, :4] = 0
    right[:, 12:] = 0
    batches = [{**tiny_batch("llama", seed=i), "attention_mask": m} for i, m in enumerate([left, right, left.clone()])]
    inputs = block_inputs(model, structure, batches)
    first, second, third = masks(inputs, 0, 3)
    assert first is third and not torch.equal(first, second)
    assert masks(inputs, 1, 3)[0] is first
    cos = [inputs.calls[0][b].kwargs["position_embeddings"][0] for b in range(3)]
    assert cos[1] is cos[0] and cos[2] is cos[0]


def test_a_double_is_freed_with_its_batch():
    pool, double = TensorPool(), torch.ones(4)
    kept = pool.share(torch.ones(4))
    pool.next_batch()
    assert pool.share(double) is kept
    freed = weakref.ref(double)
    del double
    pool.next_batch()
    assert freed() is None


def test_padded_batches_of_one_shape_run_with_their_own_masks(tiny_model, tiny_batch):
    model = tiny_model("gpt2")
    structure = describe(model, tiny_batch("gpt2"))
    batches = []
    for padding in (3, 7):
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[0, -padding:] = 0
        batches.append({**tiny_batch("gpt2", seed=padding), "attention_mask": mask})
    inputs = block_inputs(model, structure, batches)
    for number, batch in enumerate(batches):
        hidden = inputs.first_hidden[number]
        for index, block in enumerate(structure.blocks):
            hidden = run_block(model, block, hidden, inputs.call(index, number, hidden.device))
        with torch.no_grad():
            expected = model.transformer(**batch).last_hidden_state
            assert torch.equal(model.transformer.ln_f(hidden), expected)


def test_the_stub_pass_runs_no_linear_of_a_block_and_no_head(tiny_model, tiny_batch):
    model = tiny_model("llama")
    structure = describe(model, tiny_batch("llama"))
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    block_inputs(model, structure, [tiny_batch("llama")])
    assert ran == []


def test_blocks_are_put_back_after_an_error(tiny_model, tiny_batch):
    model = tiny_model("qwen3")
    structure = describe(model, tiny_batch("qwen3"))
    with torch.no_grad():
        before = model(**tiny_batch("qwen3")).logits
    with pytest.raises(IndexError):
        block_inputs(model, structure, [tiny_batch("qwen3"), {"input_ids": torch.full((1, 4), 10**6)}])
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.config.use_cache is True
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch("qwen3")).logits, before)


def test_a_forward_set_on_the_instance_survives_the_stub_pass(tiny_model, tiny_batch):
    model = tiny_model("llama")
    structure = describe(model, tiny_batch("llama"))
    layer = model.model.layers[0]
    layer.forward = own = layer.forward  # as accelerate's hooks do
    block_inputs(model, structure, [tiny_batch("llama")])
    assert layer.__dict__["forward"] is own


def test_a_block_gives_the_same_output_however_often_it_runs(tiny_model, tiny_batch):
    model = tiny_model("cohere2")
    structure = describe(model, tiny_batch("cohere2"))
    inputs = block_inputs(model, structure, [tiny_batch("cohere2")])
    call = inputs.call(0, 0, torch.device("cpu"))
    assert call.kwargs["past_key_values"] is None, "a cache would grow with every run"
    first, second = (run_block(model, structure.blocks[0], inputs.first_hidden[0], call) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_recorded_asks_for_a_gradient(tiny_model, tiny_batch):
    model = tiny_model("llama")
    structure = describe(model, tiny_batch("llama"))
    inputs = block_inputs(model, structure, [tiny_batch("llama")])
    hidden = run_block(model, structure.blocks[0], inputs.first_hidden[0], inputs.call(0, 0, torch.device("cpu")))
    assert not inputs.first_hidden[0].requires_grad and not hidden.requires_grad


def test_each_expert_is_observed_with_the_tokens_that_the_router_sends_it(tiny_model, tiny_batch):
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("eager")
    refs = describe(model, tiny_batch("qwen3_moe")).blocks[0].groups[2].linears
    sent, seen = {}, {}
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, args: sent.update(x=args[0], chosen=args[1]))
    with torch.no_grad(), LinearObserver({r: get_weight(model, r) for r in refs}, lambda r, x: seen.update({r: x})):
        model(**tiny_batch("qwen3_moe"))
    for ref in refs:
        tokens = (sent["chosen"] == ref.expert).any(-1)
        assert (ref in seen) == bool(tokens.any())
        if ref in seen:
            rows = {tuple(row) for row in seen[ref].tolist()}
            assert rows == {tuple(row) for row in sent["x"][tokens].tolist()}


def test_a_copy_or_a_transposed_use_of_a_weight_is_not_observed(tiny_model, tiny_batch):
    model = tiny_model("llama")
    ref = describe(model, tiny_batch("llama")).linears()[0]
    weight = get_weight(model, ref)
    assert weight.shape == (64, 64), "the test needs a square matrix, where only the strides differ"
    seen, x = [], torch.randn(3, 64)
    with LinearObserver({ref: weight}, lambda r, x: seen.append(x)):
        functional.linear(x, weight.clone())
        functional.linear(x, weight.T)
        x @ weight
        assert seen == []
        functional.linear(x, weight)
        x @ weight.T
    assert len(seen) == 2


def test_stop_forward_ends_the_pass_before_the_product(tiny_model, tiny_batch):
    model = tiny_model("llama")
    refs = describe(model, tiny_batch("llama")).linears()
    after = []
    model.get_submodule(refs[1].name).register_forward_hook(lambda *_: after.append("called"))

    def stop(ref, x):
        if ref == refs[1]:
            raise StopForward

    weights = {ref: get_weight(model, ref) for ref in refs}
    with pytest.raises(StopForward), torch.no_grad(), LinearObserver(weights, stop):
        model(**tiny_batch("llama"))
    assert after == []


def test_the_callback_is_not_observed_itself(tiny_model, tiny_batch):
    model = tiny_model("llama")
    ref = describe(model, tiny_batch("llama")).linears()[0]
    weight, calls = get_weight(model, ref), []

    def callback(_, x):
        calls.append(functional.linear(x, weight))

    with LinearObserver({ref: weight}, callback):
        functional.linear(torch.randn(2, 64), weight)
    assert len(calls) == 1
