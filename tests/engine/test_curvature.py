"""The output metric: what it predicts, what is left out of it, and that it does not depend on the room there is."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qep.engine import curvature
from hf_qep.methods import factored
from tests.engine.test_job import calibration, quantized
from tests.tiny_models import build_model


def metrics_of(model, monkeypatch, **options):
    """Output metric of every problem that `factored` gets, in order, with the model left as it is."""
    found = []
    real = factored.solve

    def solve(problem, **more):
        found.append(problem.output_metric)
        return real(problem, iterations=4, **more)

    with monkeypatch.context() as patched:
        patched.setattr(factored, "solve", solve)
        options = {"output_curvature": True} | options
        _, report = quantized(copy.deepcopy(model), rows=48, method="factored", bits=2.5, **options)
    return dict(zip([layer.name for layer in report.layers], found, strict=True))


@pytest.fixture(scope="module")
def llama():
    return build_model("llama")


def test_errors_along_the_strongest_direction_cost_more(llama, monkeypatch):
    metrics = metrics_of(llama, monkeypatch)
    ids = calibration(rows=32, seed=5).inputs["input_ids"]
    generator = torch.Generator().manual_seed(0)

    def divergence(name, direction):
        moved = copy.deepcopy(llama)
        weight = moved.get_submodule(name).weight.data
        weight += 0.05 * torch.outer(direction, torch.randn(weight.shape[1], generator=generator))
        with torch.no_grad():
            p, q = (m(ids).logits.log_softmax(-1) for m in (llama, moved))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"):
        _, basis = torch.linalg.eigh(metrics[name])
        weak, strong = (sum(divergence(name, basis[:, k]) for k in end) for end in (range(4), range(-4, 0)))
        assert strong > 1.5 * weak, f"{name}: {strong} {weak}"


def test_every_metric_is_positive_definite_with_unit_mean_diagonal(llama, monkeypatch):
    for name, metric in metrics_of(llama, monkeypatch).items():
        assert torch.linalg.eigvalsh(metric.double()).min() > 0, name
        assert metric.diagonal().mean().item() == pytest.approx(1, rel=1e-4)


def test_the_room_for_matrices_changes_nothing(llama, monkeypatch):
    whole = metrics_of(llama, monkeypatch)
    monkeypatch.setattr(curvature, "ROOM_BYTES", 0)
    in_turns = metrics_of(llama, monkeypatch)
    assert whole.keys() == in_turns.keys()
    for name, metric in whole.items():
        torch.testing.assert_close(in_turns[name], metric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_encoders_and_transposed_weights_have_metrics_too(family, monkeypatch):
    metrics = metrics_of(build_model(family), monkeypatch)
    assert metrics and all(metric is not None and torch.isfinite(metric).all() for metric in metrics.values())


def test_experts_and_runs_without_the_option_have_none(llama, monkeypatch):
    model = build_model("qwen3_moe")
    for name, metric in metrics_of(model, monkeypatch).items():
        assert (metric is None) == (".experts" in name)
    assert set(metrics_of(llama, monkeypatch, output_curvature=False).values()) == {None}


def test_methods_whose_rows_stand_alone_are_not_touched(llama):
    plain, _ = quantized(copy.deepcopy(llama), method="sign")
    told, _ = quantized(copy.deepcopy(llama), method="sign", output_curvature=True)
    assert all(torch.equal(v, told.state_dict()[k]) for k, v in plain.state_dict().items())
