"""Divergences and calibration: their limits, their merging of classes, what must hold of a corrected teacher."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.calibrated import Calibration, corrected, fit_calibration, reliability
from hf_qep.algorithms.distillation import TopClasses, top_classes
from hf_qep.algorithms.divergences import (
    DIVERGENCES,
    divergence_called,
    forward_kl,
    generalised_jsd,
    merged,
    skew_kl,
    skew_reverse_kl,
    tempered_divergence,
    total_variation,
)
from hf_qep.errors import ConfigError, UnknownNameError

NAMES = list(DIVERGENCES)
seeds = st.integers(0, 2**31)


def pair(seed: int, classes: int = 7, rows: int = 5, size: float = 2.0):
    draw = torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed)) * size
    return draw.log_softmax(-1)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_none_is_negative_and_all_are_zero_where_both_agree(name, seed):
    p, q = pair(seed)
    found = tempered_divergence(name, p, q, temperature=1.7, beta=0.3, skew=0.2)
    assert found.shape == (5,) and (found > 0).all()
    assert tempered_divergence(name, p, p, temperature=1.7).abs().max() < 1e-6


@given(seed=seeds, share=st.floats(0.01, 0.9))
@settings(max_examples=30, deadline=None)
def test_they_are_what_their_papers_say(seed, share):
    p, q = pair(seed).double()
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    a, b = p.exp(), q.exp()
    middle = share * a + (1 - share) * b
    wanted = {
        "forward-kl": kl(a, b),
        "reverse-kl": kl(b, a),
        "jsd": share * kl(a, middle) + (1 - share) * kl(b, middle),
        "skew-kl": kl(a, middle),
        "skew-reverse-kl": kl(b, (1 - share) * a + share * b),
        "tvd": (a - b).abs().sum(-1) / 2,
    }
    for name, value in wanted.items():
        found = divergence_called(name)(p, q, share, share)
        torch.testing.assert_close(found, value.float(), rtol=1e-4, atol=1e-5)


def test_limits():
    p, q = pair(3, size=1.0)
    assert generalised_jsd(p, q).max() <= math.log(2) and total_variation(p, q).max() <= 1
    torch.testing.assert_close(generalised_jsd(p, q, 1e-4) / 1e-4, forward_kl(p, q), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(skew_kl(p, q, 0.0), forward_kl(p, q))
    torch.testing.assert_close(skew_reverse_kl(p, q, 0.0), forward_kl(q, p))


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_one_side_rules_out_gives_no_infinity(name):
    logits = torch.tensor([[0.0, -math.inf, -1.0]], requires_grad=True)
    teacher = torch.tensor([[-math.inf, 0.0, -1.0]]).log_softmax(-1)
    loss = tempered_divergence(name, teacher, logits.log_softmax(-1))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_temperature_keeps_the_size_of_the_gradient(name):
    if name == "tvd":
        pytest.skip("its gradient is that of an absolute value")
    p, q = pair(0, size=0.1)
    q = q.clone().requires_grad_()
    sizes = []
    for temperature in (1.0, 4.0):
        loss = tempered_divergence(name, p, q, temperature=temperature).sum()
        sizes.append(torch.autograd.grad(loss, q)[0].norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_the_likeliest_and_the_rest_become_all_classes(name):
    p, q = pair(1, classes=20)
    full = tempered_divergence(name, p, q)
    all_ids = TopClasses(torch.arange(20).flip(0).expand(5, -1).int(), p.flip(-1))
    torch.testing.assert_close(tempered_divergence(name, *merged(all_ids, q)), full, rtol=1e-4, atol=1e-5)
    found = [tempered_divergence(name, *merged(top_classes(p, k), q)).mean() for k in (2, 8, 19)]
    assert found[0] <= found[1] + 1e-3 and found[1] <= found[2] + 1e-3 <= full.mean() + 2e-3
    sides = merged(top_classes(p, 4), q)
    assert all(side.shape == (5, 5) for side in sides)
    assert all((side.exp().sum(-1) - 1).abs().max() < 1e-5 for side in sides)


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean `reverse-kl`"):
        divergence_called("revers-kl")


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_rounding_never_makes_another_class_the_likeliest(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 5, generator=generator) * 1e-3  # many ties in float16
    found = top_classes(logits, 5)
    first = found.log_p.topk(2, -1).values
    assert torch.equal(found.log_p.argmax(-1), logits.argmax(-1)) and (first[:, 0] > first[:, 1]).all()


def test_a_class_that_must_be_kept_is_kept():
    logits = torch.arange(10.0).repeat(3, 1)
    found = top_classes(logits, 3, torch.tensor([0, 8, -100]))
    assert found.index.tolist() == [[9, 8, 0], [9, 8, 7], [9, 8, 7]]
    torch.testing.assert_close(found.log_p[0, 2].float(), logits.log_softmax(-1)[0, 0], rtol=1e-3, atol=0)


@given(seed=seeds, margin=st.floats(0.01, 0.9), size=st.floats(0.1, 8))
@settings(max_examples=60, deadline=None)
def test_a_corrected_teacher_is_a_distribution_with_the_label_ahead(seed, margin, size):
    p, _ = pair(seed, rows=16, size=size)
    labels = torch.randint(0, 7, (16,), generator=torch.Generator().manual_seed(seed))
    found = corrected(p, labels, margin).exp()
    assert (found.sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(found.argmax(-1), labels)
    right = p.argmax(-1) == labels
    assert torch.equal(found[right], p[right].exp())
    others = found.scatter(-1, labels[:, None], 0).max(-1).values
    lead = found.gather(-1, labels[:, None])[:, 0] - others
    torch.testing.assert_close(lead[~right], torch.full_like(lead[~right], margin), rtol=1e-3, atol=1e-5)
    wrong = p[~right].exp().scatter(-1, labels[~right, None], 0)
    kept = found[~right].scatter(-1, labels[~right, None], 0)
    torch.testing.assert_close(kept / kept.sum(-1, True), wrong / wrong.sum(-1, True), rtol=1e-3, atol=1e-5)


def test_the_rest_needs_no_label_ahead_of_it():
    p = torch.tensor([[0.2, 0.1, 0.7]]).log()
    torch.testing.assert_close(corrected(p, torch.tensor([0]), rest=True), p)
    assert corrected(p, torch.tensor([0])).argmax() == 0


def test_what_the_teacher_gives_little_to_counts_little():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.01, 0.99]]).log()
    weights = reliability(p, torch.zeros(3, dtype=torch.long), 4.0, math.log(0.5))
    assert weights[1] == pytest.approx(0.5) and weights[0] > 0.9 and weights[2] < 0.01


def test_calibration_finds_the_temperature_and_the_leaning():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20000, 3, generator=generator).mul(1.5).log_softmax(-1)
    labels = true.exp().multinomial(1, generator=generator)[:, 0]
    leaning = torch.tensor([0.8, 0.0, -0.8])
    said = ((true - leaning) * 2.5).log_softmax(-1)
    found = fit_calibration(said, labels)
    assert found.temperature == pytest.approx(2.5, rel=0.1)
    assert found.bias == pytest.approx(leaning.tolist(), abs=0.08)
    after = found.apply(said)
    nll = [torch.nn.functional.nll_loss(x, labels).item() for x in (said, after, true)]
    assert nll[1] < nll[0] and nll[1] == pytest.approx(nll[2], abs=2e-3)


def test_calibration_stays_finite_without_errors_and_refuses_classes_it_has_not_seen():
    said = torch.eye(3).mul(4).log_softmax(-1)
    found = fit_calibration(said, torch.arange(3))
    assert 0.05 < found.temperature < 2
    with pytest.raises(ConfigError, match=r"classes \[1\] have no row"):
        fit_calibration(said, torch.tensor([0, 2, 0]))
    with pytest.raises(ConfigError, match="3 classes, and the teacher has 2"):
        found.apply(torch.zeros(1, 2))
    assert Calibration(1.0, (0.0, 0.0)).apply(torch.zeros(1, 2)).exp().tolist() == [[0.5, 0.5]]
