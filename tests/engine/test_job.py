from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn

from hf_qep.config import QepConfig
from hf_qep.engine import block as block_module
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.errors import AlreadyQuantizedError, ArchitectureError, BitsError, ConfigError, NonFiniteError
from hf_qep.modules import packed_modules
from hf_qep.registry import METHODS
from tests.tiny_models import FAMILIES
from tests.tiny_models import build_batch as tiny_batch
from tests.tiny_models import build_model as tiny_model


def calibration(rows=12, length=16, seed=0, vocabulary=128):
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return load_calibration(ids, None, num_samples=rows, seq_len=length, seed=0)


def quantized(model, rows=12, **options):
    options = {"batch_size": 4, "num_samples": rows, "seq_len": 16} | options
    report = quantize_model(model, QepConfig(**options), calibration(rows))
    return model, report


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_quantises_every_block_linear(method):
    model, report = quantized(tiny_model("llama"), method=method, bits=2.5 if method == "factored" else 1.0)
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    assert set(packed_modules(model)) == names == {layer.name for layer in report.layers}
    logits = model(**tiny_batch("llama")).logits
    assert torch.isfinite(logits).all()
    assert all(0 <= layer.error < 1.5 for layer in report.layers)


@pytest.mark.parametrize("family", ["llama", "cohere2", "qwen3_moe"])
def test_one_float_pass_and_at_most_one_quantised_pass_per_group_and_one_more(family, monkeypatch):
    calls = Counter()
    real = block_module.run_block

    def counting(model, block, hidden, call):
        calls[block.name, not any(name.startswith(block.name + ".") for name in packed_modules(model))] += 1
        return real(model, block, hidden, call)

    monkeypatch.setattr(block_module, "run_block", counting)
    groups = {}
    real_quantize = block_module.quantize_block
    monkeypatch.setattr(
        "hf_qep.engine.job.quantize_block",
        lambda job, i, b: (groups.__setitem__(b.name, len(b.groups)), real_quantize(job, i, b)),
    )
    _, report = quantized(tiny_model(family))
    batches = 3
    for name, count in groups.items():
        # While all its weights are float a block runs once for the float stream and once up to its first group.
        assert calls[name, True] == 2 * batches
        assert calls[name, True] + calls[name, False] <= (1 + count + 1) * batches
    assert all(f == 1 and q <= groups[n] + 1 for n, (f, q) in zip(groups, report.passes, strict=True))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_calibration():
    first, _ = quantized(tiny_model("llama"))
    second, _ = quantized(tiny_model("llama"))
    a, b = state_of(first), state_of(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_layer_seed_depends_on_the_name_only():
    model = tiny_model("llama")
    from hf_qep.architectures.structure import describe

    refs = [r for b in describe(model, tiny_batch("llama")).blocks for g in b.groups for r in g.linears]
    seeds = [block_module.layer_seed(0, r) for r in refs]
    assert len(set(seeds)) == len(seeds) and seeds == [block_module.layer_seed(0, copy.deepcopy(r)) for r in refs]
    assert block_module.layer_seed(1, refs[0]) != seeds[0]


def test_spilling_the_streams_to_disk_does_not_change_a_byte(tmp_path):
    kept, _ = quantized(tiny_model("cohere2"))
    spilled = tiny_model("cohere2")
    config = QepConfig(batch_size=4, num_samples=12, seq_len=16)
    quantize_model(spilled, config, calibration(), stream_budget=0, stream_folder=tmp_path)
    a, b = state_of(kept), state_of(spilled)
    assert all(torch.equal(a[k], b[k]) for k in a) and list(tmp_path.iterdir()) == []


def test_the_size_of_the_batches_changes_nothing_but_rounding():
    one, _ = quantized(tiny_model("llama"), method="rtn", propagation=0.0, batch_size=2)
    other, _ = quantized(tiny_model("llama"), method="rtn", propagation=0.0, batch_size=12)
    a, b = state_of(one), state_of(other)
    assert all(torch.equal(a[k], b[k]) for k in a)


def final_error(model, reference, batch):
    wanted = reference(**batch, output_hidden_states=True).hidden_states[-1]
    return (
        model(**batch, output_hidden_states=True).hidden_states[-1] - wanted
    ).square().mean() / wanted.square().mean()


@torch.no_grad()
def test_propagation_lowers_the_error_of_the_last_block_on_the_calibration_rows():
    reference = tiny_model("llama")
    batch = calibration(96).inputs
    errors = {}
    for alpha in (0.0, 1.0):
        model = tiny_model("llama")
        quantize_model(model, QepConfig(method="gptq", propagation=alpha, num_samples=96, seq_len=16), calibration(96))
        errors[alpha] = final_error(model, reference, batch).item()
    assert errors[1.0] < errors[0.0]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "cohere2", "gpt2", "vit", "bert"])
