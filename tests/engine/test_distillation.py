"""Training of the whole packed model: closer to the float model, never further on rows that are not trained on."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qep.config import QepConfig
from hf_qep.distill import trainable
from hf_qep.distill.tuned_linear import TunedLinear
from hf_qep.engine import tuning
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.modules import QepExpertWeight, packed_modules
from tests.engine.test_tuning import calibration, divergence, sharpened
from tests.tiny_models import FAMILIES, build_model

LENGTH, FEW = 16, 24


@pytest.fixture(autouse=True)
def fewer_tokens_per_step(monkeypatch):
    monkeypatch.setattr(tuning, "STEP_TOKENS", 4 * LENGTH)


def run(model, family="llama", rows=256, **options):
    data = calibration(model, family, rows)
    config = QepConfig(**{"num_samples": rows, "seq_len": LENGTH, "distill_epochs": 3} | options)
    return data, quantize_model(model, config, data)


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["onebit", "sign", "factored"])
def test_the_model_answers_more_like_the_float_model(method):
    float_model = sharpened()
    plain, trained = copy.deepcopy(float_model), copy.deepcopy(float_model)
    bits = 2.5 if method == "factored" else 1.0
    run(plain, method=method, bits=bits, distill_epochs=0)
    data, report = run(trained, method=method, bits=bits, distill_epochs=3)
    found = report.distillation
    assert (found.trained_on, found.held_out) == (224, 32)
    assert found.epoch > 0 and found.after < found.before and 0 < found.flips < 0.5
    losses = [divergence(float_model, model, data.inputs) for model in (plain, trained)]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_left_as_it_was_but_for_its_weights(family):
    model = build_model(family)
    wanted = {name: p.requires_grad for name, p in model.named_parameters() if p.is_floating_point()}
    _, report = run(model, family, FEW, distill_epochs=1)
    assert report.distillation.after <= report.distillation.before
    assert not any(isinstance(m, TunedLinear) for m in model.modules())
    kept = {name: p for name, p in model.named_parameters() if name in wanted and p.is_floating_point()}
    linears = packed_modules(model)
    others = {n: p for n, p in kept.items() if n.rpartition(".")[0] not in linears and n not in linears}
    assert others and all(p.requires_grad == wanted[n] and p.grad is None for n, p in others.items())
    assert not any(t.requires_grad for m in linears.values() for t in m.tensors().values())
    assert all(
        t.dtype == torch.float16 for m in linears.values() for t in m.tensors().values() if t.is_floating_point()
    )


def test_without_signs_only_scales_norms_and_biases_train():
    plain, trained = sharpened("gpt2"), sharpened("gpt2")
    run(plain, "gpt2", distill_epochs=0)
    _, report = run(trained, "gpt2", distill_epochs=3, distill_signs=False)
    assert report.distillation.epoch > 0 and report.distillation.flips == 0
    before, after = tensors(plain), tensors(trained)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"weight_scale", "column_scale", "bias"} <= changed
    assert all(torch.equal(before[n], after[n]) for n in before if before[n].dtype == torch.int32)


def test_scales_of_experts_train_though_their_signs_do_not():
    plain, trained = sharpened("qwen3_moe"), sharpened("qwen3_moe")
    run(plain, "qwen3_moe", distill_epochs=0)
    _, report = run(trained, "qwen3_moe", distill_epochs=3)
    assert report.distillation.epoch > 0
    experts = {n: m for n, m in packed_modules(plain).items() if isinstance(m, QepExpertWeight)}
    for name, module in experts.items():
        after = packed_modules(trained)[name].packed_state()
        for leaf, tensor in module.packed_state().items():
            assert after[leaf].dtype == tensor.dtype
            assert torch.equal(after[leaf], tensor) == (tensor.dtype == torch.int32)


def test_tuned_blocks_are_trained_on_from_where_they_are(monkeypatch):
    """If training gains nothing, what is left is the tuned model, not the solved one."""
    tuned, trained = sharpened(), sharpened()
    _, report = run(tuned, tune_epochs=2, distill_epochs=0)
    assert any(t.flips for t in report.tuning)
    monkeypatch.setattr(trainable, "SIGN_RATE", 5000.0)
    _, report = run(trained, tune_epochs=2, distill_epochs=1)
    assert report.distillation.epoch == 0
    before, after = tensors(tuned), tensors(trained)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_same_seed_gives_the_same_bytes_and_the_callers_randomness_is_left_alone():
    states = []
    torch.manual_seed(5)
    wanted = torch.rand(3)
    for _ in range(2):
        model = sharpened()
        torch.manual_seed(5)
        run(model, rows=32, distill_epochs=1)
        assert torch.equal(torch.rand(3), wanted)
        states.append(tensors(model))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_training_that_makes_the_held_out_rows_worse_is_not_kept(monkeypatch):
    plain, wild = sharpened("gpt2"), sharpened("gpt2")
    run(plain, "gpt2", FEW, distill_epochs=0)
    monkeypatch.setattr(trainable, "SIGN_RATE", 5000.0)
    monkeypatch.setattr(trainable, "SCALE_RATE", 20.0)
    _, report = run(wild, "gpt2", FEW)
    found = report.distillation
    assert (found.epoch, found.flips) == (0, 0.0) and found.after == found.before
    before, after = tensors(plain), tensors(wild)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_rows_made_to_be_overfitted_do_not_make_the_held_out_rows_worse():
    """One row again and again to train on, other tokens held out: many epochs would learn the row by heart."""
    model = sharpened()
    tokens = torch.randint(3, model.config.vocab_size, (16, LENGTH), generator=torch.Generator().manual_seed(2))
    data = torch.cat([tokens[:1].expand(112, -1), tokens])
    config = QepConfig(num_samples=128, seq_len=LENGTH, distill_epochs=12)
    rows = load_calibration(data, None, num_samples=128, seq_len=LENGTH, seed=0)
    report = quantize_model(model, config, rows)
    assert report.distillation.after <= report.distillation.before
    assert report.distillation.epoch < 12


def test_a_model_in_half_precision_keeps_its_dtype_and_gains_as_much():
    gains = []
    for dtype in (torch.float32, torch.bfloat16):
        model = sharpened().to(dtype)
        _, report = run(model)
        assert model.dtype == dtype and model.model.norm.weight.dtype == dtype
        gains.append(report.distillation.before - report.distillation.after)
    assert gains[1] > 0.6 * gains[0] > 0


def test_one_row_cannot_be_trained_on():
    _, report = run(sharpened(), rows=1)
    assert report.distillation is None
