from __future__ import annotations

import pytest
import torch

from hf_qep.algorithms.distillation import divergence, top_classes


def pair(classes=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(3, 5, classes, generator=generator) for _ in range(2))


def exact(teacher, student):
    p = teacher.double().log_softmax(-1)
    return (p.exp() * (p - student.double().log_softmax(-1))).sum(-1)


def test_with_all_classes_kept_it_is_the_divergence():
    teacher, student = pair()
    torch.testing.assert_close(
        divergence(top_classes(teacher, 40), student).double(),
        exact(teacher, student),
        rtol=1e-3,
        atol=2e-3,  # log-probabilities are kept as float16
    )


@pytest.mark.parametrize("k", [1, 4, 16])
def test_with_fewer_it_is_a_bound_from_below_that_rises_with_their_number(k):
    teacher, student = pair()
    found = divergence(top_classes(teacher, k), student)
    assert (found >= -1e-6).all()
    assert (found.double() <= exact(teacher, student) + 1e-5).all()
    assert (found <= divergence(top_classes(teacher, 2 * k), student) + 1e-5).all()


def test_it_is_zero_with_a_gradient_of_zero_at_the_teacher_itself():
    teacher, _ = pair()
    student = teacher.clone().requires_grad_(True)
    loss = divergence(top_classes(teacher, 8), student).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-2)
    assert student.grad.abs().max() < 1e-3


def test_a_teacher_that_is_certain_gives_finite_gradients():
    teacher = torch.zeros(1, 10)
    teacher[0, 3] = 200.0
    student = torch.zeros(1, 10)
    student[0, 4] = 200.0
    student.requires_grad_(True)
    divergence(top_classes(teacher, 4), student).sum().backward()
    assert torch.isfinite(student.grad).all()
