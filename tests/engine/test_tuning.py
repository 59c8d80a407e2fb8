"""Tuning of blocks after they were solved: better, never worse, and what is stored is what was measured."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qep.config import QepConfig
from hf_qep.engine import tuning
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.modules import packed_modules
from hf_qep.registry import METHODS
from tests.tiny_models import FAMILIES, build_batch, build_model

ROWS, LENGTH = 256, 16
FEW = 24


@pytest.fixture(autouse=True)
def fewer_tokens_per_step(monkeypatch):
    """Eight rows: the calibration of these tests is small."""
    monkeypatch.setattr(tuning, "STEP_TOKENS", 8 * LENGTH)


def calibration(model, family="llama", rows=ROWS):
    if family == "vit":
        data = {"pixel_values": build_batch("vit", batch_size=rows)["pixel_values"]}
    else:
        vocabulary = model.config.get_text_config().vocab_size
        data = torch.randint(3, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return load_calibration(data, None, num_samples=rows, seq_len=LENGTH, seed=0)


def run(model, family="llama", rows=ROWS, **options):
    data = calibration(model, family, rows)
    config = QepConfig(**{"batch_size": 8, "num_samples": rows, "seq_len": LENGTH, "tune_epochs": 3} | options)
    return data, quantize_model(model, config, data)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0].float()


def divergence(float_model, model, inputs):
    """Mean KL of a model's answers to the float model's."""
    wanted = output(float_model, inputs).log_softmax(-1)
    return (wanted.exp() * (wanted - output(model, inputs).log_softmax(-1))).sum(-1).mean().item()


def sharpened(family="llama"):
    """A tiny random model whose weights are large enough for quantisation to matter."""
    model = build_model(family)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(2)
    return model


@pytest.mark.parametrize(
    ("method", "lookahead"), [*((method, None) for method in METHODS.names()), ("onebit", 0), ("onebit", 1)]
)
def test_the_loss_on_rows_that_are_not_trained_on_falls_for_every_method(method, lookahead):
    bits = 2.5 if method == "factored" else 1.0
    _, report = run(sharpened(), method=method, bits=bits, tune_lookahead=lookahead)
    assert [t.block for t in report.tuning] == [f"model.layers.{i}" for i in range(len(report.tuning))]
    assert all(t.after <= t.before for t in report.tuning)
    assert sum(t.after for t in report.tuning) < sum(t.before for t in report.tuning)
    assert all((t.trained_on, t.held_out) == (28, 4) for t in report.tuning)


def test_the_model_answers_more_like_the_float_model():
    float_model = sharpened()
    plain, tuned = copy.deepcopy(float_model), copy.deepcopy(float_model)
    data, _ = run(plain, tune_epochs=0)
    run(tuned, tune_epochs=4)
    losses = [divergence(float_model, model, data.inputs) for model in (plain, tuned)]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tuned_and_left_as_it_was_but_for_its_weights(family):
    model = build_model(family)
    wanted = {name: p.requires_grad for name, p in model.named_parameters() if p.is_floating_point()}
    _, report = run(model, family, FEW, batch_size=4, tune_epochs=1)
    assert all(t.after <= t.before for t in report.tuning)
    assert not any(isinstance(m, tuning.TunedLinear) for m in model.modules())
    kept = {name: p for name, p in model.named_parameters() if name in wanted and p.is_floating_point()}
    linears = packed_modules(model)
    others = {n: p for n, p in kept.items() if n.rpartition(".")[0] not in linears and n not in linears}
    assert others and all(p.requires_grad == wanted[n] and p.grad is None for n, p in others.items())
    assert not any(t.requires_grad for m in linears.values() for t in m.tensors().values())


def test_the_same_seed_gives_the_same_bytes():
    states = []
    for _ in range(2):
        model = sharpened()
        run(model, rows=64)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_step_that_makes_the_held_out_rows_worse_is_not_kept(monkeypatch):
    """Steps far too large for any good: the guard gives back what was solved, bit by bit, in every block."""
    plain, wild = sharpened("gpt2"), sharpened("gpt2")
    run(plain, "gpt2", FEW, batch_size=4, tune_epochs=0)
    monkeypatch.setattr(tuning, "SIGN_RATE", 50.0)
    monkeypatch.setattr(tuning, "SCALE_RATE", 20.0)
    _, report = run(wild, "gpt2", FEW, batch_size=4)
    assert [(t.epoch, t.flips) for t in report.tuning] == [(0, 0.0)] * len(report.tuning)
    assert all(t.after == t.before for t in report.tuning)
    ours, solved = wild.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[k], solved[k]) for k in solved)


def test_rows_made_to_be_overfitted_do_not_make_the_held_out_rows_worse():
    """One row again and again to train on, other tokens held out: many epochs would learn the row by heart."""
    model = sharpened()
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(3, 60, (1, LENGTH), generator=generator)
    others = torch.randint(60, 120, (4, LENGTH), generator=generator)
    tokens = torch.cat([row.repeat(FEW - 4, 1), others])
    data = load_calibration(tokens, None, num_samples=FEW, seq_len=LENGTH, seed=0)
    data.inputs["input_ids"] = tokens  # in this order: the last rows are held out
    report = quantize_model(model, QepConfig(batch_size=4, num_samples=FEW, seq_len=LENGTH, tune_epochs=12), data)
    assert all(t.after <= t.before for t in report.tuning)
    assert any(t.epoch < 12 for t in report.tuning), "the guard had nothing to do; the rows are not hostile enough"


def test_one_batch_leaves_nothing_to_hold_out_so_nothing_is_tuned():
    model = sharpened()
    _, report = run(model, rows=8)
    assert report.tuning == []


@pytest.mark.parametrize(("length", "rows"), [(16, 8), (128, 1), (1000, 1), (5, 25)])
def test_a_step_has_about_the_same_number_of_tokens_whatever_the_length_of_a_row(length, rows):
    assert (
        tuning.rows_per_step({"input_ids": torch.zeros(40, length), "attention_mask": torch.zeros(40, length)}) == rows
    )


@pytest.mark.parametrize(("option", "value"), [("tune_epochs", -1), ("tune_epochs", 1.5), ("tune_lookahead", -2)])
def test_options_out_of_range_are_refused(option, value):
    from hf_qep.errors import ConfigError

    with pytest.raises(ConfigError, match=option):
        QepConfig(**{option: value})


def test_a_tuned_model_in_half_precision_saves_and_loads_bit_for_bit(tmp_path):
    from transformers import AutoModelForCausalLM

    model = sharpened("cohere2").to(torch.bfloat16)
    _, report = run(model, "cohere2")
    assert any(t.epoch for t in report.tuning)
    model.save_pretrained(tmp_path)
    loaded, tuned = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict()
    assert loaded.keys() == tuned.keys()
    assert all(torch.equal(loaded[k], tuned[k]) for k in tuned)


def gain(report):
    """Share of the held-out loss that tuning took away, over all blocks."""
    return 1 - sum(t.after for t in report.tuning) / sum(t.before for t in report.tuning)


def test_half_precision_gains_about_as_much():
    gains = [
        gain(run(sharpened("cohere2").to(dtype), "cohere2", rows=128)[1]) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert gains[0] > 0.03
    assert gains[1] > 0.7 * gains[0]


def test_steps_too_small_for_half_precision_add_up(monkeypatch):
    """A norm of bfloat16 keeps steps of a relative 2^-9 and more; the ones here are a tenth of that, but many."""
    monkeypatch.setattr(tuning, "SIGN_RATE", 0.0)
    monkeypatch.setattr(tuning, "SCALE_RATE", 2e-4)
    model = sharpened("cohere2").to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters() if "norm" in name}
    _, report = run(model, "cohere2", tune_epochs=2)
    assert any(t.epoch for t in report.tuning)
    blocks = [name for name in before if name.startswith("model.layers")]
    assert any(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in blocks)
