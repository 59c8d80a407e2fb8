"""The sums that the outputs of a block's linears are terms of, and what is made of them."""

from __future__ import annotations

import pytest
import torch

from hf_qep.algorithms.moments import Moments
from hf_qep.algorithms.qep import correct_output, correct_target
from hf_qep.architectures.access import get_weight
from hf_qep.architectures.observe import LinearObserver
from hf_qep.architectures.structure import describe
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
    refs = [ref for block in structure.blocks for group in block.groups for ref in group.linears if ref.expert is None]
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
    for block in structure.blocks:
        last = block.groups[-1].linears[0]
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
    other = correct_output(weight, gap.hessian(), gap.output_gap(), damping=0.01)
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
