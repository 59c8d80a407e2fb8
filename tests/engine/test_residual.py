"""The sums that the outputs of a block's linears are terms of, and what is made of them."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qep.algorithms.moments import Moments
from hf_qep.algorithms.qep import correct_output, correct_target
from hf_qep.architectures.access import get_weight
from hf_qep.architectures.observe import LinearObserver
from hf_qep.architectures.structure import describe
from hf_qep.config import QepConfig
from hf_qep.engine import block
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from tests.tiny_models import build_batch, build_model

WRITERS = {
    "llama": {"o_proj", "down_proj"},
    "cohere2": {"o_proj", "down_proj"},
    "gpt2": {"c_proj"},
    "bert": {"dense"},
    "vit": {"o_proj", "fc2"},
}


def sums_of(model, batch):
    structure = describe(model, batch)
    refs = [ref for part in structure.blocks for group in part.groups for ref in group.linears if ref.expert is None]
    found = {}
    with torch.no_grad(), LinearObserver({r: get_weight(model, r) for r in refs}, lambda r, x: None, found.__setitem__):
        model(**batch)
    return structure, found


@pytest.mark.parametrize("family", WRITERS)
def test_every_linear_that_writes_to_the_residual_stream_is_seen_in_a_sum(family):
    model = build_model(family)
    structure, found = sums_of(model, build_batch(family))
    width = model.config.get_text_config().hidden_size
    writers = {ref.name for ref, total in found.items() if total.shape[-1] == width}
    for part in structure.blocks:
        last = part.groups[-1].linears[0]
        assert last.name in writers
    assert {name.rpartition(".")[2] for name in writers} == WRITERS[family]


def test_the_last_sum_of_a_llama_block_is_the_input_of_the_next():
    model, batch = build_model("llama"), build_batch("llama")
    _, found = sums_of(model, batch)
    total = next(t for ref, t in found.items() if ref.name == "model.layers.0.mlp.down_proj")
    hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.equal(total, hidden)


def test_an_output_gap_of_the_layers_own_error_is_plain_error_propagation():
    x, noise, weight = torch.randn(200, 12), torch.randn(200, 12), torch.randn(5, 12)
    quantized = x + 0.3 * noise
    plain, gap = Moments(12, cross=True), Moments(12, outputs=5)
    for i in range(0, 200, 50):
        rows = slice(i, i + 50)
        plain.update(quantized[rows], x[rows])
        gap.update(quantized[rows], gap=(x[rows] - quantized[rows]) @ weight.T)
    one = correct_target(weight, plain.hessian(), plain.cross(), damping=0.01)
    other = correct_output(weight, gap.hessian(), gap.take_output_gap(), damping=0.01)
    assert torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(gap.mean_gap(), ((x - quantized) @ weight.T).mean(0), atol=1e-5)


def test_the_corrected_weight_is_the_regression_of_the_wanted_sum():
    x, residual_error, weight = torch.randn(300, 8).double(), torch.randn(300, 4).double(), torch.randn(4, 8).double()
    residual_error += x @ torch.randn(8, 4).double()
    hessian, gap = x.T @ x / 300, residual_error.T @ x / 300
    found = correct_output(weight, hessian, gap, damping=0.0)
    wanted = weight + torch.linalg.lstsq(x, residual_error).solution.T
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_missing_gap_is_refused():
    with pytest.raises(ValueError, match="gap"):
        Moments(4, outputs=2).update(torch.zeros(3, 4))


def calibration(vocabulary, seed=1):
    ids = torch.randint(3, vocabulary, (16, 32), generator=torch.Generator().manual_seed(seed))
    return load_calibration(ids, None, num_samples=16, seq_len=32, seed=0)


def quantized_logits(model, data, **options):
    quantize_model(model, QepConfig(batch_size=8, **options), data)
    with torch.no_grad():
        return model(input_ids=data.inputs["input_ids"]).logits


def shifted(model, by):
    """The same function with another mean at the inputs of the feed-forward layers: their biases take it back."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_2.bias += by
            block.mlp.c_fc.bias -= by * block.mlp.c_fc.weight.sum(0)
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_where_a_bias_takes_up_the_mean_the_mean_of_the_input_does_not_matter(method):
    model = build_model("gpt2")
    distances = []
    for seed in range(3):
        data = calibration(model.config.vocab_size, seed)
        moved, plain = shifted(copy.deepcopy(model), by=3.0), copy.deepcopy(model)
        with torch.no_grad():
            ids = data.inputs["input_ids"]
            torch.testing.assert_close(moved(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-4)
        one, other = quantized_logits(plain, data, method=method), quantized_logits(moved, data, method=method)
        distances.append(((one - other).square().mean() / (one - one.mean()).square().mean()).item())
    # Not centred, all are above 0.1. The median, because rounding may tip a sign, which error feedback then spreads.
    assert sorted(distances)[1] < 1e-3


def test_the_size_of_a_token_in_the_residual_stream_does_not_decide_how_much_it_counts():
    total = torch.randn(2, 5, 16)
    error = 0.1 * torch.randn(2, 5, 16)
    size = torch.tensor([1.0, 1000.0, 0.01, 7.0, 50.0]).view(1, 5, 1)
    weight = block._norm_weight(total * size)
    weighed = (error * size).square().mean(-1) * weight
    torch.testing.assert_close(weighed, error.square().mean(-1) / total.square().mean(-1), rtol=2e-2, atol=0)
    assert torch.isfinite(block._norm_weight(torch.zeros(1, 16))).all()