def test_correcting_the_residual_stream_lowers_the_error_of_the_model_on_the_calibration_rows(family):
    inputs = tiny_batch(family, batch_size=96)
    key = "pixel_values" if "pixel_values" in inputs else "input_ids"
    data = load_calibration(inputs[key], None, num_samples=96, seq_len=16, seed=0)
    errors = {}
    for residual in (False, True):
        model = tiny_model(family)
        quantize_model(model, QepConfig(method="gptq", residual=residual), data)
        errors[residual] = final_error(model, tiny_model(family), {key: data.inputs[key]}).item()
    assert errors[True] < errors[False]


@torch.no_grad()
def test_bias_correction_removes_the_mean_error_of_the_first_linear():
    outputs = {}
    reference, batch = tiny_model("bert"), calibration().inputs
    name = "bert.encoder.layer.0.attention.self.query"
    for corrected in (None, False, True):
        model = reference if corrected is None else tiny_model("bert")
        if corrected is not None:
            quantized(model, bias_correction=corrected)
        seen = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        model(**batch)
        hook.remove()
        outputs[corrected] = seen[0].mean((0, 1))
    plain = (outputs[False] - outputs[None]).abs().max()
    assert (outputs[True] - outputs[None]).abs().max() < 1e-2 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantised_and_still_runs(family):
    model = tiny_model(family)
    batch = tiny_batch(family)
    inputs = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in batch.items()}
    if "pixel_values" in inputs and "input_ids" not in inputs:
        data = load_calibration(inputs["pixel_values"], None, num_samples=4, seq_len=16, seed=0)
    else:
        data = load_calibration(inputs["input_ids"], None, num_samples=4, seq_len=16, seed=0)
    report = quantize_model(model, QepConfig(batch_size=2), data)
    assert packed_modules(model) and report.layers
    output = model(**batch)
    assert all(
        torch.isfinite(v).all() for v in (output.get("logits"), output.get("last_hidden_state")) if v is not None
    )


def test_a_quantised_model_is_refused():
    model, _ = quantized(tiny_model("llama"))
    with pytest.raises(AlreadyQuantizedError, match="float model"):
        quantize_model(model, QepConfig(), calibration())


def test_bits_a_method_cannot_have_are_refused_before_any_work():
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(BitsError):
        quantize_model(model, QepConfig(bits=2.0), calibration())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_group_size_that_does_not_divide_is_refused_before_any_work():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="does not divide"):
        quantize_model(model, QepConfig(group_size=48), calibration())
    assert not packed_modules(model)


def test_activations_that_overflow_are_refused_with_the_layer():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[:, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"layers\.0"):
        quantize_model(model, QepConfig(), calibration())


def test_fewer_tokens_than_the_widest_input_is_warned_about_with_the_number_advised():
    with pytest.warns(UserWarning, match="96"):
        report = quantize_model(tiny_model("llama"), QepConfig(method="rtn"), calibration(rows=2))
    assert len(report.warnings) == 1


def test_skipping_everything_is_refused():
    with pytest.raises(ArchitectureError, match="skip_modules"):
        quantize_model(tiny_model("llama"), QepConfig(skip_modules=["model.layers"]), calibration())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_counts_for_nothing(family):
    """Rows filled up to twice their length, whatever the padding is, give the errors of the bare rows."""
    length = 12
    ids = torch.randint(3, 100, (16, length), generator=torch.Generator().manual_seed(3))
    errors = []
    for padding in (None, 1, 2):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if padding is not None:
            filled = torch.full_like(ids, padding)
            inputs["input_ids"] = torch.cat([ids, filled], 1)
            inputs["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
        model = tiny_model(family)
        data = load_calibration(inputs, None, num_samples=16, seq_len=length, seed=0)
        report = quantize_model(model, QepConfig(num_samples=16), data)
        assert {layer.tokens for layer in report.layers} == {16 * length}
        errors.append(torch.tensor([layer.error for layer in report.layers]))
    for error in errors[1:]:  # a rounding of the attention's sums can turn a sign of a later layer
        torch.testing.assert_close(error[:3], errors[0][:3], rtol=1e-4, atol=0)
        torch.testing.assert_close(error, errors[0], rtol=0.1, atol=0)
