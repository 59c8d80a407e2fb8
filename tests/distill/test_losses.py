"""The description of a loss, and the loss of answers."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_qep.algorithms.distillation import top_classes
from hf_qep.distill import losses
from hf_qep.distill.hidden import Projections, layer_pairs, row_relation, token_relation
from hf_qep.distill.losses import DistillLoss, class_loss, in_chunks
from hf_qep.distill.said import Said
from hf_qep.errors import ConfigError, UnknownNameError

ROWS, CLASSES = 12, 6


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, ROWS, CLASSES, generator=generator) * 2
    return student, torch.randint(0, CLASSES, (ROWS,), generator=generator), teacher


def test_a_description_goes_to_json_and_back():
    loss = DistillLoss(alpha=0.3, divergence="jsd", layer_map=[1, 3], hidden=0.5)
    assert DistillLoss.from_dict(json.loads(json.dumps(loss.to_dict()))) == loss
    with pytest.raises(ConfigError, match="no description"):
        DistillLoss.from_dict({"alhpa": 1})


@pytest.mark.parametrize(
    "option",
    [{"alpha": 1.1}, {"alpha": True}, {"temperature": 0}, {"beta": 1.0}, {"skew": 1.0}, {"margin": 0}, {"hidden": -1}]
    + [{"reliability": "much"}, {"rationale": float("nan")}, {"least": 0.5}, {"label_correction": 1}],
)
def test_what_cannot_be_is_refused(option):
    with pytest.raises(ConfigError, match=f"`{next(iter(option))}`"):
        DistillLoss(**option)


def test_an_unknown_divergence_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean `skew-kl`"):
        DistillLoss(divergence="skewkl")


def test_labels_and_teacher_share_the_loss(answers):
    student, labels, teacher = answers
    said = top_classes(teacher, CLASSES)
    hard = F.cross_entropy(student, labels, reduction="none")
    soft = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    plain = {"label_correction": False}
    torch.testing.assert_close(class_loss(DistillLoss(alpha=1.0), student, labels, said), hard)
    found = class_loss(DistillLoss(alpha=0.0, **plain), student, labels, said)
    torch.testing.assert_close(found, soft, rtol=2e-3, atol=2e-3)
    found = class_loss(DistillLoss(alpha=0.25, **plain), student, labels, said)
    torch.testing.assert_close(found, 0.25 * hard + 0.75 * soft, rtol=2e-3, atol=2e-3)


def test_correction_and_reliability_change_only_answers_that_have_labels(answers):
    student, labels, teacher = answers
    labels[::2] = -100
    said = top_classes(teacher, CLASSES)
    plain = class_loss(DistillLoss(alpha=0.0, label_correction=False), student, labels, said)
    for options in ({"label_correction": True}, {"label_correction": False, "reliability": 5.0}):
        other = class_loss(DistillLoss(alpha=0.0, **options), student, labels, said)
        torch.testing.assert_close(other[::2], plain[::2])
        assert (other[1::2] - plain[1::2]).abs().max() > 1e-2


def test_the_minimum_of_the_corrected_loss_is_right_where_the_teacher_is_wrong(answers):
    _, labels, teacher = answers
    student = nn.Parameter(torch.zeros(ROWS, CLASSES))
    solver = torch.optim.Adam([student], 0.1)
    for _ in range(200):
        solver.zero_grad()
        class_loss(DistillLoss(alpha=0.0), student, labels, top_classes(teacher, 3, labels)).sum().backward()
        solver.step()
    assert (teacher.argmax(-1) != labels).any() and torch.equal(student.argmax(-1), labels)


def test_a_label_that_was_not_kept_is_refused(answers):
    student, _, teacher = answers
    with pytest.raises(ConfigError, match="was not kept"):
        class_loss(DistillLoss(), student, teacher.argmin(-1), top_classes(teacher, 2))


def test_chunks_change_neither_loss_nor_gradient(monkeypatch, answers):
    student, labels, teacher = answers
    found = []
    for wide in (losses.WIDE, 2):
        monkeypatch.setattr(losses, "WIDE", wide)
        monkeypatch.setattr(losses, "CHUNK", 5)
        logits = student.clone().requires_grad_()
        loss = class_loss(DistillLoss(divergence="jsd"), logits, labels, top_classes(teacher, 3, labels))
        found.append((loss, torch.autograd.grad(loss.sum(), logits)[0]))
    torch.testing.assert_close(found[0], found[1])
    assert in_chunks(lambda which: student[which].sum(-1), student).shape == (ROWS,)


def test_layers_are_compared_at_equal_depth():
    assert layer_pairs(2, 6) == [(1, 3), (2, 6)]
    assert layer_pairs(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert layer_pairs(2, 6, (0, 6)) == [(1, 0), (2, 6)]
    for wrong in ((1,), (1, 7), (-1, 2)):
        with pytest.raises(ConfigError, match="layer_map"):
            layer_pairs(2, 6, wrong)


def test_hidden_states_are_compared_by_direction_over_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(3, 5, 8, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool().expand(3, -1)
    projections = Projections([(1, 1), (2, 2)], 8, 8)
    assert not list(projections.parameters())
    said = Said(layers=tuple(3.0 * h for h in layers))
    assert projections(layers, said, mask).abs().max() < 1e-6
    spoilt = Said(layers=tuple(torch.where(mask[..., None], h, -h) for h in layers))
    assert projections(layers, spoilt, mask).abs().max() < 1e-6 and projections(layers, spoilt, None).min() > 0.5
    wider = Projections([(2, 1)], 8, 12, seed=1)
    assert [p.shape for p in wider.parameters()] == [(12, 8)]
    assert wider(layers, Said(layers=(layers[0], torch.randn(3, 5, 12))), mask).shape == (3,)


def test_relations_do_not_depend_on_width_rotation_or_padding():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q[:8]
    mask = torch.tensor([[1, 1, 1, 1, 0]]).bool().expand(3, -1)
    assert token_relation(hidden, 2 * hidden @ turn, mask).abs().max() < 1e-5
    padded = hidden.clone()
    padded[:, 4] = 7.0
    assert token_relation(padded, hidden, mask).abs().max() < 1e-5
    assert token_relation(hidden.flip(1), hidden, mask).min() > 0.1
    rows = hidden[:, 0]
    assert row_relation(rows, 3 * rows @ turn).abs().max() < 1e-6
    assert row_relation(rows.flip(0) ** 2, rows).sum() > 1e-3 and row_relation(rows[:1], rows[:1]).tolist() == [0]
    same = torch.zeros(3, 4, requires_grad=True)
    row_relation(same, rows).sum().backward()
    assert same.grad.isfinite().all()
